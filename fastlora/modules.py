"""The LoRA linear as a module, for use beside or in place of ``torch.nn.Linear``."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.functional import lora_linear
from fastlora.merge_products import Product
from fastlora.merging import LoRALayer, parameter_of

MAX_RANK = 256
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INITS = ("kaiming", "gaussian")


class LoRAWeightLayer(LoRALayer):
    """A `LoRALayer` with a frozen ``weight`` of its own, and a scaling that compiled code can follow.

    A subclass sets ``scaling`` once its weight is there.
    """

    weight: nn.Parameter

    @property
    def scaling(self) -> float:
        """The factor of the LoRA branch; it may be set to any number at any time."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        # A tensor beside the number: torch.compile guards on the value of a number, and would compile
        # again for each, but not on that of a tensor. It is no buffer: casts, state dicts and DDP's
        # broadcasts leave it alone. On the CPU, for a weight on meta, it goes with any device.
        weight = self.weight
        self._scaling = float(value)
        with torch.inference_mode(False):  # compiled code saves it for backward
            self._scaling_tensor = torch.full(
                (),
                self._scaling,
                dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
                device="cpu" if weight.is_meta else weight.device,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRAWeightLayer:
        super()._apply(fn, recurse)
        self.scaling = self._scaling  # its tensor follows the weight to another device
        return self

    @property
    def _scaling_now(self) -> float | Tensor:
        """What forward computes with: the number, in compiled code the tensor."""
        return self._scaling_tensor if torch.compiler.is_compiling() else self._scaling


class LoRALinear(LoRAWeightLayer):
    """A frozen linear with a trainable low-rank update.

    ``y = x weight^T + bias + scaling * dropout(x) lora_A^T lora_B^T``

    ``weight`` and ``bias`` are the very Parameters of ``base``: nothing is copied, a tied weight
    stays tied, and both are frozen here. The state dict has loralib's keys ``weight``, ``bias``,
    ``lora_A`` and ``lora_B``. ``lora_B`` starts at zero, so that a new layer computes what
    ``base`` does.

    Shapes: x ``(..., in_features)``, y ``(..., out_features)``, weight
    ``(out_features, in_features)``, bias ``(out_features,)`` or None, lora_A
    ``(r, in_features)``, lora_B ``(out_features, r)``.

    Args:
        base: The linear to adapt. It may live on any device, ``meta`` included.
        r: The rank, 1 to 256.
        lora_alpha: ``scaling`` is ``lora_alpha / r``, with rsLoRA ``lora_alpha / sqrt(r)``.
        lora_dropout: Probability in [0, 1] of dropping an element of x on the LoRA branch in
            training mode.
        use_rslora: Divide by ``sqrt(r)`` instead of ``r``.
        init_lora_weights: How ``lora_A`` starts: ``"kaiming"`` (uniform with a = sqrt(5), as in
            loralib and PEFT) or ``"gaussian"`` (standard deviation 1/r).
        adapter_dtype: dtype of ``lora_A`` and ``lora_B``; None means the dtype of ``base``.
        merge_weights: Merge in ``eval()`` and unmerge in ``train()``, as loralib's layers do.

    Raises:
        TypeError: ``base`` is no plain ``nn.Linear`` or an argument has the wrong type.
        ValueError: An argument is out of range, or ``base.weight`` is not fp16, bf16, fp32 or fp64.

    Example:
        >>> import torch
        >>> from fastlora import LoRALinear
        >>> base = torch.nn.Linear(64, 32)
        >>> layer = LoRALinear(base, r=8, lora_alpha=16, lora_dropout=0.1)
        >>> x = torch.randn(4, 10, 64)
        >>> layer(x).shape
        torch.Size([4, 10, 32])
        >>> torch.allclose(layer(x), base(x), atol=1e-5)
        True
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['lora_A', 'lora_B']
    """

    bias: nn.Parameter | None
    peft_names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}  # noqa: RUF012 - constant

    def __init__(
        self,
        base: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: str = "kaiming",
        *,
        adapter_dtype: torch.dtype | None = None,
        merge_weights: bool = False,
    ) -> None:
        """Freeze ``base`` and make an adapter beside it."""
        super().__init__()
        check_lora_options(
            r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype
        )
        problem = base_problem(base)
        if problem is not None:
            raise problem
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.r = r
        self.lora_alpha = lora_alpha if isinstance(lora_alpha, int) else float(lora_alpha)
        self.lora_dropout = float(lora_dropout)
        self.use_rslora = use_rslora
        self.init_lora_weights = init_lora_weights

        weight = cast(nn.Parameter, base.weight)
        dtype = weight.dtype if adapter_dtype is None else adapter_dtype
        lora_a = torch.empty((r, self.in_features), dtype=dtype, device=weight.device)
        lora_b = torch.empty((self.out_features, r), dtype=dtype, device=weight.device)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", base.bias)
        self.register_parameter("lora_A", nn.Parameter(lora_a))
        self.register_parameter("lora_B", nn.Parameter(lora_b))
        self.scaling = lora_scaling(r, self.lora_alpha, use_rslora)
        self.reset_lora_parameters()
        self._init_merging(merge_weights, base.training)
        weight.requires_grad_(False)
        if base.bias is not None:
            base.bias.requires_grad_(False)

    def reset_lora_parameters(self) -> None:
        """Draw ``lora_A`` anew and set ``lora_B`` to zero; the frozen linear stays as it is."""
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer; dropout acts in training mode only. Merged, it is the plain linear."""
        if self._frozen is not None:
            if self.training:
                self._refuse_training_while_merged()
            return F.linear(x, self.weight, self.bias)
        return lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            bias=self.bias,
            scaling=self._scaling_now,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def _products(self, source: Tensor, target: Tensor) -> list[Product]:
        lora_a, lora_b = parameter_of(self, "lora_A"), parameter_of(self, "lora_B")
        return [Product(source, target, lora_a, lora_b, float(self.scaling))]

    def extra_repr(self) -> str:
        """Show the sizes and the LoRA settings in ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}, use_rslora={self.use_rslora}"
        )


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def base_problem(base: object) -> TypeError | ValueError | None:
    """Return the error that says why ``base`` cannot be adapted, or None when it can."""
    problem = layer_problem(base, nn.Linear, ("weight", "bias"))
    if problem is not None or not isinstance(base, nn.Linear):
        return problem
    expected = (base.out_features, base.in_features)
    if tuple(base.weight.shape) != expected:
        return ValueError(
            f"base.weight must be (out_features, in_features)={expected}, "
            f"got {tuple(base.weight.shape)}"
        )
    return None


