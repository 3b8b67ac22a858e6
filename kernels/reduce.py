"""The last step of the split reductions: sum fp32 partials in a fixed order, so runs are bit-identical."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import has_pdl, let_next_kernel_start, load_scaling
from .config import cdiv
from .launch import launch


@triton.jit
def _sum_splits_kernel(
    parts_ptr, out_ptr, scaling, factor, size, splits,
    SCALING_IS_TENSOR: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[i] = scaling * factor * sum_j parts[j, i]``. Grid: ``cdiv(size, BLOCK)``."""
    let_next_kernel_start(PDL)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(0, splits):
        part = tl.cast(j, tl.int64) * size
        acc += tl.load(parts_ptr + part + offs, mask=offs < size, other=0.0)
    acc *= load_scaling(scaling, SCALING_IS_TENSOR) * factor
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < size)


def sum_splits(
    parts: Tensor, out: Tensor, scaling: float | Tensor = 1.0, factor: float = 1.0
) -> None:
    """``out = scaling * factor * parts.sum(0)``, in fp32, rounded once; row padding is summed with it.

    Args:
        parts (Tensor): fp32 ``[splits, ...]``, contiguous.
        out (Tensor): laid out as ``parts[0]``, written in its own dtype.
        scaling (float | Tensor): a float, or a 0-dim tensor on the device. Default: 1.0.
        factor (float): one more factor. Default: 1.0.
    """
    size, block = parts[0].numel(), 256
    launch(
        _sum_splits_kernel, (cdiv(size, block),), out.device,
        parts, out, scaling, float(factor), size, parts.shape[0],
        SCALING_IS_TENSOR=isinstance(scaling, Tensor), BLOCK=block, num_warps=4,
        PDL=has_pdl(out.device),
    )  # fmt: skip
