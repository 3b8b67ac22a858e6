"""The shrink kernel as a `torch.library` op, for the mask of a compiled DoRA: see `fastlora.ops`.

The mask is a constant to autograd, so the op has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.kernels.common import empty_rows
from fastlora.kernels.lora_shrink import lora_shrink
from fastlora.ops import fake_mask, or_empty


@torch.library.custom_op(
    "fastlora::lora_shrink",
    mutates_args=(),
    schema="(Tensor x, Tensor lora_A, float dropout_p, Tensor? seed) -> (Tensor, Tensor)",
)
def shrink_op(
    x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``dropout(x) A^T`` and the packed keep mask, empty where there is none."""
    s, mask = lora_shrink(x, lora_A, 1.0, dropout_p, seed)
    return s, or_empty(mask, x, torch.uint8)


@shrink_op.register_fake
def _(x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_rows(x.shape[0], lora_A.shape[0], x.dtype, x.device), fake_mask(x, dropout_p)


def shrink(
    x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`lora_shrink` without a scaling, as the op where code is compiled.

    Args:
        x (Tensor): ``[M, K]``.
        lora_A (Tensor): ``[R, K]``.
        dropout_p (float): probability of dropping an element of x. Default: 0.0.
        seed (Tensor | None): 0-dim int64 on x's device; needed with dropout. Default: ``None``.

    Returns:
        tuple: s ``[M, R]`` and the mask, as `lora_shrink` gives them.
    """
    if not torch.compiler.is_compiling():
        return lora_shrink(x, lora_A, 1.0, dropout_p, seed)
    s, mask = shrink_op(x, lora_A, dropout_p, seed)
    return s, mask if mask.numel() else None
