"""Convolutions with LoRA, by loralib's formula, eagerly."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastlora import reference
from fastlora.merging import LoRALayer
from fastlora.modules import check_lora_options, layer_problem, lora_scaling


class _LoRAConv(LoRALayer):
    """What the three convolutions share.

    Of a kernel's d dimensions ``d // 2`` go to the rows of lora_B and the others to the columns of
    lora_A, so that their product has as many elements as the weight. For 2-D these are loralib's
    shapes. Its 1-D and 3-D layers have those of 2-D too, which fit k = 1 alone and fail in forward
    otherwise.
    """

    kind: ClassVar[type[Any]]

    def __init__(
        self,
        base: nn.Module,
        r: int,
        lora_alpha: float = 1,
        *,
        adapter_dtype: torch.dtype | None = None,
        merge_weights: bool = False,
    ) -> None:
        """Freeze ``base`` and make an adapter beside it."""
        super().__init__()
        check_lora_options(r, lora_alpha, 0.0, False, "kaiming", adapter_dtype)
        problem = layer_problem(base, self.kind, ("weight", "bias"))
        if problem is not None:
            raise problem
        conv = cast(nn.Conv2d, base)  # one of the three, which have the same attributes
        k = conv.kernel_size[0]
        if any(size != k for size in conv.kernel_size):
            raise ValueError(
                f"base.kernel_size must be the same in each dimension, got {conv.kernel_size}"
            )
        self.r = r
        self.lora_alpha = lora_alpha if isinstance(lora_alpha, int) else float(lora_alpha)
        self.scaling = lora_scaling(r, self.lora_alpha, False)
        dims = len(conv.kernel_size)
        left = dims // 2
        dtype = conv.weight.dtype if adapter_dtype is None else adapter_dtype
        device = conv.weight.device
        rows = conv.out_channels // conv.groups * k**left
        columns = conv.in_channels * k ** (dims - left)
        lora_a = torch.empty((r * k, columns), dtype=dtype, device=device)
        lora_b = torch.empty((rows, r * k), dtype=dtype, device=device)
        self.conv = conv
        self.register_parameter("lora_A", nn.Parameter(lora_a))
        self.register_parameter("lora_B", nn.Parameter(lora_b))
        self.reset_lora_parameters()
        self._init_merging(merge_weights, base.training)
        conv.weight.requires_grad_(False)
        if conv.bias is not None:
            conv.bias.requires_grad_(False)

    def reset_lora_parameters(self) -> None:
        """Draw ``lora_A`` anew and set ``lora_B`` to zero; the frozen convolution stays as it is."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer. Merged, it is the plain convolution."""
        if self._frozen is not None:
            if self.training:
                self._refuse_training_while_merged()
            return self.conv(x)  # type: ignore[no-any-return]
        # The seam for a kernel: a function of x, conv, lora_A and lora_B in place of these two.
        weight = reference.lora_conv_weight(
            self.conv.weight, self.lora_A, self.lora_B, self.scaling
        )
        y: Tensor = self.conv._conv_forward(x, weight, self.conv.bias)
        return y

    def _weight_holder(self) -> nn.Module:
        return self.conv

    def _weight_name(self) -> str:
        return "conv.weight"

    def _write_merged(self, source: Tensor, target: Tensor) -> None:
        target.copy_(
            reference.lora_conv_weight(source, self.lora_A, self.lora_B, float(self.scaling))
        )

    def extra_repr(self) -> str:
        """Show the LoRA settings in ``repr``; the convolution shows its own."""
        return f"r={self.r}, lora_alpha={self.lora_alpha}"


