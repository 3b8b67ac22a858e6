"""The last step of the split reductions: sum fp32 partials in a fixed order, so runs are bit-identical."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import has_pdl, let_next_kernel_start, load_scaling
from .config import cdiv, next_power_of_2
from .launch import Launch, cached_plan


@triton.jit
def _sum_block(
    parts_ptr, out_ptr, block, factor, size, splits,
    BLOCK_J: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[i] = factor * sum_j parts[j, i]`` for one block of i, BLOCK_J of the j at once."""
    offs = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_j = tl.arange(0, BLOCK_J).to(tl.int64)
    acc = tl.zeros((BLOCK_J, BLOCK), dtype=tl.float32)
    for j in range(0, splits, BLOCK_J):
        acc += tl.load(
            parts_ptr + (j + offs_j)[:, None] * size + offs[None, :],
            mask=(j + offs_j[:, None] < splits) & (offs[None, :] < size),
            other=0.0,
        )  # [BLOCK_J, BLOCK]
    total = tl.sum(acc, 0) * factor
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _sum_splits_kernel(
    parts_ptr, out_ptr, other_parts_ptr, other_out_ptr, scaling, factor,
    size, splits, other_size, other_splits,
    SCALING_IS_TENSOR: tl.constexpr, HAS_OTHER: tl.constexpr, PDL: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum one stack of partials, with a factor, and another one without. Grid: their blocks in turn."""
    let_next_kernel_start(PDL)
    block, blocks = tl.program_id(0), tl.cdiv(size, BLOCK)
    if HAS_OTHER:  # noqa: SIM102 - decided when compiling, so it stands alone
        if block >= blocks:
            _sum_block(
                other_parts_ptr, other_out_ptr, block - blocks, 1.0, other_size, other_splits,
                BLOCK_J, BLOCK,
            )  # fmt: skip
    if block < blocks:
        factor *= load_scaling(scaling, SCALING_IS_TENSOR)
        _sum_block(parts_ptr, out_ptr, block, factor, size, splits, BLOCK_J, BLOCK)


@cached_plan
def _plan(
    size: int,
    splits: int,
    other_size: int,
    other_splits: int,
    scaling_is_tensor: bool,
    device: torch.device,
) -> Launch:
    # Many splits are summed side by side: one by one, each would wait for its own load.
    block_j = min(32, next_power_of_2(max(splits, other_splits)))
    block = min(256, 2048 // block_j)
    return Launch(
        _sum_splits_kernel, (cdiv(size, block) + cdiv(other_size, block),), device,
        size, splits, other_size, other_splits,
        SCALING_IS_TENSOR=scaling_is_tensor, HAS_OTHER=other_size > 0,
        PDL=has_pdl(device), BLOCK_J=block_j, BLOCK=block, num_warps=4,
    )  # fmt: skip


def sum_splits(
    parts: Tensor,
    out: Tensor,
    scaling: float | Tensor = 1.0,
    factor: float = 1.0,
    other: tuple[Tensor, Tensor] | None = None,
) -> None:
    """``out = scaling * factor * parts.sum(0)``, in fp32, rounded once; row padding is summed with it.

    Args:
        parts (Tensor): fp32 ``[splits, ...]``, contiguous.
        out (Tensor): laid out as ``parts[0]``, written in its own dtype.
        scaling (float | Tensor): a float, or a 0-dim tensor on the device. Default: 1.0.
        factor (float): one more factor. Default: 1.0.
        other (tuple[Tensor, Tensor] | None): another ``(parts, out)``, summed without a factor in the
            same launch. Default: ``None``.
    """
    splits = parts.shape[0]
    other_parts, other_out = (None, None) if other is None else other
    other_splits = 1 if other_parts is None else other_parts.shape[0]
    other_size = 0 if other_parts is None else other_parts.numel() // other_splits
    launch = _plan(
        parts.numel() // splits, splits, other_size, other_splits,
        isinstance(scaling, Tensor), out.device,
    )  # fmt: skip
    launch(parts, out, other_parts, other_out, scaling, float(factor))
