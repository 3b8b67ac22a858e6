"""``y += s B[id]^T`` for few rows, whose frozen product cuBLAS makes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import has_pdl, multiple, rank_of, strides, wait_for_previous_kernel
from .config import cdiv, vector
from .config_multi import multi_add_config, multi_reads_rows
from .launch import Launch, cached_plan


@triton.jit
def near_ranks(start_r, ranks, BLOCK_R: tl.constexpr):
    """Which of the ranks from ``start_r`` on lie before ``ranks`` ``[..., 1]`` rounded up to 8.

    A mask that changes inside of 16 bytes would have each element loaded alone.
    """
    return (start_r + tl.arange(0, BLOCK_R)) // 8 * 8 < ranks


@triton.jit
def sum_of_parts(s_ptrs, mask, stride_sp, PARTS: tl.constexpr):
    """S in fp32, a tile of it: its parts are summed in order."""
    s = tl.load(s_ptrs, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        s += tl.load(s_ptrs + part * stride_sp, mask=mask, other=0.0).to(tl.float32)
    return s


@triton.jit
def load_b(
    b_ptrs, offs_n, start_r, rank, N, R, stride_br, EVICTION: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """``B[l, n, r]`` of one adapter from a rank on, as far as its own rounded up to 8; no more is read."""
    offs_r = start_r + tl.arange(0, BLOCK_R)
    near = near_ranks(start_r, rank, BLOCK_R) & (offs_r < R)
    return tl.load(
        b_ptrs[:, None] + offs_r[None, :].to(tl.int64) * stride_br,
        mask=(offs_n < N)[:, None] & near[None, :],
        other=0.0,
        eviction_policy=EVICTION,
    )  # [BLOCK_N, BLOCK_R]


@triton.jit
def _lora_multi_add_kernel(
    y_ptr, s_ptr, b_ptr, order_ptr, sorted_ids_ptr, ranks_ptr,
    M, N, R, stride_sp, stride_sm, stride_bl, stride_bn, stride_br,
    S_PARTS: tl.constexpr, EVICTION: tl.constexpr, EARLY: tl.constexpr,
    R_VECTOR: tl.constexpr, BN_VECTOR: tl.constexpr, SM_VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``y[m] += s[m] B[l]^T``, l the row's adapter; rows of one adapter come together, others stay.

    Grid: ``(rows, blocks of columns)``. B is on its way before s, and y, are waited for.
    """
    R, stride_bn = multiple(R, R_VECTOR), multiple(stride_bn, BN_VECTOR)
    stride_sm = multiple(stride_sm, SM_VECTOR)
    slot = tl.load(sorted_ids_ptr + tl.program_id(0)).to(tl.int64)
    if slot >= 0:
        m = tl.load(order_ptr + tl.program_id(0)).to(tl.int64)
        rank = rank_of(ranks_ptr, slot, R)
        offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_ptrs = b_ptr + slot * stride_bl + offs_n * stride_bn
        b = load_b(b_ptrs, offs_n, 0, rank, N, R, stride_br, EVICTION, BLOCK_R)
        wait_for_previous_kernel(EARLY)
        y = tl.load(y_ptr + m * N + offs_n, mask=offs_n < N, other=0.0)  # [BLOCK_N]
        acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for r in range(0, rank, BLOCK_R):
            if r > 0:
                b = load_b(b_ptrs, offs_n, r, rank, N, R, stride_br, EVICTION, BLOCK_R)
            offs_r = r + tl.arange(0, BLOCK_R)
            s_ptrs = s_ptr + m * stride_sm + offs_r
            near = near_ranks(r, rank, BLOCK_R) & (offs_r < stride_sm)
            s = sum_of_parts(s_ptrs, near, stride_sp, S_PARTS)  # [BLOCK_R]
            s = tl.where(offs_r < rank, s, 0.0)  # past the rank nothing has been written,
            held = tl.where((offs_r < rank)[None, :], b, 0.0)  # or it is of an adapter before
            acc += tl.sum(held.to(tl.float32) * s[None, :], axis=1)  # [BLOCK_N]
        acc += y.to(tl.float32)
        tl.store(y_ptr + m * N + offs_n, acc.to(y_ptr.dtype.element_ty), mask=offs_n < N)
    elif tl.program_id(0) + tl.program_id(1) == 0:  # rows without an adapter come first
        wait_for_previous_kernel(EARLY)  # what follows waits for this kernel alone


@cached_plan
def _plan(
    s_shape: tuple[int, ...],
    s_stride: tuple[int, ...],
    s_dtype: torch.dtype,
    b_shape: tuple[int, ...],
    b_stride: tuple[int, ...],
    b_dtype: torch.dtype,
    y_dtype: torch.dtype,
    device: torch.device,
    has_ranks: bool,
    early: bool,
) -> Launch:
    (parts, M, R), N = s_shape, b_shape[1]
    block_n, block_r = multi_add_config(R, b_dtype.itemsize)
    b_strides, early = strides(b_shape, b_stride), early and has_pdl(device)
    return Launch(
        _lora_multi_add_kernel, (M, cdiv(N, block_n)), device,
        M, N, R, *s_stride[:2], *b_strides,
        fixed=True, S_PARTS=parts, EVICTION="evict_first" if multi_reads_rows(M) else "",
        EARLY=early, launch_pdl=early,
        R_VECTOR=vector(R), BN_VECTOR=vector(b_strides[1]), SM_VECTOR=vector(s_stride[1]),
        BLOCK_N=block_n, BLOCK_R=block_r, num_warps=2,
    )  # fmt: skip


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` by cuBLAS as `torch.nn.functional.linear` makes it, bit for bit: ``[M, N]``.

    Args:
        x (Tensor): ``[M, K]``.
        weight (Tensor): ``[N, K]`` in the dtype of x.
        bias (Tensor | None): ``[N]``, cast to the dtype of x. Default: ``None``.
    """
    with torch.autocast(x.device.type, enabled=False):  # it has been applied already
        if bias is None:
            return torch.mm(x, weight.t())
        return torch.addmm(bias.to(x.dtype), x, weight.t())


def lora_multi_add(
    y: Tensor,
    s: Tensor,
    lora_B: Tensor,
    ranks: Tensor | None,
    routing: tuple[Tensor, Tensor],
    early: bool = False,
) -> Tensor:
    """``y += s B[l]^T`` in place; l is each row's adapter, and rows without one are left alone.

    What a row adds is summed in fp32, without tensor cores: the work is that of reading B, once a row.

    Args:
        y (Tensor): ``[M, N]``, dense, as `frozen_linear` gives it.
        s (Tensor): ``[parts, M, R]``, rows dense, of `lora_multi_shrink` or its kin.
        lora_B (Tensor): ``[L, N, R]``, any strides.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        routing (tuple): ``order [M]`` and ``sorted_ids [M]``, -1 for rows without an adapter.
        early (bool): come onto the GPU beside the kernel before, which makes s, came early itself, and was
            launched after y and after everything else that is read here. Default: ``False``.

    Returns:
        Tensor: y. Sums go in a fixed order: bit-identical from run to run.
    """
    launch = _plan(
        s.shape, s.stride(), s.dtype, lora_B.shape, lora_B.stride(), lora_B.dtype, y.dtype, s.device,
        ranks is not None, early,
    )  # fmt: skip
    launch(y, s, lora_B, *routing, ranks)
    return y