def layer_problem(
    base: object, kind: type[nn.Module], parameters: tuple[str, ...]
) -> TypeError | ValueError | None:
    """Return the error that says why ``base`` is no plain ``kind`` of float weights, or None."""
    if not isinstance(base, kind):
        return TypeError(f"base must be a torch.nn.{kind.__name__}, got {type(base).__name__}")
    if type(base).forward is not kind.forward or "forward" in vars(base):
        return TypeError(
            f"base must compute torch.nn.{kind.__name__}'s own forward, got a "
            f"{type(base).__name__} with another forward"
        )
    for name in parameters:
        parameter = getattr(base, name)
        if name == "bias" and parameter is None:
            continue
        # Quantised and sharded weights come as tensor subclasses, which raw access would misread.
        if type(parameter) is not nn.Parameter:
            return TypeError(
                f"base.{name} must be a plain nn.Parameter, got {type(parameter).__name__}; "
                "adapt a model before it is sharded or quantised"
            )
        if parameter.dtype not in FLOAT_DTYPES:
            return ValueError(
                f"base.{name} must be float16, bfloat16, float32 or float64, got {parameter.dtype}"
            )
    return None


def check_lora_options(
    r: object,
    lora_alpha: object,
    lora_dropout: object,
    use_rslora: object,
    init_lora_weights: object,
    adapter_dtype: object,
) -> None:
    """Raise a TypeError or ValueError that names the first option that is wrong."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an int from 1 to {MAX_RANK}, got {r!r}")
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"r must be from 1 to {MAX_RANK}, got {r}")
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    # Real has no order of its own for type checkers; float() also turns numpy numbers plain.
    alpha, dropout = float(lora_alpha), float(lora_dropout)  # type: ignore[arg-type]
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"lora_alpha must be a finite number above 0, got {lora_alpha}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"lora_dropout must be a probability in [0, 1], got {lora_dropout}")
    if not isinstance(use_rslora, bool):
        raise TypeError(f"use_rslora must be a bool, got {use_rslora!r}")
    if init_lora_weights not in INITS:
        raise ValueError(
            f"init_lora_weights must be one of {', '.join(map(repr, INITS))}, "
            f"got {init_lora_weights!r}"
        )
    if adapter_dtype is not None and adapter_dtype not in FLOAT_DTYPES:
        raise ValueError(
            "adapter_dtype must be None, float16, bfloat16, float32 or float64, "
            f"got {adapter_dtype!r}"
        )
