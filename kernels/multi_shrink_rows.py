"""``s = scaling * x A[id]^T`` for few rows, each of which reads its own adapter's A."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    empty_rows,
    has_pdl,
    let_next_kernel_start,
    padded_columns,
    rank_of,
    strides,
    wait_for_previous_kernel,
)
from .config import cdiv
from .config_multi import multi_shrink_rows_config
from .launch import Launch, cached_plan


@triton.jit
def _lora_multi_shrink_rows_kernel(
    x_ptr, a_ptr, s_ptr, order_ptr, sorted_ids_ptr, scaling_ptr, ranks_ptr, M, K, R, split_k,
    stride_xm, stride_xk, stride_al, stride_ar, stride_ak, stride_sp, stride_sm,
    EARLY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``s[p, m, r] = scaling[l] * sum_k x[m, k] A[l, r, k]`` over the p-th part of K, l the row's adapter.

    Grid: ``(rows, blocks of ranks, parts of K)``. Without tensor cores: the work is that of reading A, once
    a row. A does not stay in L2, where it would take the place of W; rows of one adapter come together.
    """
    wait_for_previous_kernel(EARLY)
    let_next_kernel_start(EARLY)
    m = tl.load(order_ptr + tl.program_id(0)).to(tl.int64)
    slot = tl.load(sorted_ids_ptr + tl.program_id(0)).to(tl.int64)
    if slot >= 0:
        rank = rank_of(ranks_ptr, slot, R)
        offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        if tl.program_id(1) * BLOCK_R < rank:
            offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
            first_k = tl.program_id(2) * split_k
            rows = a_ptr + slot * stride_al + offs_r[:, None].to(tl.int64) * stride_ar
            acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
            for k in range(first_k, min(first_k + split_k, K), BLOCK_K):
                inside = k + offs_k < K
                x = tl.load(
                    x_ptr + m * stride_xm + (k + offs_k) * stride_xk, mask=inside, other=0.0
                )  # [BLOCK_K]
                a = tl.load(
                    rows + (k + offs_k)[None, :] * stride_ak,
                    mask=(offs_r[:, None] < rank) & inside[None, :],
                    other=0.0,
                    eviction_policy="evict_first",
                )  # [BLOCK_R, BLOCK_K]
                acc += a.to(tl.float32) * x.to(tl.float32)[None, :]
            tl.store(
                s_ptr + tl.program_id(2).to(tl.int64) * stride_sp + m * stride_sm + offs_r,
                tl.sum(acc, axis=1) * tl.load(scaling_ptr + slot),
                mask=offs_r < rank,
            )


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    a_shape: tuple[int, ...],
    a_stride: tuple[int, ...],
    a_dtype: torch.dtype,
    device: torch.device,
    has_ranks: bool,
    early: bool,
) -> tuple[int, Launch]:
    """Parts of K, and the launch."""
    (M, K), R = shape, a_shape[1]
    block_r, block_k, parts = multi_shrink_rows_config(K, R, a_dtype.itemsize)
    split_k = cdiv(cdiv(K, parts), block_k) * block_k
    parts, stride_sm = max(1, cdiv(K, split_k)), padded_columns(R, 4)
    early = early and has_pdl(device)
    return parts, Launch(
        _lora_multi_shrink_rows_kernel, (M, cdiv(R, block_r), parts), device,
        M, K, R, split_k, *strides(shape, stride), *strides(a_shape, a_stride), M * stride_sm, stride_sm,
        fixed=True, EARLY=early, launch_pdl=early, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip


def lora_multi_shrink_rows(
    x: Tensor,
    lora_A: Tensor,
    scaling: Tensor,
    ranks: Tensor | None,
    routing: tuple[Tensor, Tensor],
    early: bool = False,
) -> Tensor:
    """``s = scaling[l] * x A[l]^T`` in parts of K; l is each row's adapter.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        lora_A (Tensor): ``[L, R, K]``, any strides.
        scaling (Tensor): fp32 ``[L]``.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        routing (tuple): ``order [M]`` and ``sorted_ids [M]``, -1 for rows without an adapter.
        early (bool): as `lora_multi_shrink` takes it. Default: ``False``.

    Returns:
        Tensor: fp32 ``[parts, M, R]``, rows padded to 16 bytes, for the consumer to add. Rows without an
        adapter and ranks past a row's own are left unwritten: no consumer reads them.
    """
    M, R = x.shape[0], lora_A.shape[1]
    parts, launch = _plan(
        x.shape, x.stride(), x.dtype, lora_A.shape, lora_A.stride(), lora_A.dtype, x.device,
        ranks is not None, early,
    )  # fmt: skip
    s = empty_rows(parts * M, R, torch.float32, x.device)
    launch(x, lora_A, s, *routing, scaling, ranks)
    return s.view(parts, M, R)