class LoRAConv1d(_LoRAConv):
    """A frozen 1-D convolution whose kernel gets a low-rank update, by loralib's formula.

    ``y = conv(x, weight + scaling * (lora_B lora_A), bias)``, the product viewed as a kernel

    For a kernel of k, lora_A is ``(r k, in_channels k)`` and lora_B ``(out_channels / groups, r k)``.
    The state dict has ``conv.weight``, ``conv.bias``, ``lora_A`` and ``lora_B``.

    Args:
        base: The ``nn.Conv1d`` to adapt; it becomes the child ``conv``, and is frozen.
        r: The rank, 1 to 256; the product has rank ``r k`` at most.
        lora_alpha: ``scaling`` is ``lora_alpha / r``.
        adapter_dtype: dtype of ``lora_A`` and ``lora_B``; None means the dtype of ``base``.
        merge_weights: Merge in ``eval()`` and unmerge in ``train()``, as loralib's layers do.

    Raises:
        TypeError: ``base`` is no plain ``nn.Conv1d``, or an argument has the wrong type.
        ValueError: An argument is out of range, the kernel is not as large in each dimension, or
            ``base.weight`` is not fp16, bf16, fp32 or fp64.

    Example:
        >>> import torch
        >>> from fastlora import LoRAConv1d
        >>> base = torch.nn.Conv1d(4, 6, 3)
        >>> layer = LoRAConv1d(base, r=2, lora_alpha=4)
        >>> x = torch.randn(1, 4, 9)
        >>> torch.allclose(layer(x), base(x), atol=1e-5)
        True
    """

    kind = nn.Conv1d


class LoRAConv2d(_LoRAConv):
    """A frozen 2-D convolution whose kernel gets a low-rank update, by loralib's formula.

    ``y = conv(x, weight + scaling * (lora_B lora_A), bias)``, the product viewed as a kernel

    For a kernel of k, lora_A is ``(r k, in_channels k)`` and lora_B ``(out_channels / groups k, r k)``,
    as in loralib. The state dict has ``conv.weight``, ``conv.bias``, ``lora_A`` and ``lora_B``.

    Args:
        base: The ``nn.Conv2d`` to adapt; it becomes the child ``conv``, and is frozen.
        r: The rank, 1 to 256; the product has rank ``r k`` at most.
        lora_alpha: ``scaling`` is ``lora_alpha / r``.
        adapter_dtype: dtype of ``lora_A`` and ``lora_B``; None means the dtype of ``base``.
        merge_weights: Merge in ``eval()`` and unmerge in ``train()``, as loralib's layers do.

    Raises:
        TypeError: ``base`` is no plain ``nn.Conv2d``, or an argument has the wrong type.
        ValueError: An argument is out of range, the kernel is not as large in each dimension, or
            ``base.weight`` is not fp16, bf16, fp32 or fp64.

    Example:
        >>> import torch
        >>> from fastlora import LoRAConv2d
        >>> base = torch.nn.Conv2d(4, 6, 3)
        >>> layer = LoRAConv2d(base, r=2, lora_alpha=4)
        >>> x = torch.randn(1, 4, 9, 9)
        >>> torch.allclose(layer(x), base(x), atol=1e-5)
        True
    """

    kind = nn.Conv2d


class LoRAConv3d(_LoRAConv):
    """A frozen 3-D convolution whose kernel gets a low-rank update, by loralib's formula.

    ``y = conv(x, weight + scaling * (lora_B lora_A), bias)``, the product viewed as a kernel

    For a kernel of k, lora_A is ``(r k, in_channels k^2)`` and lora_B ``(out_channels / groups k, r k)``.
    The state dict has ``conv.weight``, ``conv.bias``, ``lora_A`` and ``lora_B``.

    Args:
        base: The ``nn.Conv3d`` to adapt; it becomes the child ``conv``, and is frozen.
        r: The rank, 1 to 256; the product has rank ``r k`` at most.
        lora_alpha: ``scaling`` is ``lora_alpha / r``.
        adapter_dtype: dtype of ``lora_A`` and ``lora_B``; None means the dtype of ``base``.
        merge_weights: Merge in ``eval()`` and unmerge in ``train()``, as loralib's layers do.

    Raises:
        TypeError: ``base`` is no plain ``nn.Conv3d``, or an argument has the wrong type.
        ValueError: An argument is out of range, the kernel is not as large in each dimension, or
            ``base.weight`` is not fp16, bf16, fp32 or fp64.

    Example:
        >>> import torch
        >>> from fastlora import LoRAConv3d
        >>> base = torch.nn.Conv3d(4, 6, 3)
        >>> layer = LoRAConv3d(base, r=2, lora_alpha=4)
        >>> x = torch.randn(1, 4, 5, 5, 5)
        >>> torch.allclose(layer(x), base(x), atol=1e-5)
        True
    """

    kind = nn.Conv3d
