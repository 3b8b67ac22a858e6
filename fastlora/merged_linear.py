"""A linear of which some slices of the outputs are adapted: q, k and v in one weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import reference
from fastlora.dispatch import HAS_TRITON, problem_for
from fastlora.functional import autocast_linear, check_dropout, check_scaling, check_tensors
from fastlora.merge_products import Product
from fastlora.modules import LoRAWeightLayer, base_problem, check_lora_options, lora_scaling

if HAS_TRITON:
    from fastlora import ops_merged
    from fastlora.autograd_merged import LoRAMergedLinearFunction


def lora_merged_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    widths: Sequence[int],
    enable_lora: Sequence[bool],
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``y = x W0^T + bias``, plus ``scaling * dropout(x) A_g^T B_g^T`` on each enabled slice g of y.

    The slices share one dropout mask, as in loralib's ``MergedLinear``. Where the kernels run, the
    frozen product and every slice's rank product are one launch; slices without an adapter cost
    nothing. Elsewhere `fastlora.reference.lora_merged_linear` runs.

    Args:
        x (Tensor): ``(..., K)``.
        weight (Tensor): ``[N, K]``, in the dtype of x.
        lora_A (Tensor): ``[G R, K]``: the A of each of the G enabled slices, one below the other.
        lora_B (Tensor): ``[sum of enabled widths, R]``, likewise.
        widths (Sequence[int]): outputs of each slice; they add up to N.
        enable_lora (Sequence[bool]): which slices are adapted, one at least.
        bias (Tensor | None): ``[N]``. Default: ``None``.
        scaling (float | Tensor): as for `lora_linear`. Default: 1.0.
        dropout_p (float): as for `lora_linear`. Default: 0.0.
        training (bool): whether dropout is active. Default: ``True``.

    Returns:
        Tensor: ``(..., N)`` in the dtype of x.

    Raises:
        TypeError: as `lora_linear`.
        ValueError: as `lora_linear`, or the slices do not fit.

    Example:
        >>> import torch, fastlora
        >>> x, weight = torch.randn(5, 32), torch.randn(48, 32)
        >>> lora_A, lora_B = torch.randn(8, 32), torch.randn(32, 4)
        >>> fastlora.lora_merged_linear(
        ...     x, weight, lora_A, lora_B, widths=(16, 16, 16), enable_lora=(True, False, True)
        ... ).shape
        torch.Size([5, 48])
    """
    slices = enabled_slices(widths, enable_lora)
    stand_in = lora_B
    if all(isinstance(t, Tensor) and t.dim() == 2 for t in (weight, lora_A, lora_B)):
        stand_in = _check_slices(weight, lora_A, lora_B, widths, slices)
    check_tensors(x, weight, lora_A, stand_in, bias)
    check_scaling(scaling, x.device)
    dropout_p = check_dropout(dropout_p)
    x, weight, bias = autocast_linear(x, weight, bias)
    dropout_p = dropout_p if training else 0.0
    seed = reference.draw_seed(x.device) if dropout_p > 0 else None
    if problem_for(x, weight, lora_A, lora_B, bias=bias):
        return reference.lora_merged_linear(
            x, weight, lora_A, lora_B, slices,
            bias=bias, scaling=scaling, dropout_p=dropout_p, seed=seed,
            compute=reference.in_place_of_kernels(x),
        )  # fmt: skip

    compiling = torch.compiler.is_compiling()
    if isinstance(scaling, Tensor):
        scaling = scaling.detach()
    elif compiling:  # as `lora_linear`: a number would be a constant of the graph
        scaling = scaling * torch.ones((), dtype=torch.float32, device=x.device)
    arguments = (
        x.reshape(-1, x.shape[-1]), weight, None if bias is None else bias.contiguous(),
        lora_A, lora_B, seed,
        scaling if isinstance(scaling, Tensor) else None,
        1.0 if isinstance(scaling, Tensor) else float(scaling),
        dropout_p,
    )  # fmt: skip
    if compiling:
        y, _, _ = ops_merged.lora_merged_linear(*arguments, list(itertools.chain(*slices)))
    else:
        y, _, _ = LoRAMergedLinearFunction.apply(*arguments, slices)
    return reference.shaped(y, x.shape[:-1])


