"""``y = x W0^T + bias``, and ``s_g B_g^T`` added to the columns of each adapted slice g, in one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    add_bias,
    add_frozen_product,
    add_rank_product,
    aligned,
    device_properties,
    dot,
    dot_precision,
    for_tma,
    has_pdl,
    has_tma,
    rows_fit_tma,
    store_tile,
    strides,
    tile_of,
    wait_for_previous_kernel,
)
from .config import cdiv, gemm_boxes, gemm_pointer_config, gemm_tma_config, rank_step
from .launch import Launch, cached_plan

Slices = tuple[tuple[int, int], ...]
"""The ``(first, last)`` columns of y of each adapted slice, in order; ``last`` is not in it."""


@triton.jit
def _lora_forward_sliced_tma_kernel(
    x_desc, w_desc, s_desc, b_desc, y_desc, bias_ptr, table_ptr, M, N, K, R,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """`_lora_forward_tma_kernel` for slices whose borders are those of tiles. Grid: persistent.

    ``table[tile_n]`` is the slice of a column of tiles (-1: no adapter, so no steps for it) and the
    row of B it begins with. s is ``[slices M, R]``, a slice below the other: what a load takes from
    past a slice's end lands in rows that are not stored.
    """
    wait_for_previous_kernel(PDL)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    k_steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        group = tl.load(table_ptr + 2 * tile_n)
        b_row = tl.load(table_ptr + 2 * tile_n + 1)
        rank_steps = tl.where(group >= 0, tl.cdiv(R, BLOCK_K), 0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(0, k_steps + rank_steps):
            if step < k_steps:
                left, right, row_m, row_n = x_desc, w_desc, start_m, start_n
                start_k = step * BLOCK_K
            else:
                left, right, row_m, row_n = s_desc, b_desc, group * M + start_m, b_row
                start_k = (step - k_steps) * BLOCK_K
            a = left.load([row_m, start_k])  # [BLOCK_M, BLOCK_K]
            b = right.load([row_n, start_k])  # [BLOCK_N, BLOCK_K]
            acc = dot(a, b.T, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
        if HAS_BIAS:
            acc = add_bias(acc, bias_ptr, start_n.to(tl.int64) + tl.arange(0, BLOCK_N), N)
        store_tile(y_desc, acc, start_m, start_n, BLOCK_M, BLOCK_N, SUBTILES)


@triton.jit
def _lora_forward_sliced_pointer_kernel(
    x_ptr, w_ptr, y_ptr, s_ptr, b_ptr, bias_ptr, table_ptr,
    M, N, K, R, slices, b_rows, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_sg, stride_sm, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """`_lora_forward_pointer_kernel` with slices of any width. Grid: one program a tile of y.

    ``table[g]`` is the first and last column of slice g. A tile makes the rank product of each slice
    that it meets, one as a rule, with the other slices' rows of B masked.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = add_frozen_product(
        acc, x_ptr, w_ptr, offs_m, offs_n, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    b_row = tl.cast(0, tl.int64)
    for g in range(0, slices):
        first, last = tl.load(table_ptr + 2 * g), tl.load(table_ptr + 2 * g + 1)
        if (tile_n * BLOCK_N < last) & (tile_n * BLOCK_N + BLOCK_N > first):
            inside = (offs_n >= first) & (offs_n < last)
            rows = tl.where(inside, offs_n - first + b_row, b_rows)
            acc = add_rank_product(
                acc, s_ptr + tl.cast(g, tl.int64) * stride_sg, b_ptr,
                offs_m, offs_m[:, None] < M, rows, b_rows, R, R_STEPS * BLOCK_R,
                stride_sm, stride_bn, stride_br,
                y_ptr.dtype.element_ty, PRECISION, BLOCK_R,
            )  # fmt: skip
        b_row += last - first
    if HAS_BIAS:
        acc = add_bias(acc, bias_ptr, offs_n, N)
    tl.store(
        y_ptr + offs_m[:, None] * N + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


@functools.lru_cache(maxsize=256)
def _columns_of_slices(slices: Slices, device: torch.device) -> Tensor:
    """``[slices, 2]``: first and last column; made once a layer shape, for it is copied to the GPU."""
    return torch.tensor(slices, dtype=torch.int32).to(device)


@functools.lru_cache(maxsize=256)
def _slice_of_tiles(slices: Slices, N: int, block: int, device: torch.device) -> Tensor | None:
    """``[tiles, 2]``: slice and row of B of a column of tiles; ``None`` if a tile meets a border."""
    table = [[-1, 0] for _ in range(cdiv(N, block))]
    row = 0
    for g, (first, last) in enumerate(slices):
        if first % block or (last % block and last != N):
            return None
        for tile in range(first // block, cdiv(last, block)):
            table[tile] = [g, row + tile * block - first]
        row += last - first
    return torch.tensor(table, dtype=torch.int32).to(device)


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    w_shape: tuple[int, ...],
    w_stride: tuple[int, ...],
    b_shape: tuple[int, ...],
    b_stride: tuple[int, ...],
    b_dtype: torch.dtype,
    slices: Slices,
    device: torch.device,
    has_bias: bool,
    is_aligned: bool,
    precision: str,
) -> tuple[bool, bool, Launch]:
    """Whether by TMA, whether that can describe lora_B as it is, and the launch with the table of slices."""
    (M, K), N, (b_rows, R), itemsize = shape, w_shape[0], b_shape, dtype.itemsize
    major, num_sms = device_properties(device)
    options: dict[str, Any] = {"HAS_BIAS": has_bias, "PRECISION": precision}
    dense = rows_fit_tma(shape, stride, itemsize) and rows_fit_tma(w_shape, w_stride, itemsize)
    if has_tma(major) and precision == "tf32" and is_aligned and dense and N * itemsize % 16 == 0:
        c = gemm_tma_config(M, N, itemsize, num_sms)
        table = _slice_of_tiles(slices, N, c.BLOCK_N, device)
        if table is not None:
            described = b_dtype == dtype and rows_fit_tma(b_shape, b_stride, itemsize)
            pdl = has_pdl(device)
            tiles = cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N)
            return True, described, Launch(
                _lora_forward_sliced_tma_kernel, (min(num_sms, tiles),), device, M, N, K, R,
                boxes=gemm_boxes(c, rank_product=True),
                BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, GROUP_M=c.GROUP_M,
                SUBTILES=c.SUBTILES, num_warps=c.num_warps, num_stages=c.num_stages,
                PDL=pdl, launch_pdl=pdl, constants=(table,), **options,
            )  # fmt: skip
    c, block_r = gemm_pointer_config(itemsize, precision), rank_step(R, itemsize)
    return False, True, Launch(
        _lora_forward_sliced_pointer_kernel, (cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N),), device,
        M, N, K, R, len(slices), b_rows, *strides(shape, stride), *strides(w_shape, w_stride),
        M * R, R, *strides(b_shape, b_stride),
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, GROUP_M=c.GROUP_M,
        R_STEPS=cdiv(R, block_r), BLOCK_R=block_r, constants=(_columns_of_slices(slices, device),),
        num_warps=c.num_warps, num_stages=c.num_stages, **options,
    )  # fmt: skip


