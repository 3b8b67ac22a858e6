"""``y = x W^T + bias + s B[id]^T`` with each row's own adapter, forward and, for dx, backward.

The rank product of a tile of rows goes through the adapters that occur in it, a few at a time: rows of the
others load as zeros. A tile whose rows share an adapter thus costs what it costs with a single one.
"""

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
    aligned,
    device_properties,
    dot,
    dot_precision,
    has_pdl,
    has_tma,
    rows_fit_tma,
    store_tile,
    strides,
    tile_of,
    wait_for_previous_kernel,
)
from .config import LaunchConfig, cdiv, gemm_boxes, gemm_pointer_config, next_power_of_2, rank_step
from .config_multi import multi_decode_config, multi_gathers, multi_gemm_tma_config, slots_at_once
from .dropout import keep_tile, load_packed, mask_word
from .launch import Launch, cached_plan
from .multi_gemm_ring import lora_multi_gemm_ring
from .multi_slots import add_slot_products


@triton.jit
def _lora_multi_gemm_tma_kernel(
    x_desc, w_desc, y_desc, s_ptr, b_ptr, bias_ptr, mask_ptr, ids_ptr, slots_ptr, ranks_ptr,
    M, N, K, R, width, stride_sm, stride_bl, stride_bn, stride_br,
    W_IS_NK: tl.constexpr, HAS_BIAS: tl.constexpr, MASK_WORD: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """``y = keep * (s B[id]^T) + bias + x W^T`` by TMA. Grid: persistent, one program an SM.

    The rank product comes last, so that the frozen one need not wait for the kernel that makes s. With
    dropout (dx) it comes first, since the mask must not touch the frozen product. Without a mask in
    between ptxas would wait for every wgmma of a loop that begins with its result. Not flattened, as
    `_lora_grad_x_dropout_kernel`.
    """
    if MASK_WORD > 0:
        wait_for_previous_kernel(PDL)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        offs_m = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        offs_n = start_n.to(tl.int64) + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if MASK_WORD > 0:
            _, ranks = adapters_of_rows(ids_ptr, ranks_ptr, offs_m, M, R)
            drawn = tl.where(ranks > 0, offs_m, M)  # other rows have no mask
            packed = load_packed(mask_ptr, drawn, start_n, M, N, BLOCK_N, MASK_WORD)
            acc = add_slot_products(
                acc, s_ptr, b_ptr, ids_ptr, slots_ptr, ranks_ptr, tile_m, offs_m, offs_n, M, N, R, width,
                stride_sm, stride_bl, stride_bn, stride_br, y_desc.dtype, PRECISION, WIDTH, SLOTS, BLOCK_R,
            )  # fmt: skip
            acc = tl.where(keep_tile(packed, BLOCK_M, BLOCK_N, MASK_WORD), acc, 0.0)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            x = x_desc.load([start_m, k * BLOCK_K])  # [BLOCK_M, BLOCK_K]
            if W_IS_NK:  # noqa: SIM108 - the branches differ in type before the transpose
                w = w_desc.load([start_n, k * BLOCK_K]).T  # [BLOCK_K, BLOCK_N]
            else:
                w = w_desc.load([k * BLOCK_K, start_n])  # [BLOCK_K, BLOCK_N]
            acc = dot(x, w, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASK_WORD == 0:
            wait_for_previous_kernel(PDL)
            acc = add_slot_products(
                acc, s_ptr, b_ptr, ids_ptr, slots_ptr, ranks_ptr, tile_m, offs_m, offs_n, M, N, R, width,
                stride_sm, stride_bl, stride_bn, stride_br, y_desc.dtype, PRECISION, WIDTH, SLOTS, BLOCK_R,
            )  # fmt: skip
        if HAS_BIAS:
            acc = add_bias(acc, bias_ptr, offs_n, N)
        store_tile(y_desc, acc, start_m, start_n, BLOCK_M, BLOCK_N, SUBTILES)


@triton.jit
def _lora_multi_gemm_pointer_kernel(
    x_ptr, w_ptr, y_ptr, s_ptr, b_ptr, bias_ptr, mask_ptr, ids_ptr, slots_ptr, ranks_ptr,
    M, N, K, R, width, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_sm, stride_bl, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, MASK_WORD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``y = keep * (s B[id]^T) + bias + x W^T`` for any strides. Grid: one program a tile of y.

    The order is that of the TMA kernel.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    start_n = tile_n * BLOCK_N
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if MASK_WORD > 0:
        _, ranks = adapters_of_rows(ids_ptr, ranks_ptr, offs_m, M, R)
        drawn = tl.where(ranks > 0, offs_m, M)  # other rows have no mask
        packed = load_packed(mask_ptr, drawn, start_n, M, N, BLOCK_N, MASK_WORD)
        acc = add_slot_products(
            acc, s_ptr, b_ptr, ids_ptr, slots_ptr, ranks_ptr, tile_m, offs_m, offs_n, M, N, R, width,
            stride_sm, stride_bl, stride_bn, stride_br,
            y_ptr.dtype.element_ty, PRECISION, WIDTH, SLOTS, BLOCK_R,
        )  # fmt: skip
        acc = tl.where(keep_tile(packed, BLOCK_M, BLOCK_N, MASK_WORD), acc, 0.0)
    acc = add_frozen_product(
        acc, x_ptr, w_ptr, offs_m, offs_n, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    if MASK_WORD == 0:
        acc = add_slot_products(
            acc, s_ptr, b_ptr, ids_ptr, slots_ptr, ranks_ptr, tile_m, offs_m, offs_n, M, N, R, width,
            stride_sm, stride_bl, stride_bn, stride_br,
            y_ptr.dtype.element_ty, PRECISION, WIDTH, SLOTS, BLOCK_R,
        )  # fmt: skip
    if HAS_BIAS:
        acc = add_bias(acc, bias_ptr, offs_n, N)
    tl.store(
        y_ptr + offs_m[:, None] * N + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


@cached_plan
def _tiles(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    w_shape: tuple[int, ...],
    w_stride: tuple[int, ...],
    device: torch.device,
    R: int,
    masked: bool,
    is_aligned: bool,
    precision: str,
    deterministic: bool,
) -> tuple[str, LaunchConfig | None]:
    (M, _), (N, K), itemsize = shape, w_shape, dtype.itemsize
    major, num_sms = device_properties(device)
    if not masked and precision == "tf32" and multi_gathers(M, K, R):
        decode = multi_decode_config(M, N, itemsize, num_sms, has_pdl(device))
        if decode is not None:
            return "decode", decode
        if not deterministic:  # torch then refuses cuBLAS without a setting of its workspace
            return "add", None
    dense = rows_fit_tma(w_shape, w_stride, itemsize) or rows_fit_tma(
        (K, N), w_stride[::-1], itemsize
    )
    # The product's own rows, y, are as aligned as N is.
    fits = dense and rows_fit_tma(shape, stride, itemsize) and N * itemsize % 16 == 0
    if has_tma(major) and precision == "tf32" and is_aligned and fits:
        return "tma", multi_gemm_tma_config(M, N, itemsize, num_sms, R if masked else None)
    return "pointer", gemm_pointer_config(itemsize, precision)


def multi_gemm_tiles(
    x: Tensor, weight: Tensor, R: int, masked: bool = False
) -> tuple[str, LaunchConfig | None]:
    """Which kernel computes ``x weight^T`` and the rank product, and its tiles: the caller routes by BLOCK_M.

    Args:
        x (Tensor): ``[M, K]``.
        weight (Tensor): ``[N, K]``, any strides.
        R (int): the rank of the stacked adapters.
        masked (bool): whether dropout's mask is applied to the rank product. Default: ``False``.

    Returns:
        tuple: ``"decode"`` for `lora_multi_decode`, ``"add"`` for `lora_multi_add`, ``"tma"`` or
        ``"pointer"`` for `lora_multi_gemm`, and the launch configuration, which ``"add"`` has none of.
    """
    return _tiles(
        x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), x.device, R, masked,
        aligned(x, weight), dot_precision(x.dtype, x.shape[1]),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


@cached_plan
def _plan(
    kind: str,
    c: LaunchConfig,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    w_stride: tuple[int, ...],
    b_shape: tuple[int, ...],
    b_stride: tuple[int, ...],
    b_dtype: torch.dtype,
    s_stride: tuple[int, ...],
    device: torch.device,
    width: int,
    has_bias: bool,
    word: int,
    precision: str,
) -> Launch:
    (M, K), (_, N, R) = shape, b_shape
    num_sms = device_properties(device)[1]
    tiles = cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N)
    block_r = min(rank_step(R, dtype.itemsize), 32)  # adapters of lower rank pad less
    options: dict[str, Any] = {
        "HAS_BIAS": has_bias, "MASK_WORD": word, "PRECISION": precision,
        "BLOCK_M": c.BLOCK_M, "BLOCK_N": c.BLOCK_N,
        "BLOCK_K": c.BLOCK_K, "GROUP_M": c.GROUP_M, "BLOCK_R": block_r, "WIDTH": next_power_of_2(width),
"SLOTS": slots_at_once(width, block_r, dtype.itemsize, b_dtype.itemsize),
        "num_warps": c.num_warps, "num_stages": c.num_stages,
    }  # fmt: skip
    b_strides = strides(b_shape, b_stride)
    if kind == "tma":
        pdl = has_pdl(device)
        return Launch(
            _lora_multi_gemm_tma_kernel, (min(num_sms, tiles),), device,
            M, N, K, R, width, s_stride[0], *b_strides,
            boxes=gemm_boxes(c, nk=w_stride[1] == 1), W_IS_NK=w_stride[1] == 1,
            SUBTILES=c.SUBTILES, PDL=pdl, launch_pdl=pdl, **options,
        )  # fmt: skip
    return Launch(
        _lora_multi_gemm_pointer_kernel, (tiles,), device,
        M, N, K, R, width, *strides(shape, stride), *strides((N, K), w_stride), s_stride[0],
        *b_strides, **options,
    )  # fmt: skip


def lora_multi_gemm(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    ranks: Tensor | None,
    routing: tuple[Tensor, ...],
    tiles: tuple[str, LaunchConfig],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    pair: Tensor | None = None,
) -> Tensor:
    """``y = x W^T + bias + mask * (s B[l]^T)`` in the dtype of x, contiguous; l is each row's adapter.

    With ``x=dy, weight=W0.t(), s=ds, lora_B=A.transpose(1, 2)`` it is dx.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        weight (Tensor): ``[N, K]`` in the dtype of x, any strides.
        s (Tensor): ``[M, R]``, rows dense, zeros in rows without an adapter, as `lora_multi_shrink` gives it.
        lora_B (Tensor): ``[L, N, R]``, any strides, cast to the dtype of x for the product.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        routing (tuple): ``ids [M]`` and the slots of tiles of BLOCK_M rows, made before s; where tiles are
            ``"tma"`` also ``order [M]`` and the slots of tiles of sorted rows.
        tiles (tuple): of `multi_gemm_tiles`.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.
        mask (Tensor | None): packed keep mask ``[M, ceil(N / 8)]``. Default: ``None``.
        pair (Tensor | None): as `lora_multi_gemm_ring` takes it. Default: ``None``.

    Returns:
        Tensor: ``[M, N]``.
    """
    (kind, c), (ids, slots, *_) = tiles, routing
    if kind == "tma" and mask is None:
        made = lora_multi_gemm_ring(x, weight, s, lora_B, ranks, routing, c, bias, pair)
        if made is not None:
            return made
    launch = _plan(
        kind, c, x.shape, x.stride(), x.dtype, weight.stride(), lora_B.shape, lora_B.stride(),
        lora_B.dtype, s.stride(), x.device, slots.shape[1], bias is not None,
        mask_word(mask, lora_B.shape[1]),
        dot_precision(x.dtype, x.shape[1]),
    )  # fmt: skip
    y = torch.empty((x.shape[0], lora_B.shape[1]), dtype=x.dtype, device=x.device)
    if kind != "tma":
        launch(x, weight, y, s, lora_B, bias, mask, ids, slots, ranks)
        return y
    dense = weight if weight.stride(1) == 1 else weight.t()
    launch(x, dense, y, s, lora_B, bias, mask, ids, slots, ranks)
    return y
