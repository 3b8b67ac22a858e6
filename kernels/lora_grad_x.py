"""``dx = mask * (ds A) + dy W0``: the frozen GEMM of the backward, LoRA's share in its accumulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    add_frozen_product,
    add_rank_product,
    aligned,
    device_properties,
    dot,
    dot_precision,
    for_tma,
    halves,
    has_pdl,
    has_tma,
    late_wait_step,
    multiple,
    rows_fit_tma,
    store_tile,
    strides,
    tile_of,
    wait_for_previous_kernel,
)
from .config import (
    DS_ROWS,
    cdiv,
    gemm_boxes,
    gemm_pointer_config,
    gemm_tma_config,
    rank_step,
    vector,
)
from .dropout import keep_tile, load_packed, mask_word
from .launch import Launch, cached_plan
from .ready import Ready, wait_until_all_ready
from .tuned import choose

_MARK_M = tl.constexpr(DS_ROWS)


@triton.jit
def _rank_product(
    ds_ptr, a_ptr, mask_ptr, offs_m, start_k, M, K, R, stride_dsm, stride_ar, stride_ak,
    DTYPE: tl.constexpr, MASK_WORD: tl.constexpr, PRECISION: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``mask * (ds A)`` for one tile of dx: the accumulator that ``dy W0`` is then added to.

    It comes before the GEMM because the mask must not touch ``dy W0``, and a second accumulator would
    not fit in registers. ds carries scaling and 1 / (1 - p) already. The mask is loaded before the product
    waits for its operands.
    """
    if MASK_WORD > 0:
        packed = load_packed(mask_ptr, offs_m, start_k, M, K, BLOCK_N, MASK_WORD)
    acc = add_rank_product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), ds_ptr, a_ptr,
        offs_m, offs_m[:, None] < M, start_k.to(tl.int64) + tl.arange(0, BLOCK_N),
        K, R, R_STEPS * BLOCK_R, stride_dsm, stride_ak, stride_ar,
        DTYPE, PRECISION, BLOCK_R,
    )  # fmt: skip
    if MASK_WORD > 0:
        acc = tl.where(keep_tile(packed, BLOCK_M, BLOCK_N, MASK_WORD), acc, 0.0)
    return acc