def lora_forward_sliced(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    slices: Sequence[tuple[int, int]],
    bias: Tensor | None = None,
) -> Tensor:
    """``y = x W0^T + bias``, with ``s_g B_g^T`` added to columns ``first`` to ``last`` of slice g.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        weight (Tensor): ``[N, K]`` in the dtype of x, any strides.
        s (Tensor): ``[slices, M, R]`` in the dtype of x, contiguous.
        lora_B (Tensor): the slices' rows one below the other, ``[sum of widths, R]``, any strides.
        slices (Sequence[tuple[int, int]]): first and last column of each adapted slice, in order;
            ``last`` is not in it.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.

    Returns:
        Tensor: ``[M, N]``.
    """
    (M, K), N = x.shape, weight.shape[0]
    by_tma, described, launch = _plan(
        x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), lora_B.shape, lora_B.stride(),
        lora_B.dtype, tuple(slices), x.device, bias is not None, aligned(x, weight),
        dot_precision(x.dtype, K),
    )  # fmt: skip
    if by_tma and not (described and aligned(lora_B)):
        return lora_forward_sliced(x, weight, s, for_tma(lora_B, x.dtype), slices, bias)
    y = x.new_empty((M, N))
    if by_tma:
        launch(x, weight, for_tma(s.flatten(0, 1), x.dtype), lora_B, y, bias, *launch.constants)
    else:
        launch(x, weight, y, s, lora_B, bias, *launch.constants)
    return y
