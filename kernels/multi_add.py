"""``y = product + bias + s B[id]^T`` for few rows, whose frozen product cuBLAS makes."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import adapters_of_rows, add_bias, has_pdl, strides, wait_for_previous_kernel
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
    product_ptr, y_ptr, s_ptr, b_ptr, bias_ptr, order_ptr, sorted_ids_ptr, ranks_ptr,
    M, N, R, stride_sp, stride_sm, stride_bl, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, S_PARTS: tl.constexpr, EVICTION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``y[m] = product[m] + (s[m] B[l]^T + bias)``, l the row's adapter; rows of one adapter come together.

    Without a product the sum in brackets alone. With PDL the first ranks of B are on their way while s is
    being made. Grid: ``(rows, blocks of columns)``.
    """
    place = tl.program_id(0) + tl.arange(0, 1)
    offs_m = tl.load(order_ptr + place).to(tl.int64)  # [1]
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n[None, :] < N
    tile = offs_m[:, None] * N + offs_n[None, :]
    slots, ranks = adapters_of_rows(sorted_ids_ptr, ranks_ptr, place, M, R)
    b = gather_rows(
        b_ptr, slots, ranks, offs_n, 0, N, R, stride_bl, stride_bn, stride_br, EVICTION, BLOCK_R
    )
    if product_ptr is not None:
        product = tl.load(product_ptr + tile, mask=inside, other=0.0).to(tl.float32)  # [1, BLOCK_N]
    wait_for_previous_kernel(PDL)
    acc = update_of_rows(b, s_ptr, ranks, offs_m, 0, stride_sp, stride_sm, S_PARTS, BLOCK_R)
    for r in range(BLOCK_R, tl.max(ranks, axis=0), BLOCK_R):
        b = gather_rows(
            b_ptr, slots, ranks, offs_n, r, N, R, stride_bl, stride_bn, stride_br, EVICTION, BLOCK_R
        )
        acc += update_of_rows(b, s_ptr, ranks, offs_m, r, stride_sp, stride_sm, S_PARTS, BLOCK_R)
    if HAS_BIAS:
        acc = add_bias(acc, bias_ptr, offs_n, N)
    if product_ptr is not None:
        acc += product
    tl.store(y_ptr + tile, acc.to(y_ptr.dtype.element_ty), mask=inside)


@cached_plan
def _plan(
    s_shape: tuple[int, ...],
    s_stride: tuple[int, ...],
    s_dtype: torch.dtype,
    b_shape: tuple[int, ...],
    b_stride: tuple[int, ...],
    b_dtype: torch.dtype,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    device: torch.device,
    has_ranks: bool,
    alone: bool,
) -> Launch:
    (parts, M, R), N = s_shape, b_shape[1]
    block_n, pdl = MULTI_ADD_COLUMNS, alone and has_pdl(device)
    return Launch(
        _lora_multi_add_kernel, (M, cdiv(N, block_n)), device,
        M, N, R, *s_stride[:2], *strides(b_shape, b_stride),
        fixed=True, HAS_BIAS=dtypes[1] is not None, S_PARTS=parts,
        EVICTION="evict_first" if multi_reads_rows(M) else "", PDL=pdl, launch_pdl=pdl,
        BLOCK_N=block_n, BLOCK_R=rows_ranks(R, block_n, 4, b_dtype.itemsize), num_warps=4,
    )  # fmt: skip


@functools.cache
def can_keep_fp32() -> bool:
    """Whether torch gives the product of 16-bit matrices in fp32: since 2.8."""
    return "dtype" in torch.ops.aten.mm.overloads()


def frozen_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` in fp32: x ``[M, K]``, weight ``[N, K]``; for 16-bit tensors only where `can_keep_fp32`."""
    if x.is_cuda and x.dtype != torch.float32:
        product: Tensor = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return product
    with torch.autocast(x.device.type, enabled=False):
        return x.float() @ weight.float().t()


def lora_multi_add(
    product: Tensor,
    s: Tensor,
    lora_B: Tensor,
    ranks: Tensor | None,
    routing: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = product + (s B[l]^T + bias)``, rounded once; l is each row's adapter.

    What a row adds is summed in fp32, without tensor cores: the work is that of reading B.

    Args:
        product (Tensor): fp32 ``[M, N]``, dense, as `frozen_product` gives it.
        s (Tensor): ``[parts, M, R]``, rows dense, of `lora_multi_shrink` or `lora_multi_shrink_rows`.
        lora_B (Tensor): ``[L, N, R]``, any strides.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        routing (tuple): ``order [M]`` and ``sorted_ids [M]``, -1 for rows without an adapter.
        dtype (torch.dtype): of y.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.

    Returns:
        Tensor: ``[M, N]``. Sums go in a fixed order: bit-identical from run to run.
    """
    return _add(product, s, lora_B, ranks, routing, dtype, bias)


def lora_multi_update(
    s: Tensor,
    lora_B: Tensor,
    ranks: Tensor | None,
    routing: tuple[Tensor, Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """``s B[l]^T + bias`` in fp32 ``[M, N]``: what `lora_multi_add` adds, bit for bit.

    To be launched right after the kernel that makes s, beside which it begins. Arguments are those of
    `lora_multi_add`.
    """
    return _add(None, s, lora_B, ranks, routing, torch.float32, bias)


def _add(
    product: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    ranks: Tensor | None,
    routing: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    launch = _plan(
        s.shape, s.stride(), s.dtype, lora_B.shape, lora_B.stride(), lora_B.dtype,
        (dtype, None if bias is None else bias.dtype), s.device, ranks is not None, product is None,
    )  # fmt: skip
    y = torch.empty((s.shape[1], lora_B.shape[1]), dtype=dtype, device=s.device)
    launch(product, y, s, lora_B, bias, *routing, ranks)
    return y
