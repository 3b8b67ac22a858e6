"""``s = scaling * x A[id]^T`` for few rows, by blocks that share an adapter, in parts of K."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    block_of_rows,
    dot,
    dot_precision,
    empty_rows,
    has_pdl,
    let_next_kernel_start,
    padded_columns,
    rank_of,
    strides,
    wait_for_previous_kernel,
)
from .config import cdiv
from .config_multi import multi_shrink_blocks_config
from .launch import Launch, cached_plan


@triton.jit
def _lora_multi_shrink_blocks_kernel(
    x_ptr, a_ptr, s_ptr, order_ptr, sorted_ids_ptr, starts_ptr, scaling_ptr, ranks_ptr,
    M, K, R, split_k, stride_xm, stride_xk, stride_al, stride_ar, stride_ak, stride_sp, stride_sm,
    PRECISION: tl.constexpr, EARLY: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``s[p, m, r] = scaling[l] * sum_k x[m, k] A[l, r, k]`` over the p-th part of K, as ``A x^T``.

    Grid: ``(blocks of rows, blocks of ranks, parts of K)``; blocks that are not used, and ranks past the
    adapter's own, end at once. A is on the left, as B is in `lora_multi_add_blocks`. Each warp sums a slice
    of K: one product of all of K would be a chain of dependent steps that every warp repeats.
    """
    wait_for_previous_kernel(EARLY)
    let_next_kernel_start(EARLY)
    start = tl.load(starts_ptr + tl.program_id(0))
    if start < M:
        slot = tl.load(sorted_ids_ptr + start).to(tl.int64)
        here, offs_m = block_of_rows(order_ptr, sorted_ids_ptr, start, slot, M, BLOCK_M)
        rank = rank_of(ranks_ptr, slot, R)
        if tl.program_id(1) * BLOCK_R < rank:
            scale = tl.load(scaling_ptr + slot)
            offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
            first_k = tl.program_id(2) * split_k
            end_k = tl.minimum(first_k + split_k, K)
            offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
            slices = (tl.arange(0, SLICES) * BLOCK_K)[:, None, None]
            a_ptrs = a_ptr + slot * stride_al + offs_r[None, :, None].to(tl.int64) * stride_ar
            x_ptrs = x_ptr + offs_m[None, None, :] * stride_xm
            acc = tl.zeros((SLICES, BLOCK_R, BLOCK_M), dtype=tl.float32)
            for k in range(first_k, end_k, SLICES * BLOCK_K):
                k_a = k + slices + offs_k[None, None, :]
                a = tl.load(
                    a_ptrs + k_a * stride_ak,
                    mask=(offs_r < rank)[None, :, None] & (k_a < end_k),
                    other=0.0,
                )  # [SLICES, BLOCK_R, BLOCK_K]
                k_x = k + slices + offs_k[None, :, None]
                x = tl.load(
                    x_ptrs + k_x * stride_xk, mask=here[None, None, :] & (k_x < end_k), other=0.0
                )  # [SLICES, BLOCK_K, BLOCK_M]
                acc = dot(a.to(x.dtype), x, acc, PRECISION)  # [SLICES, BLOCK_R, BLOCK_M]
            s = tl.sum(acc, axis=0) * scale  # [BLOCK_R, BLOCK_M]
            part = s_ptr + tl.program_id(2).to(tl.int64) * stride_sp
            tl.store(
                part + offs_m[None, :] * stride_sm + offs_r[:, None],
                s,
                mask=here[None, :] & (offs_r < rank)[:, None],
            )


@cached_plan
def _plan(
    blocks: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    a_shape: tuple[int, ...],
    a_stride: tuple[int, ...],
    a_dtype: torch.dtype,
    device: torch.device,
    has_ranks: bool,
    precision: str,
    early: bool,
) -> tuple[int, Launch]:
    """Parts of K, and the launch."""
    (M, K), R = shape, a_shape[1]
    c, parts = multi_shrink_blocks_config(M, K, R, dtype.itemsize, a_dtype.itemsize)
    step = c.num_warps * c.BLOCK_K
    split_k = cdiv(cdiv(K, parts), step) * step
    parts, stride_sm = max(1, cdiv(K, split_k)), padded_columns(R, 4)
    early = early and has_pdl(device)
    return parts, Launch(
        _lora_multi_shrink_blocks_kernel, (blocks, cdiv(R, c.BLOCK_N), parts), device,
        M, K, R, split_k, *strides(shape, stride), *strides(a_shape, a_stride), M * stride_sm, stride_sm,
        fixed=True, PRECISION=precision, EARLY=early, launch_pdl=early, SLICES=c.num_warps,
        BLOCK_M=c.BLOCK_M, BLOCK_K=c.BLOCK_K, BLOCK_R=c.BLOCK_N,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_multi_shrink_blocks(
    x: Tensor,
    lora_A: Tensor,
    scaling: Tensor,
    ranks: Tensor | None,
    routing: tuple[Tensor, Tensor, Tensor],
    early: bool = False,
) -> Tensor:
    """``s = scaling[l] * x A[l]^T`` in parts of K; l is each row's adapter.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        lora_A (Tensor): ``[L, R, K]``, any strides, cast to the dtype of x for the product.
        scaling (Tensor): fp32 ``[L]``.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        routing (tuple): ``order [M]``, ``sorted_ids [M]``, -1 for rows without an adapter, and the starts
            of blocks of `FEW_BLOCK_M` rows.
        early (bool): as `lora_multi_shrink` takes it. Default: ``False``.

    Returns:
        Tensor: fp32 ``[parts, M, R]``, rows padded to 16 bytes, for the consumer to add. Rows without an
        adapter and ranks past a row's own are left unwritten: no consumer reads them.
    """
    M, R = x.shape[0], lora_A.shape[1]
    parts, launch = _plan(
        routing[2].shape[0], x.shape, x.stride(), x.dtype, lora_A.shape, lora_A.stride(), lora_A.dtype,
        x.device, ranks is not None, dot_precision(x.dtype), early,
    )  # fmt: skip
    s = empty_rows(parts * M, R, torch.float32, x.device)
    launch(x, lora_A, s, *routing, scaling, ranks)
    return s.view(parts, M, R)
