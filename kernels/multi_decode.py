"""``y = x W^T + bias + s B[id]^T`` for few rows: a stream of W, each row's own B gathered beside it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    adapters_of_rows,
    add_bias,
    add_frozen_product,
    dot_precision,
    has_pdl,
    let_next_kernel_start,
    strides,
    tile_of,
    wait_for_previous_kernel,
)
from .config import LaunchConfig, cdiv, multi_decode_ranks, multi_decode_sum_columns
from .launch import Launch, cached_plan


@triton.jit
def _gather(
    b_ptr, slots, ranks, offs_n, start_r, N, R, stride_bl, stride_bn, stride_br, BLOCK_R: tl.constexpr
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
    )  # [BLOCK_M, BLOCK_N, BLOCK_R]  # fmt: skip


@triton.jit
def _update(
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
def _lora_multi_decode_kernel(
    x_ptr, w_ptr, y_ptr, s_ptr, b_ptr, bias_ptr, ids_ptr, ranks_ptr,
    M, N, K, R, split_k, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_sp, stride_sm, stride_bl, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, IN_PARTS: tl.constexpr, S_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``y[m] = x[m] W^T + bias + s[m] B[ids[m]]^T``, or a part of ``x W^T`` over ``split_k`` of K in fp32.

    Grid: ``(tiles of y, parts)``. The first ranks of B are on their way before the stream of W, and s is
    waited for after it.
    """
    let_next_kernel_start(PDL)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_k = tl.program_id(1).to(tl.int64) * split_k
    if not IN_PARTS:
        slots, ranks = adapters_of_rows(ids_ptr, ranks_ptr, offs_m, M, R)
        b = _gather(b_ptr, slots, ranks, offs_n, 0, N, R, stride_bl, stride_bn, stride_br, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = add_frozen_product(
        acc, x_ptr + first_k * stride_xk, w_ptr + first_k * stride_wk, offs_m, offs_n, M, N,
        min(split_k, K - first_k), stride_xm, stride_xk, stride_wn, stride_wk, PRECISION, BLOCK_K,
    )  # fmt: skip
    wait_for_previous_kernel(PDL)
    if IN_PARTS:  # the next kernel, which waits for this one alone, adds the rest
        y_ptr += tl.program_id(1).to(tl.int64) * M * N
    else:
        acc += _update(b, s_ptr, ranks, offs_m, 0, stride_sp, stride_sm, S_PARTS, BLOCK_R)
        for r in range(BLOCK_R, tl.max(ranks, axis=0), BLOCK_R):
            b = _gather(
                b_ptr, slots, ranks, offs_n, r, N, R, stride_bl, stride_bn, stride_br, BLOCK_R
            )
            acc += _update(b, s_ptr, ranks, offs_m, r, stride_sp, stride_sm, S_PARTS, BLOCK_R)
        if HAS_BIAS:
            acc = add_bias(acc, bias_ptr, offs_n, N)
    tl.store(
        y_ptr + offs_m[:, None] * N + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


@triton.jit
def _lora_multi_sum_kernel(
    parts_ptr, y_ptr, s_ptr, b_ptr, bias_ptr, ids_ptr, ranks_ptr,
    M, N, R, stride_sp, stride_sm, stride_bl, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, S_PARTS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``y[m] = sum of parts + bias + s[m] B[ids[m]]^T``, in order. Grid: ``(rows, blocks of columns)``."""
    offs_m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n[None, :] < N
    tile = offs_m[:, None] * N + offs_n[None, :]
    slots, ranks = adapters_of_rows(ids_ptr, ranks_ptr, offs_m, M, R)
    b = _gather(b_ptr, slots, ranks, offs_n, 0, N, R, stride_bl, stride_bn, stride_br, BLOCK_R)
    wait_for_previous_kernel(PDL)
    acc = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    for part in tl.static_range(0, PARTS):
        acc += tl.load(parts_ptr + tl.cast(part, tl.int64) * M * N + tile, mask=inside, other=0.0)
    acc += _update(b, s_ptr, ranks, offs_m, 0, stride_sp, stride_sm, S_PARTS, BLOCK_R)
    for r in range(BLOCK_R, tl.max(ranks, axis=0), BLOCK_R):
        b = _gather(b_ptr, slots, ranks, offs_n, r, N, R, stride_bl, stride_bn, stride_br, BLOCK_R)
        acc += _update(b, s_ptr, ranks, offs_m, r, stride_sp, stride_sm, S_PARTS, BLOCK_R)
    if HAS_BIAS:
        acc = add_bias(acc, bias_ptr, offs_n, N)
    tl.store(y_ptr + tile, acc.to(y_ptr.dtype.element_ty), mask=inside)


@cached_plan
def _plan(
    c: LaunchConfig,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    w_shape: tuple[int, ...],
    w_stride: tuple[int, ...],
    s_shape: tuple[int, ...],
    s_stride: tuple[int, ...],
    b_stride: tuple[int, ...],
    s_dtype: torch.dtype,
    b_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    device: torch.device,
    has_ranks: bool,
    precision: str,
) -> tuple[int, Launch, Launch]:
    """Parts of K, the launch of the product, and the one that sums the parts."""
    (M, K), N, (s_parts, _, R) = shape, w_shape[0], s_shape
    has_bias, pdl, held = bias_dtype is not None, has_pdl(device), b_dtype.itemsize
    split_k = cdiv(cdiv(K, c.SPLITS), c.BLOCK_K) * c.BLOCK_K
    parts = cdiv(K, split_k)
    adapters = (*s_stride[:2], *strides((0, N, R), b_stride))
    common: dict[str, Any] = {"S_PARTS": s_parts, "PDL": pdl, "launch_pdl": pdl, "fixed": True}
    product = Launch(
        _lora_multi_decode_kernel, (cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N), parts), device,
        M, N, K, R, split_k, *strides(shape, stride), *strides(w_shape, w_stride), *adapters,
        HAS_BIAS=has_bias, IN_PARTS=parts > 1, PRECISION=precision,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, GROUP_M=c.GROUP_M,
        BLOCK_R=multi_decode_ranks(R, c.BLOCK_M * c.BLOCK_N, c.num_warps, held),
        num_warps=c.num_warps, num_stages=c.num_stages, **common,
    )  # fmt: skip
    block_n = multi_decode_sum_columns(N)
    total = Launch(
        _lora_multi_sum_kernel, (M, cdiv(N, block_n)), device,
        M, N, R, *adapters,
        HAS_BIAS=has_bias, PARTS=parts, BLOCK_N=block_n, BLOCK_R=multi_decode_ranks(R, block_n, 4, held),
        num_warps=4, **common,
    )  # fmt: skip
    return parts, product, total


def lora_multi_decode(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    ranks: Tensor | None,
    ids: Tensor,
    c: LaunchConfig,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = x W^T + bias + s B[l]^T`` in the dtype of x, contiguous; l is each row's adapter.

    What a row adds is summed in fp32, without tensor cores: the work is that of reading B.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        weight (Tensor): ``[N, K]`` in the dtype of x, any strides.
        s (Tensor): ``[parts, M, R]``, rows dense, as `lora_multi_shrink` gives it.
        lora_B (Tensor): ``[L, N, R]``, any strides.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        ids (Tensor): int32 ``[M]``, -1 for rows without an adapter.
        c (LaunchConfig): of `multi_decode_config`.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.

    Returns:
        Tensor: ``[M, N]``. Sums go in a fixed order: bit-identical from run to run.
    """
    (M, K), N = x.shape, weight.shape[0]
    parts, product, total = _plan(
        c, x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), s.shape, s.stride(),
        lora_B.stride(), s.dtype, lora_B.dtype, None if bias is None else bias.dtype, x.device,
        ranks is not None, dot_precision(x.dtype, K),
    )  # fmt: skip
    y = x.new_empty((M, N))
    if parts == 1:
        product(x, weight, y, s, lora_B, bias, ids, ranks)
        return y
    sums = torch.empty((parts, M, N), dtype=torch.float32, device=x.device)
    product(x, weight, sums, s, lora_B, bias, ids, ranks)
    total(sums, y, s, lora_B, bias, ids, ranks)
    return y
