"""The rank product of a tile of rows that have several adapters, gathered."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, rank_of


@triton.jit
def _add_slots(
    acc, s_ptr, b_ptr, slots, ranks_ptr, ids, count, r, top, offs_m, offs_n, N,
    stride_sm, stride_bl, stride_bn, stride_br,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr,
    UNEVEN: tl.constexpr,
):  # fmt: skip
    """``acc[m] + s[m] B[ids[m]]^T`` over BLOCK_R ranks of ``count`` slots, SLOTS of them in a product.

    Each slot has ``top`` ranks, or, if UNEVEN, at most so many: its own rank is read then, a load that those
    of s and B wait for. They are loaded to a multiple of 8 ranks, for a mask that changes inside of 16 bytes
    has each element loaded alone: there s is 0, and what is in B, of an adapter that was there before, is
    dropped.
    """
    offs_k = tl.arange(0, SLOTS * BLOCK_R)
    offs_r = r + offs_k % BLOCK_R
    for j in tl.range(0, count, SLOTS, num_stages=5 if PRECISION == "tf32" else 1):
        at = j + offs_k // BLOCK_R
        slot = tl.load(slots + at, mask=at < count, other=0)  # [SLOTS * BLOCK_R]
        # The pipeline keeps hints on arithmetic, not on a load.
        held = tl.max_constancy(tl.maximum(slot, 0), [BLOCK_R])
        near = (at < count) & (offs_r < top)
        if UNEVEN:
            ranks = tl.max_constancy(tl.maximum(rank_of(ranks_ptr, held, top), 0), [BLOCK_R])
            near &= (offs_r // 8) * 8 < ranks
        s = tl.load(
            s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :],
            mask=(ids[:, None] == held[None, :]) & near[None, :],
            other=0.0,
        )  # [BLOCK_M, SLOTS * BLOCK_R]
        b = tl.load(
            b_ptr + (held.to(tl.int64) * stride_bl + offs_r.to(tl.int64) * stride_br)[:, None]
            + offs_n[None, :] * stride_bn,
            mask=(offs_n[None, :] < N) & near[:, None],
            other=0.0,
        )  # [SLOTS * BLOCK_R, BLOCK_N]  # fmt: skip
        if UNEVEN:
            b = tl.where((offs_r < ranks)[:, None], b, 0.0)
        acc = dot(s.to(DTYPE), b.to(DTYPE), acc, PRECISION)  # [BLOCK_M, BLOCK_N]
    return acc


@triton.jit
def add_slot_products(
    acc, s_ptr, b_ptr, ids_ptr, slots_ptr, ranks_ptr, tile_m, offs_m, offs_n, M, N, R, width,
    stride_sm, stride_bl, stride_bn, stride_br,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``acc[m] + s[m] B[ids[m]]^T`` for one output tile, over the ``width`` slots that it may hold.

    Ranks go to the highest in the tile. A tile with a single adapter has a narrower product.
    """
    ids = tl.load(ids_ptr + offs_m, mask=offs_m < M, other=-1)  # [BLOCK_M]
    slots = slots_ptr + tile_m.to(tl.int64) * width
    offs_w = tl.arange(0, WIDTH)
    held = tl.load(slots + offs_w, mask=offs_w < width, other=-1)  # [WIDTH], -1 behind the last
    count = tl.sum((held >= 0).to(tl.int32), axis=0)
    uneven, top, depth = False, R, R
    if ranks_ptr is not None:
        ranks = tl.where(held >= 0, rank_of(ranks_ptr, tl.maximum(held, 0), R), 0)
        depth = tl.max(ranks, axis=0)
        least = tl.min(tl.where(held >= 0, ranks, R), axis=0)
        uneven = (least != depth) | (depth % 8 != 0)
        top = tl.where(uneven, R, (depth + 7) // 8 * 8)
    for r in tl.range(0, depth, BLOCK_R, num_stages=1):
        if uneven:
            acc = _add_slots(
                acc, s_ptr, b_ptr, slots, ranks_ptr, ids, count, r, R, offs_m, offs_n, N,
                stride_sm, stride_bl, stride_bn, stride_br,
                DTYPE, PRECISION, SLOTS, BLOCK_R, ranks_ptr is not None,
            )  # fmt: skip
        elif count == 1:
            acc = _add_slots(
                acc, s_ptr, b_ptr, slots, ranks_ptr, ids, count, r, top, offs_m, offs_n, N,
                stride_sm, stride_bl, stride_bn, stride_br, DTYPE, PRECISION, 1, BLOCK_R, False,
            )  # fmt: skip
        else:
            acc = _add_slots(
                acc, s_ptr, b_ptr, slots, ranks_ptr, ids, count, r, top, offs_m, offs_n, N,
                stride_sm, stride_bl, stride_bn, stride_br, DTYPE, PRECISION, SLOTS, BLOCK_R, False,
            )  # fmt: skip
    return acc