def _check_slices(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    widths: Sequence[int],
    slices: Sequence[tuple[int, int]],
) -> Tensor:
    """Check the shapes that slices change; return a B such as one layer of all the ranks would have."""
    if sum(widths) != weight.shape[0]:
        raise ValueError(f"widths must add up to {weight.shape[0]} outputs, got {sum(widths)}")
    rows, R = sum(last - first for first, last in slices), lora_B.shape[1]
    if R == 0 or lora_B.shape[0] != rows:
        raise ValueError(
            f"lora_B must be (outputs of the enabled slices, r)=({rows}, r), "
            f"got {tuple(lora_B.shape)}"
        )
    if lora_A.shape[0] != R * len(slices):
        raise ValueError(
            f"lora_A must have r rows a slice, {len(slices)} * {R}, got {lora_A.shape[0]}"
        )
    return lora_B[:1, :1].expand(weight.shape[0], lora_A.shape[0])


def enabled_slices(
    widths: Sequence[int], enable_lora: Sequence[bool]
) -> tuple[tuple[int, int], ...]:
    """Return the first and last column of each enabled slice; raise for what is no slicing."""
    for name, values, kind in (("widths", widths, int), ("enable_lora", enable_lora, bool)):
        if not isinstance(values, (list, tuple)) or not all(type(v) is kind for v in values):
            raise TypeError(f"{name} must be a list of {kind.__name__}, got {values!r}")
    if len(widths) != len(enable_lora):
        raise ValueError(
            f"widths must have one entry a slice, {len(enable_lora)}, got {len(widths)}"
        )
    if not all(width > 0 for width in widths):
        raise ValueError(f"widths must be above 0, got {list(widths)}")
    if not any(enable_lora):
        raise ValueError(f"enable_lora must enable a slice, got {list(enable_lora)}")
    ends = itertools.accumulate(widths)
    return tuple(
        (end - width, end) for end, width, on in zip(ends, widths, enable_lora, strict=True) if on
    )


