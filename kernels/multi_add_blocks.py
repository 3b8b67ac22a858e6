"""``y += s B[id]^T`` for rows of which several share an adapter; cuBLAS makes the frozen product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    block_of_rows,
    dot,
    dot_precision,
    has_pdl,
    multiple,
    rank_of,
    strides,
    wait_for_previous_kernel,
)
from .config import cdiv, vector
from .config_multi import FEW_BLOCK_M, multi_add_blocks_config
from .launch import Launch, cached_plan
from .multi_add import load_b, sum_of_parts


@triton.jit
def _lora_multi_add_blocks_kernel(
    y_ptr, s_ptr, b_ptr, order_ptr, sorted_ids_ptr, starts_ptr, ranks_ptr,
    M, N, R, stride_sp, stride_sm, stride_bl, stride_bn, stride_br,
    S_PARTS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
    R_VECTOR: tl.constexpr, BN_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``y[m] += s[m] B[l]^T`` for at most BLOCK_M rows that share adapter l, as ``B s^T``: see below.

    Grid: ``(blocks of rows, blocks of columns)``; blocks that are not used end at once. A tile of a tensor
    core has 16 rows and 8 columns at least: with B on the left, 8 rows of y fill it, and a block that has
    fewer rows pads less. B is on its way before s, and y, are waited for.
    """
    R, stride_bn = multiple(R, R_VECTOR), multiple(stride_bn, BN_VECTOR)
    start = tl.load(starts_ptr + tl.program_id(0))
    if start < M:
        slot = tl.load(sorted_ids_ptr + start).to(tl.int64)
        here, offs_m = block_of_rows(order_ptr, sorted_ids_ptr, start, slot, M, BLOCK_M)
        rank = rank_of(ranks_ptr, slot, R)
        offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_ptrs = b_ptr + slot * stride_bl + offs_n * stride_bn
        b = load_b(b_ptrs, offs_n, 0, rank, N, R, stride_br, "", BLOCK_R)
        wait_for_previous_kernel(EARLY)
        y_ptrs = y_ptr + offs_m[None, :] * N + offs_n[:, None]
        inside = here[None, :] & (offs_n < N)[:, None]
        y = tl.load(y_ptrs, mask=inside, other=0.0)  # [BLOCK_N, BLOCK_M]
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        # Not pipelined: some Tritons make a wgmma of it, which may not read b, changed in registers, there.
        for r in tl.range(0, rank, BLOCK_R, num_stages=1):
            if r > 0:
                b = load_b(b_ptrs, offs_n, r, rank, N, R, stride_br, "", BLOCK_R)
            offs_r = r + tl.arange(0, BLOCK_R)
            s_ptrs = s_ptr + offs_m[None, :] * stride_sm + offs_r[:, None]
            mask = here[None, :] & (offs_r < rank)[:, None]
            s = sum_of_parts(s_ptrs, mask, stride_sp, S_PARTS)  # [BLOCK_R, BLOCK_M]
            # What is there past the rank is from an adapter before.
            held = tl.where((offs_r < rank)[None, :], b, 0.0)
            acc = dot(held.to(y.dtype), s.to(y.dtype), acc, PRECISION)  # [BLOCK_N, BLOCK_M]
        acc += y.to(tl.float32)
        tl.store(y_ptrs, acc.to(y.dtype), mask=inside)
    elif tl.program_id(0) + tl.program_id(1) == 0:  # no row has an adapter
        wait_for_previous_kernel(EARLY)  # what follows waits for this kernel alone


@cached_plan
def _plan(
    blocks: int,
    s_shape: tuple[int, ...],
    s_stride: tuple[int, ...],
    s_dtype: torch.dtype,
    b_shape: tuple[int, ...],
    b_stride: tuple[int, ...],
    b_dtype: torch.dtype,
    y_dtype: torch.dtype,
    device: torch.device,
    has_ranks: bool,
    precision: str,
    early: bool,
) -> Launch:
    (parts, M, R), N = s_shape, b_shape[1]
    block_n, block_r = multi_add_blocks_config(R, b_dtype.itemsize)
    b_strides, early = strides(b_shape, b_stride), early and has_pdl(device)
    return Launch(
        _lora_multi_add_blocks_kernel, (blocks, cdiv(N, block_n)), device,
        M, N, R, *s_stride[:2], *b_strides,
        fixed=True, S_PARTS=parts, PRECISION=precision, EARLY=early, launch_pdl=early,
        R_VECTOR=vector(R), BN_VECTOR=vector(b_strides[1]),
        BLOCK_M=FEW_BLOCK_M, BLOCK_N=block_n, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip


def lora_multi_add_blocks(
    y: Tensor,
    s: Tensor,
    lora_B: Tensor,
    ranks: Tensor | None,
    routing: tuple[Tensor, Tensor, Tensor],
    early: bool = False,
) -> Tensor:
    """``y += s B[l]^T`` in place as `lora_multi_add`, by blocks of rows: B is read once a block.

    Args:
        y (Tensor): ``[M, N]``, dense, as `frozen_linear` gives it; s and B are cast to its dtype.
        s (Tensor): ``[parts, M, R]``, rows dense, of `lora_multi_shrink` or its kin.
        lora_B (Tensor): ``[L, N, R]``, any strides.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        routing (tuple): ``order [M]``, ``sorted_ids [M]``, -1 for rows without an adapter, and the starts
            of blocks of `FEW_BLOCK_M` rows.
        early (bool): as `lora_multi_add` takes it. Default: ``False``.

    Returns:
        Tensor: y. Sums go in a fixed order: bit-identical from run to run.
    """
    launch = _plan(
        routing[2].shape[0], s.shape, s.stride(), s.dtype, lora_B.shape, lora_B.stride(), lora_B.dtype,
        y.dtype, s.device, ranks is not None, dot_precision(y.dtype), early,
    )  # fmt: skip
    launch(y, s, lora_B, *routing, ranks)
    return y