@triton.jit
def _store_part(
    dx_desc, acc, ds_ptr, a_ptr, mask_ptr, start_m, start_k, M, K, R, stride_dsm, stride_ar, stride_ak,
    MASK_WORD: tl.constexpr, PRECISION: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store some columns of a tile of ``dy W0``, with ``mask * (ds A)`` added to them."""
    product = _rank_product(
        ds_ptr, a_ptr, mask_ptr, start_m.to(tl.int64) + tl.arange(0, BLOCK_M), start_k,
        M, K, R, stride_dsm, stride_ar, stride_ak,
        dx_desc.dtype, MASK_WORD, PRECISION, R_STEPS, BLOCK_R, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dx_desc.store([start_m, start_k], (acc + product).to(dx_desc.dtype))  # [BLOCK_M, BLOCK_N]


@triton.jit
def _store_with_rank_product(
    dx_desc, acc, ds_ptr, a_ptr, mask_ptr, start_m, start_k, M, K, R, stride_dsm, stride_ar, stride_ak,
    MASK_WORD: tl.constexpr, PRECISION: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Store a tile of ``dy W0`` with ``mask * (ds A)`` added, in 2 or 4 parts: registers have no more."""
    PART: tl.constexpr = BLOCK_N // SUBTILES
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    if SUBTILES == 2:
        parts = (left, right)
    else:
        parts = halves(left, BLOCK_M, BLOCK_N // 2) + halves(right, BLOCK_M, BLOCK_N // 2)
    for i in tl.static_range(SUBTILES):
        _store_part(
            dx_desc, parts[i], ds_ptr, a_ptr, mask_ptr, start_m, start_k + i * PART, M, K, R,
            stride_dsm, stride_ar, stride_ak, MASK_WORD, PRECISION, R_STEPS, BLOCK_R, BLOCK_M, PART,
        )  # fmt: skip


@triton.jit
def _wait_for_ds(ready_ptr, is_first, tile_m, M, ticket, BLOCK_M: tl.constexpr):
    """Wait for ds in the first two tiles of a program: for the rows of the first, and then for all.

    They are there by the second one's end, and to ask takes a microsecond.
    """
    marks = tl.cdiv(M, _MARK_M)
    mark = tl.where(is_first, tile_m * (BLOCK_M // _MARK_M), 0)
    count = tl.where(is_first, tl.minimum(BLOCK_M // _MARK_M, marks - mark), marks)
    wait_until_all_ready(ready_ptr + mark, count, ticket)


@triton.jit
def _add_frozen_product(
    acc, dy_desc, w_desc, start_m, start_k, N, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """``acc + dy W`` for a tile, by TMA."""
    for n in range(0, tl.cdiv(N, BLOCK_K)):
        dy = dy_desc.load([start_m, n * BLOCK_K])  # [BLOCK_M, BLOCK_K]
        w = w_desc.load([n * BLOCK_K, start_k])  # [BLOCK_K, BLOCK_N]
        acc = dot(dy, w, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
    return acc


@triton.jit(do_not_specialize=["ticket"])
def _lora_grad_x_tma_kernel(
    dy_desc, w_desc, ds_desc, a_desc, dx_desc, ready_ptr, ticket, M, N, K, R,
    PRECISION: tl.constexpr, PDL: tl.constexpr, BESIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """``dx = [dy ds] [W; A]`` by TMA, no dropout. Grid: persistent, one program an SM.

    Tiles are BLOCK_M x BLOCK_N of dx ``[M, K]``; the sum over N, then R, goes in steps of BLOCK_K. The
    previous kernel makes ds, or, if BESIDE, runs on beside this one and only has to end before it: with
    ``ready_ptr`` it makes ds meanwhile, and marks its rows.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N)
    n_steps = tl.cdiv(N, BLOCK_K)
    wait_at = late_wait_step(n_steps)
    if wait_at == 0:  # the loop's first loads may be of ds
        if ready_ptr is not None:
            wait_until_all_ready(ready_ptr, tl.cdiv(M, _MARK_M), ticket)
        elif not BESIDE:
            wait_for_previous_kernel(PDL)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_k = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(0, n_steps + tl.cdiv(R, BLOCK_K)):
            if ready_ptr is not None:
                if (step == wait_at) & (tile < 2 * tl.num_programs(0)):
                    _wait_for_ds(ready_ptr, tile < tl.num_programs(0), tile_m, M, ticket, BLOCK_M)
            elif not BESIDE:  # noqa: SIM102
                if step == wait_at:
                    wait_for_previous_kernel(PDL)
            if step < n_steps:
                left, right, start_n = dy_desc, w_desc, step * BLOCK_K
            else:
                left, right, start_n = ds_desc, a_desc, (step - n_steps) * BLOCK_K
            a = left.load([start_m, start_n])  # [BLOCK_M, BLOCK_K]
            b = right.load([start_n, start_k])  # [BLOCK_K, BLOCK_N]
            acc = dot(a, b, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
        store_tile(dx_desc, acc, start_m, start_k, BLOCK_M, BLOCK_N, SUBTILES)
    if BESIDE:
        wait_for_previous_kernel(PDL)


@triton.jit(do_not_specialize=["ticket"])
def _lora_grad_x_dropout_kernel(
    dy_desc, w_desc, dx_desc, ds_ptr, a_ptr, mask_ptr, ready_ptr, ticket,
    M, N, K, R, stride_dsm, stride_ar, stride_ak,
    MASK_WORD: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, BESIDE: tl.constexpr,
    R_VECTOR: tl.constexpr, DS_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """``dx = mask * (ds A) + dy W`` by TMA. Grid: persistent, one program an SM.

    Not flattened: with the masked product in the loop, ptxas waits for every wgmma (2.3 times as slow).
    BESIDE as in the kernel above. With ``ready_ptr`` a program adds the rank product to its first tile at
    the end, for ds is made beside it; that takes longer than at the beginning, where the others have it.
    """
    R, stride_dsm = multiple(R, R_VECTOR), multiple(stride_dsm, DS_VECTOR)
    if not BESIDE:
        wait_for_previous_kernel(PDL)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N)
    next_tile = tl.program_id(0)
    if ready_ptr is not None:
        tile_m, tile_n = tile_of(next_tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_k = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = _add_frozen_product(
            tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
            dy_desc, w_desc, start_m, start_k, N, PRECISION, BLOCK_K,
        )  # fmt: skip
        _wait_for_ds(ready_ptr, True, tile_m, M, ticket, BLOCK_M)
        _store_with_rank_product(
            dx_desc, acc, ds_ptr, a_ptr, mask_ptr, start_m, start_k, M, K, R, stride_dsm, stride_ar,
            stride_ak, MASK_WORD, PRECISION, R_STEPS, BLOCK_R, BLOCK_M, BLOCK_N, SUBTILES,
        )  # fmt: skip
        next_tile += tl.num_programs(0)
    for tile in range(next_tile, tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_k = tile_m * BLOCK_M, tile_n * BLOCK_N
        if ready_ptr is not None:  # noqa: SIM102 - decided when compiling
            if tile == next_tile:
                _wait_for_ds(ready_ptr, False, tile_m, M, ticket, BLOCK_M)
        acc = _rank_product(
            ds_ptr, a_ptr, mask_ptr, start_m.to(tl.int64) + tl.arange(0, BLOCK_M), start_k,
            M, K, R, stride_dsm, stride_ar, stride_ak,
            dx_desc.dtype, MASK_WORD, PRECISION, R_STEPS, BLOCK_R, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        acc = _add_frozen_product(acc, dy_desc, w_desc, start_m, start_k, N, PRECISION, BLOCK_K)
        store_tile(dx_desc, acc, start_m, start_k, BLOCK_M, BLOCK_N, SUBTILES)
    if BESIDE:
        wait_for_previous_kernel(PDL)


@triton.jit
def _lora_grad_x_pointer_kernel(
    dy_ptr, w_ptr, dx_ptr, ds_ptr, a_ptr, mask_ptr,
    M, N, K, R, stride_dym, stride_dyn, stride_wn, stride_wk, stride_dsm, stride_ar, stride_ak,
    MASK_WORD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``dx = mask * (ds A) + dy W`` for any strides. Grid: one program a tile of dx."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    start_k = tile_n * BLOCK_N
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = start_k.to(tl.int64) + tl.arange(0, BLOCK_N)
    acc = _rank_product(
        ds_ptr, a_ptr, mask_ptr, offs_m, start_k, M, K, R, stride_dsm, stride_ar, stride_ak,
        dx_ptr.dtype.element_ty, MASK_WORD, PRECISION, R_STEPS, BLOCK_R, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc = add_frozen_product(
        acc, dy_ptr, w_ptr, offs_m, offs_k, M, K, N, stride_dym, stride_dyn, stride_wk, stride_wn,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    tl.store(
        dx_ptr + offs_m[:, None] * K + offs_k[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_k[None, :] < K),
    )


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    w_stride: tuple[int, ...],
    a_shape: tuple[int, ...],
    a_stride: tuple[int, ...],
    a_dtype: torch.dtype,
    ds_stride: int,
    device: torch.device,
    word: int,
    is_aligned: bool,
    precision: str,
    beside: bool,
    is_marked: bool,
) -> tuple[bool, bool, Launch]:
    """Whether by TMA, whether that can describe ds and lora_A as they are, and the launch."""
    (M, N), (R, K), itemsize = shape, a_shape, dtype.itemsize
    major, num_sms = device_properties(device)
    dense = rows_fit_tma(shape, stride, itemsize) and rows_fit_tma((N, K), w_stride, itemsize)
    fits = is_aligned and dense and K * itemsize % 16 == 0
    by_tma = has_tma(major) and precision == "tf32" and fits
    c = (
        gemm_tma_config(M, K, itemsize, num_sms, R if word > 0 else None, beside)
        if by_tma
        else gemm_pointer_config(itemsize, precision)
    )
    c = choose(
        "lora_grad_x_tma" if by_tma else "lora_grad_x_pointer", c, device, itemsize, precision, R,
        {"M": M, "K": K, "N": N}, dropout=word > 0, beside=beside, fp32_adapters=a_dtype != dtype,
        dy_strided=stride[1] != 1, w_strided=w_stride[1] != 1,
    )  # fmt: skip
    options: dict[str, Any] = {
        "BLOCK_M": c.BLOCK_M, "BLOCK_N": c.BLOCK_N, "BLOCK_K": c.BLOCK_K, "GROUP_M": c.GROUP_M,
        "num_warps": c.num_warps, "num_stages": c.num_stages, "PRECISION": precision, "fixed": True,
    }  # fmt: skip
    tiles = cdiv(M, c.BLOCK_M) * cdiv(K, c.BLOCK_N)
    ranks: dict[str, Any] = {
        "R_STEPS": cdiv(R, rank_step(R, itemsize)),
        "BLOCK_R": rank_step(R, itemsize),
    }
    sizes, a_strides = (M, N, K, R), strides(a_shape, a_stride)
    if not by_tma:
        return False, True, Launch(
            _lora_grad_x_pointer_kernel, (tiles,), device, *sizes,
            *strides(shape, stride), *strides((N, K), w_stride), ds_stride, *a_strides,
            MASK_WORD=word, **ranks, **options,
        )  # fmt: skip
    if word > 0 and is_marked and c.SUBTILES == 1:
        c = replace(c, SUBTILES=2)
    pdl, grid = has_pdl(device), (min(num_sms, tiles),)
    options |= {"SUBTILES": c.SUBTILES, "PDL": pdl, "launch_pdl": pdl, "BESIDE": beside}
    if word > 0:
        if is_marked:  # as many registers as the kernel beside it leaves
            options["maxnreg"] = 200
        return True, True, Launch(
            _lora_grad_x_dropout_kernel, grid, device, *sizes, ds_stride, *a_strides,
            boxes=gemm_boxes(c, nk=False), MASK_WORD=word, R_VECTOR=vector(R), DS_VECTOR=vector(ds_stride),
            **ranks, **options,
        )  # fmt: skip
    boxes = gemm_boxes(c, nk=False, rank_product=True)
    described = a_dtype == dtype and rows_fit_tma(a_shape, a_stride, itemsize)
    described &= rows_fit_tma((M, R), (ds_stride, 1), itemsize)
    return (
        True,
        described,
        Launch(_lora_grad_x_tma_kernel, grid, device, *sizes, boxes=boxes, **options),
    )


def lora_grad_x(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor,
    lora_A: Tensor,
    mask: Tensor | None = None,
    *,
    beside: bool = False,
    ready: Ready | None = None,
) -> Tensor:
    """``dx = mask * (ds A) + dy W0`` in the dtype of dy, contiguous.

    Args:
        dy (Tensor): ``[M, N]``, any strides.
        weight (Tensor): ``[N, K]`` in the dtype of dy, any strides.
        ds (Tensor): ``[M, R]``, rows dense, with scaling and 1 / (1 - p) in it: from `lora_grad_b`.
        lora_A (Tensor): ``[R, K]``, any strides, cast to the dtype of dy for the product.
        mask (Tensor | None): packed keep mask of `lora_shrink`. Default: ``None``, all kept.
        beside (bool): ds is complete already, and the kernel launched just before this one, none of whose
            results are read here, leaves room for this one to run beside it; only where TMA takes ds
            and lora_A as they are. Default: ``False``.
        ready (Ready | None): of the `lora_grad_ab_ds` launched just before, which makes ds and runs beside
            this one likewise. Default: ``None``.

    Returns:
        Tensor: ``[M, K]``.
    """
    (M, N), K = dy.shape, lora_A.shape[1]
    by_tma, described, launch = _plan(
        dy.shape, dy.stride(), dy.dtype, weight.stride(), lora_A.shape, lora_A.stride(),
        lora_A.dtype, ds.stride(0), dy.device, mask_word(mask, K), aligned(dy, weight),
        dot_precision(dy.dtype, N), beside or ready is not None, ready is not None,
    )  # fmt: skip
    if not (described and (mask is not None or aligned(ds, lora_A) or not by_tma)):
        # The kernel before is a copy then, whose result is read: there is nothing to run beside.
        ds, lora_A = for_tma(ds, dy.dtype), for_tma(lora_A, dy.dtype)
        return lora_grad_x(dy, weight, ds, lora_A, mask)
    dx = dy.new_empty((M, K))
    if not by_tma:
        launch(dy, weight, dx, ds, lora_A, mask)
        return dx
    marks, ticket = (None, 0) if ready is None else ready[:2]
    if mask is not None:
        launch(dy, weight, dx, ds, lora_A, mask, marks, ticket)
    else:
        launch(dy, weight, ds, lora_A, dx, marks, ticket)
    return dx