class LoRAMergedLinear(LoRAWeightLayer):
    """A frozen linear whose outputs are slices, such as q, k and v, some of them with an adapter.

    ``y = x weight^T + bias``, and on enabled slice g ``+ scaling * dropout(x) A_g^T B_g^T``

    This is loralib's ``MergedLinear``: the same formula, state-dict keys and shapes, so its
    checkpoints load. Slices may differ in width, as grouped-query attention has them.

    Shapes: weight ``(out_features, in_features)``, bias ``(out_features,)`` or None, lora_A
    ``(r * enabled slices, in_features)``, lora_B ``(outputs of the enabled slices, r)``.

    Args:
        in_features: Inputs.
        out_features: Outputs, all slices together.
        r: The rank of each slice; all of them together 256 at most.
        lora_alpha: ``scaling`` is ``lora_alpha / r``.
        lora_dropout: Probability in [0, 1] of dropping an element of x on the LoRA branch in
            training mode; the slices share the mask.
        enable_lora: Which slices are adapted.
        widths: Outputs of each slice. None: all the same.
        bias: Whether there is a bias.
        fan_in_fan_out: The weight is stored as ``(in_features, out_features)``, as GPT-2's is. The
            kernels then read it by pointers, not by TMA.
        merge_weights: Merge in ``eval()`` and unmerge in ``train()``, as loralib's layers do.
        adapter_dtype: dtype of ``lora_A`` and ``lora_B``; None means that of the weight.
        base: A linear whose weight and bias are taken, as `LoRALinear` takes them; None makes a
            new one.
        device: Where a new one is made.
        dtype: dtype of a new one.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or the widths do not add up to ``out_features``.

    Example:
        >>> import torch
        >>> from fastlora import LoRAMergedLinear
        >>> qkv = LoRAMergedLinear(
        ...     64, 96, r=4, lora_alpha=8, enable_lora=[True, False, True], widths=[64, 16, 16]
        ... )
        >>> qkv(torch.randn(3, 64)).shape
        torch.Size([3, 96])
        >>> qkv.lora_A.shape, qkv.lora_B.shape
        (torch.Size([8, 64]), torch.Size([80, 4]))
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (True,),
        *,
        widths: Sequence[int] | None = None,
        bias: bool = True,
        fan_in_fan_out: bool = False,
        merge_weights: bool = False,
        adapter_dtype: torch.dtype | None = None,
        base: nn.Linear | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Freeze the linear and make the adapters beside it."""
        super().__init__()
        check_lora_options(r, lora_alpha, lora_dropout, False, "kaiming", adapter_dtype)
        if widths is None and enable_lora:
            if out_features % len(enable_lora):
                raise ValueError(
                    f"out_features must be a multiple of the {len(enable_lora)} slices where "
                    f"widths are not given, got {out_features}"
                )
            widths = [out_features // len(enable_lora)] * len(enable_lora)
        slices = enabled_slices(widths or (), enable_lora)
        self.widths, self.enable_lora = tuple(widths or ()), tuple(enable_lora)
        if sum(self.widths) != out_features:
            raise ValueError(
                f"widths must add up to out_features={out_features}, got {sum(self.widths)}"
            )
        if not isinstance(fan_in_fan_out, bool):
            raise TypeError(f"fan_in_fan_out must be a bool, got {fan_in_fan_out!r}")
        if fan_in_fan_out and base is not None:
            raise ValueError(
                "base must be None with fan_in_fan_out, for an nn.Linear stores its weight as "
                "(out_features, in_features); load the weight instead"
            )
        if base is None:
            base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        problem = base_problem(base)
        if problem is not None:
            raise problem
        if (base.in_features, base.out_features) != (in_features, out_features):
            raise ValueError(
                f"base must be {in_features} -> {out_features}, "
                f"got {base.in_features} -> {base.out_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.fan_in_fan_out = fan_in_fan_out
        self.r = r
        self.lora_alpha = lora_alpha if isinstance(lora_alpha, int) else float(lora_alpha)
        self.lora_dropout = float(lora_dropout)
        weight = cast(nn.Parameter, base.weight)
        if fan_in_fan_out:
            weight = nn.Parameter(weight.detach().t().contiguous())
        made = weight.dtype if adapter_dtype is None else adapter_dtype
        rows = sum(last - first for first, last in slices)
        lora_a = torch.empty((r * len(slices), in_features), dtype=made, device=weight.device)
        lora_b = torch.empty((rows, r), dtype=made, device=weight.device)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", base.bias)
        self.register_parameter("lora_A", nn.Parameter(lora_a))
        self.register_parameter("lora_B", nn.Parameter(lora_b))
        self.scaling = lora_scaling(r, self.lora_alpha, False)
        self.reset_lora_parameters()
        self._init_merging(merge_weights, base.training)
        weight.requires_grad_(False)
        if base.bias is not None:
            base.bias.requires_grad_(False)

    def reset_lora_parameters(self) -> None:
        """Draw ``lora_A`` anew and set ``lora_B`` to zero; the frozen linear stays as it is."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer; dropout acts in training mode only. Merged, it is the plain linear."""
        if self._frozen is not None:
            if self.training:
                self._refuse_training_while_merged()
            return F.linear(x, self._rows(self.weight), self.bias)
        return lora_merged_linear(
            x,
            self._rows(self.weight),
            self.lora_A,
            self.lora_B,
            widths=self.widths,
            enable_lora=self.enable_lora,
            bias=self.bias,
            scaling=self._scaling_now,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.t() if self.fan_in_fan_out else weight

    def _products(self, source: Tensor, target: Tensor) -> list[Product]:
        parts, outs = (torch.split(self._rows(t), list(self.widths)) for t in (source, target))
        adapters_a = iter(torch.split(self.lora_A, self.r))
        on = [
            width for width, enabled in zip(self.widths, self.enable_lora, strict=True) if enabled
        ]
        adapters_b = iter(torch.split(self.lora_B, on))
        return [
            Product(part, out, next(adapters_a), next(adapters_b), float(self.scaling))
            if enabled
            else Product(part, out)
            for part, out, enabled in zip(parts, outs, self.enable_lora, strict=True)
        ]

    def extra_repr(self) -> str:
        """Show the sizes and the LoRA settings in ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}, widths={list(self.widths)}, "
            f"enable_lora={list(self.enable_lora)}"
        )
