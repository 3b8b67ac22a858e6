"""``y += s B[id]^T`` for few rows, whose frozen product cuBLAS makes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import adapters_of_rows, strides
from .config import cdiv
from .config_multi import MULTI_ADD_COLUMNS, multi_reads_rows, rows_ranks
from .launch import Launch, cached_plan


@triton.jit
def gather_rows(
    b_ptr, slots, ranks, offs_n, start_r, N, R, stride_bl, stride_bn, stride_br,
    EVICTION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``B[l, n, r]`` of each row's adapter l, as far as its rank rounded up to 8; nothing past that is read.

    A mask that changes inside of 16 bytes would have each element loaded alone.
    """
    offs_r = start_r + tl.arange(0, BLOCK_R)
    inside = (offs_n[None, :, None] < N) & (offs_r[None, None, :] < R)
    return tl.load(
        b_ptr + slots[:, None, None] * stride_bl
        + offs_n[None, :, None] * stride_bn + offs_r[None, None, :].to(tl.int64) * stride_br,
        mask=inside & (((offs_r // 8) * 8)[None, None, :] < ranks[:, None, None]),
        other=0.0,
        eviction_policy=EVICTION,
    )  # [BLOCK_M, BLOCK_N, BLOCK_R]  # fmt: skip


@triton.jit
def update_of_rows(
    b, s_ptr, ranks, offs_m, start_r, stride_sp, stride_sm, PARTS: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """``sum_r s[m, r] B[l, n, r]`` of one block of ranks, in fp32; the parts of s are summed in order."""
    offs_r = start_r + tl.arange(0, BLOCK_R)
    s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :]
    mask = offs_r[None, :] < ranks[:, None]
    s = tl.load(s_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_R]
    for part in tl.static_range(1, PARTS):
        s += tl.load(s_ptrs + part * stride_sp, mask=mask, other=0.0)
    b = tl.where(mask[:, None, :], b, 0.0)  # what is there from an adapter before
    return tl.sum(s[:, None, :] * b.to(tl.float32), axis=2)  # [BLOCK_M, BLOCK_N]


@triton.jit
def _lora_multi_add_kernel(
    y_ptr, s_ptr, b_ptr, order_ptr, sorted_ids_ptr, ranks_ptr,
    M, N, R, stride_sp, stride_sm, stride_bl, stride_bn, stride_br,
    S_PARTS: tl.constexpr, EVICTION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``y[m] += s[m] B[l]^T``, l the row's adapter; rows of one adapter come together, others stay.

    Grid: ``(rows, blocks of columns)``.
    """
    place = tl.program_id(0) + tl.arange(0, 1)
    if tl.load(sorted_ids_ptr + tl.program_id(0)) >= 0:
        offs_m = tl.load(order_ptr + place).to(tl.int64)  # [1]
        offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
        slots, ranks = adapters_of_rows(sorted_ids_ptr, ranks_ptr, place, M, R)
        b = gather_rows(
            b_ptr, slots, ranks, offs_n, 0, N, R, stride_bl, stride_bn, stride_br, EVICTION, BLOCK_R
        )
        y = tl.load(y_ptrs, mask=offs_n[None, :] < N, other=0.0)  # [1, BLOCK_N]
        acc = update_of_rows(b, s_ptr, ranks, offs_m, 0, stride_sp, stride_sm, S_PARTS, BLOCK_R)
        for r in range(BLOCK_R, tl.max(ranks, axis=0), BLOCK_R):
            b = gather_rows(
                b_ptr,
                slots,
                ranks,
                offs_n,
                r,
                N,
                R,
                stride_bl,
                stride_bn,
                stride_br,
                EVICTION,
                BLOCK_R,
            )
            acc += update_of_rows(
                b, s_ptr, ranks, offs_m, r, stride_sp, stride_sm, S_PARTS, BLOCK_R
            )
        acc += y.to(tl.float32)
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=offs_n[None, :] < N)


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
) -> Launch:
    (parts, M, R), N = s_shape, b_shape[1]
    block_n = MULTI_ADD_COLUMNS
    return Launch(
        _lora_multi_add_kernel, (M, cdiv(N, block_n)), device,
        M, N, R, *s_stride[:2], *strides(b_shape, b_stride),
        fixed=True, S_PARTS=parts, EVICTION="evict_first" if multi_reads_rows(M) else "",
        BLOCK_N=block_n, BLOCK_R=rows_ranks(R, block_n, 4, b_dtype.itemsize), num_warps=4,
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
    y: Tensor, s: Tensor, lora_B: Tensor, ranks: Tensor | None, routing: tuple[Tensor, Tensor]
) -> Tensor:
    """``y += s B[l]^T`` in place; l is each row's adapter, and rows without one are left alone.

    What a row adds is summed in fp32, without tensor cores: the work is that of reading B.

    Args:
        y (Tensor): ``[M, N]``, dense, as `frozen_linear` gives it.
        s (Tensor): ``[parts, M, R]``, rows dense, of `lora_multi_shrink` or `lora_multi_shrink_rows`.
        lora_B (Tensor): ``[L, N, R]``, any strides.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        routing (tuple): ``order [M]`` and ``sorted_ids [M]``, -1 for rows without an adapter.

    Returns:
        Tensor: y. Sums go in a fixed order: bit-identical from run to run.
    """
    launch = _plan(
        s.shape, s.stride(), s.dtype, lora_B.shape, lora_B.stride(), lora_B.dtype, y.dtype, s.device,
        ranks is not None,
    )  # fmt: skip
    launch(y, s, lora_B, *routing, ranks)
    return y
