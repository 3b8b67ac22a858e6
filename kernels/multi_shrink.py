"""``s = scaling * dropout(x) A[id]^T`` with each row's own adapter: one read of x."""

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
from .config import cdiv, dropout_threshold, keep_scale
from .config_multi import MULTI_SORTED_TILE, multi_shrink_config
from .dropout import draw_words, pack_bits, where_kept
from .launch import Launch, cached_plan


@triton.jit
def _store_pair(
    pair_ptr, slots_ptr, s, slot, here, offs_m, offs_r, M, R, width, stride_sm, TILE: tl.constexpr
):
    """Store s of rows whose adapter is in ``slot``, at the first or the second place of their tile's list.

    It goes to the same of the two parts of ``pair``, and zeros to the other: to all ranks, for the other
    adapter of the tile may have more.
    """
    second = tl.load(
        slots_ptr + offs_m // TILE * width + 1, mask=here & (width > 1), other=-1
    )  # [BLOCK_M]
    for part in tl.static_range(2):
        mine = ((second == slot) & (slot >= 0)) == (part == 1)
        tl.store(
            pair_ptr + (part * M + offs_m)[:, None] * stride_sm + offs_r[None, :],
            tl.where(mine[:, None], s, 0.0).to(pair_ptr.dtype.element_ty),
            mask=here[:, None] & (offs_r[None, :] < R),
        )


