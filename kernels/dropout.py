"""The dropout mask: counter-based Philox, the same draw whatever the tiling."""

from __future__ import annotations

import triton
import triton.language as tl

from .config import PHILOX_ROUNDS

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def keep_bits(seed, rows, groups, threshold):
    """Keep bits of 8 neighbouring columns, packed: bit ``j`` of ``(m, g)`` is element ``(m, 8 g + j)``.

    One Philox-4x32 block of counter ``(g, m, 0, 0)`` gives 8 draws of 16 bits; a draw keeps its element
    iff it reaches ``threshold``. ``rows`` is ``[BLOCK_M, 1]``, ``groups`` ``[1, BLOCK_K / 8]``.
    """
    c0, c1 = tl.broadcast(groups.to(tl.uint32), rows.to(tl.uint32))  # [BLOCK_M, BLOCK_K/8]
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero, _ROUNDS)
    # A draw is the high half of a word, or its low half shifted up: both then compare with the same
    # 32 bits, strictly, so that a threshold of 65536 keeps nothing.
    t = ((zero + threshold) << 16) - 1
    bits = ((w0 << 16) > t).to(tl.int32) | ((w0 > t).to(tl.int32) << 1)
    bits |= (((w1 << 16) > t).to(tl.int32) << 2) | ((w1 > t).to(tl.int32) << 3)
    bits |= (((w2 << 16) > t).to(tl.int32) << 4) | ((w2 > t).to(tl.int32) << 5)
    bits |= (((w3 << 16) > t).to(tl.int32) << 6) | ((w3 > t).to(tl.int32) << 7)
    return bits  # [BLOCK_M, BLOCK_K/8]


@triton.jit
def unpack_bits(bits, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """``[BLOCK_M, BLOCK_K / 8]`` packed bytes to the boolean tile ``[BLOCK_M, BLOCK_K]``."""
    lanes = tl.arange(0, 8)[None, None, :]
    return (((bits[:, :, None] >> lanes) & 1) != 0).reshape(BLOCK_M, BLOCK_K)


@triton.jit
def load_bits(mask_ptr, offs_m, col_start, M, K, BLOCK_K: tl.constexpr):
    """``[BLOCK_M, BLOCK_K / 8]`` packed bytes from the mask ``[M, ceil(K / 8)]``; 0 outside of it.

    ``col_start`` is a multiple of 8.
    """
    row_bytes = (K + 7) // 8
    offs_g = col_start // 8 + tl.arange(0, BLOCK_K // 8)
    return tl.load(
        mask_ptr + offs_m.to(tl.int64)[:, None] * row_bytes + offs_g[None, :],
        mask=(offs_m[:, None] < M) & (offs_g[None, :] < row_bytes),
        other=0,
    ).to(tl.int32)  # [BLOCK_M, BLOCK_K/8]


@triton.jit
def load_keep(mask_ptr, offs_m, col_start, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The boolean keep tile ``[BLOCK_M, BLOCK_K]`` from the packed mask ``[M, ceil(K / 8)]``.

    Rows past M are False; so are columns past K, but for those that share K's last byte, which are draws
    like any other.
    """
    return unpack_bits(load_bits(mask_ptr, offs_m, col_start, M, K, BLOCK_K), BLOCK_M, BLOCK_K)