@triton.jit
def _lora_multi_shrink_kernel(
    x_ptr, a_ptr, s_ptr, mask_ptr, order_ptr, sorted_ids_ptr, starts_ptr, scaling_ptr, ranks_ptr,
    seed_ptr, slots_ptr, pair_ptr, threshold, factor, M, K, R, width,
    stride_xm, stride_xk, stride_al, stride_ar, stride_ak, stride_sm,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``s[m, r] = factor * scaling[l] * sum_k keep[m, k] x[m, k] A[l, r, k]``.

    Grid: ``(blocks of rows, blocks of ranks)``. A program gathers at most BLOCK_M rows that share adapter
    l; blocks that are not used, and ranks past the adapter's own, end at once. As many rows without an
    adapter, which come first in the order, get zeros from it: s has to be whole where the product reads it
    tile by tile. With ``pair_ptr``, which takes one block of ranks, s is written there for tiles of two
    adapters, too.
    """
    if EARLY:  # the next kernel reads what the one before this makes, without waiting for it
        wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    start = tl.load(starts_ptr + tl.program_id(0))
    bare = tl.load(starts_ptr)
    if tl.program_id(0) * BLOCK_M < bare:
        position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_m = tl.load(order_ptr + position, mask=position < bare, other=0).to(tl.int64)
        offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        tl.store(
            s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :],
            tl.zeros((BLOCK_M, BLOCK_R), dtype=s_ptr.dtype.element_ty),
            mask=(position < bare)[:, None] & (offs_r[None, :] < R),
        )
        if pair_ptr is not None:
            _store_pair(
                pair_ptr, slots_ptr, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), -1, position < bare,
                offs_m, offs_r, M, R, width, stride_sm, TILE,
            )  # fmt: skip
    if start < M:
        slot = tl.load(sorted_ids_ptr + start).to(tl.int64)
        rank = rank_of(ranks_ptr, slot, R)
        start_r = tl.program_id(1) * BLOCK_R
        # With dropout the first block of ranks draws the mask, which rank 0 does not need.
        if start_r < rank:
            here, offs_m = block_of_rows(order_ptr, sorted_ids_ptr, start, slot, M, BLOCK_M)
            offs_r = start_r + tl.arange(0, BLOCK_R).to(tl.int64)
            offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
            offs_g = tl.arange(0, BLOCK_K // 8)
            row_bytes = (K + 7) // 8
            if HAS_DROPOUT:
                seed = tl.load(seed_ptr)
            acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                x = tl.load(
                    x_ptr + offs_m[:, None] * stride_xm + (k + offs_k)[None, :] * stride_xk,
                    mask=here[:, None] & (k + offs_k[None, :] < K),
                    other=0.0,
                )  # [BLOCK_M, BLOCK_K]
                a = tl.load(
                    a_ptr + slot * stride_al
                    + offs_r[None, :] * stride_ar + (k + offs_k)[:, None] * stride_ak,
                    mask=(offs_r[None, :] < rank) & (k + offs_k[:, None] < K),
                    other=0.0,
                )  # [BLOCK_K, BLOCK_R]  # fmt: skip
                if HAS_DROPOUT:
                    groups = k // 8 + offs_g
                    words = draw_words(seed, offs_m[:, None], groups[None, :], threshold)
                    tl.store(
                        mask_ptr + offs_m[:, None] * row_bytes + groups[None, :],
                        pack_bits(words),
                        mask=here[:, None] & (groups[None, :] < row_bytes) & (start_r == 0),
                    )
                    x = where_kept(x, words, BLOCK_M, BLOCK_K)
                acc = dot(x, a.to(x.dtype), acc, PRECISION)  # [BLOCK_M, BLOCK_R]
            acc *= tl.load(scaling_ptr + slot) * factor
            near = tl.minimum((rank + 7) // 8 * 8, R)  # the product reads ranks by eights
            tl.store(
                s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :],
                acc.to(s_ptr.dtype.element_ty),
                mask=here[:, None] & (offs_r[None, :] < near),
            )
            if pair_ptr is not None:
                _store_pair(
                    pair_ptr, slots_ptr, acc, slot, here, offs_m, offs_r, M, R, width, stride_sm, TILE
                )  # fmt: skip
        elif pair_ptr is not None:  # an adapter without ranks beside another one
            here, offs_m = block_of_rows(order_ptr, sorted_ids_ptr, start, slot, M, BLOCK_M)
            _store_pair(
                pair_ptr, slots_ptr, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), slot, here,
                offs_m, tl.arange(0, BLOCK_R), M, R, width, stride_sm, TILE,
            )  # fmt: skip


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    a_shape: tuple[int, ...],
    a_stride: tuple[int, ...],
    device: torch.device,
    blocks: int,
    block_m: int,
    has_dropout: bool,
    precision: str,
    early: bool,
    width: int,
) -> Launch:
    (M, K), R = shape, a_shape[1]
    c = multi_shrink_config(dtype.itemsize, R, precision, block_m, has_dropout)
    pdl = has_pdl(device)
    return Launch(
        _lora_multi_shrink_kernel, (blocks, cdiv(R, c.BLOCK_N)), device,
        M, K, R, width, *strides(shape, stride), *strides(a_shape, a_stride),
        padded_columns(R, dtype.itemsize),
        HAS_DROPOUT=has_dropout, PRECISION=precision,
        PDL=pdl, EARLY=early, launch_pdl=pdl and early, TILE=MULTI_SORTED_TILE,
        BLOCK_M=block_m, BLOCK_K=c.BLOCK_K, BLOCK_R=c.BLOCK_N,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_multi_shrink(
    x: Tensor,
    lora_A: Tensor,
    scaling: Tensor,
    ranks: Tensor | None,
    routing: tuple[Tensor, Tensor, Tensor],
    block_m: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    factor: float = 1.0,
    early: bool = False,
    tile_slots: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``s = factor * scaling[l] * dropout(x) A[l]^T`` row by row, and the packed keep mask.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        lora_A (Tensor): ``[L, R, K]``, any strides, cast to the dtype of x for the product.
        scaling (Tensor): fp32 ``[L]``.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        routing (tuple): ``order [M]``, ``sorted_ids [M]`` and the starts of blocks of ``block_m`` rows.
        block_m (int): rows of a block.
        dropout_p (float): probability of dropping an element of x. Default: 0.0.
        seed (Tensor | None): 0-dim int64; needed when ``dropout_p > 0``.
        factor (float): one more factor, applied in fp32. Default: 1.0.
        early (bool): come onto the GPU while the kernel before still runs: for calls so short that a launch
            counts. Default: ``False``.
        tile_slots (Tensor | None): the slots of tiles of `MULTI_SORTED_TILE` rows, if s is wanted for tiles
            of two adapters too; R is at most 64 then. Default: ``None``.

    Returns:
        tuple: s ``[M, R]`` in the dtype of x with rows padded to 16 bytes, zeros in rows without an adapter;
        the mask as `lora_shrink` gives it; and, with ``tile_slots``, s twice, ``[2 M, R]``: rows of the first
        part are zeros but for the first adapter of their tile, rows of the second but for its second one.
        Mask bits of rows without an adapter, and s past a row's rank rounded up to 8, are left unwritten: no
        consumer reads them.
    """
    (M, K), R = x.shape, lora_A.shape[1]
    order, sorted_ids, starts = routing
    has_dropout = dropout_threshold(dropout_p) > 0
    launch = _plan(
        x.shape, x.stride(), x.dtype, lora_A.shape, lora_A.stride(), x.device,
        starts.shape[0], block_m, has_dropout, dot_precision(x.dtype), early,
        0 if tile_slots is None else tile_slots.shape[1],
    )  # fmt: skip
    s = empty_rows(M, R, x.dtype, x.device)
    mask = torch.empty((M, cdiv(K, 8)), dtype=torch.uint8, device=x.device) if has_dropout else None
    pair = None if tile_slots is None else empty_rows(2 * M, R, x.dtype, x.device)
    launch(
        x, lora_A, s, mask, order, sorted_ids, starts, scaling, ranks, seed, tile_slots, pair,
        dropout_threshold(dropout_p), keep_scale(dropout_p) * factor,
    )  # fmt: skip
    return s, mask, pair
