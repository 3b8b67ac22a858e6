"""The dropout mask: counter-based Philox, the same draw whatever the tiling."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import IS_INTERPRETED
from .config import PHILOX_ROUNDS

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def _times(a, FACTOR: tl.constexpr):
    """High and low half of a product of 32 bits by 32, which is one instruction."""
    product = a.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(seed, c0, c1):
    """Philox-4x32 (Salmon et al., 2011) of counter ``(c0, c1, 0, 0)``: four words.

    `tl.philox` makes each half of a product by an instruction of its own.
    """
    seed = seed.to(tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c2 = c0 * 0
    c3 = c2
    for _ in tl.static_range(_ROUNDS):
        high_a, low_a = _times(c0, 0xD2511F53)
        high_b, low_b = _times(c2, 0xCD9E8D57)
        c0, c1 = high_b ^ c1 ^ k0, low_b
        c2, c3 = high_a ^ c3 ^ k1, low_a
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _reaches(word, threshold):
    """All ones in each half of a word whose draw, its low 14 bits, reaches the threshold.

    Numbers of so few bits are in the order of the fp16 numbers of their bits, of which one instruction
    compares two. 2.0 is past them all, so that a threshold of 16384 keeps nothing.
    """
    if IS_INTERPRETED:
        low, high = (word & 0x3FFF) >= threshold, ((word >> 16) & 0x3FFF) >= threshold
        kept = low.to(tl.uint32) * 0xFFFF | high.to(tl.uint32) * 0xFFFF0000
    else:
        pair = (threshold << 16 | threshold).to(tl.uint32)
        kept = tl.inline_asm_elementwise(
            "{ .reg .b32 draws; and.b32 draws, $1, 0x3fff3fff; set.ge.u32.f16x2 $0, draws, $2; }",
            "=r,r,r", [word, pair], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    return kept


@triton.jit
def draw_words(seed, rows, groups, threshold):
    """What is kept of 8 neighbouring columns, as 4 words of two halves: all ones in that of a kept element.

    One Philox-4x32 block of counter ``(g, m, 0, 0)`` gives element ``(m, 8 g + j)`` half ``j``; it is kept
    iff the low 14 bits of it reach ``threshold``. ``rows`` is ``[BLOCK_M, 1]``, ``groups``
    ``[1, BLOCK_K / 8]``, each word ``[BLOCK_M, BLOCK_K / 8]``.
    """
    c0, c1 = tl.broadcast(groups.to(tl.uint32), rows.to(tl.uint32))
    w0, w1, w2, w3 = _philox(seed, c0, c1)
    return (
        _reaches(w0, threshold), _reaches(w1, threshold),
        _reaches(w2, threshold), _reaches(w3, threshold),
    )  # fmt: skip


@triton.jit
def pack_bits(words):
    """The words of `draw_words` as a byte: bit ``j`` is element ``(m, 8 g + j)``."""
    w0, w1, w2, w3 = words
    bits = w0 & 0x20001 | w1 & 0x80004 | w2 & 0x200010 | w3 & 0x800040  # of each half the one bit
    return (bits | bits >> 16).to(tl.uint8)  # [BLOCK_M, BLOCK_K/8]


@triton.jit
def _word(bits, PAIR: tl.constexpr):
    """The word of elements ``2 PAIR`` and ``2 PAIR + 1``, from a byte."""
    if IS_INTERPRETED:
        low, high = bits >> 2 * PAIR & 1, bits >> 2 * PAIR + 1 & 1
        word = low * 0xFFFF | high * 0xFFFF0000
    else:
        # Their bits become the signs of two bytes, of which an instruction makes all of a half.
        signs = bits * ((1 << 15 - 2 * PAIR) + (1 << 30 - 2 * PAIR))
        word = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0xbb99;", "=r,r", [signs], dtype=tl.uint32, is_pure=True, pack=1
        )
    return word


@triton.jit
def where_kept(x, words, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """``x [BLOCK_M, BLOCK_K]`` where the words say so, and 0 elsewhere.

    A thread that has 8 neighbours of 16 bits takes an ``and`` for each word.
    """
    w0, w1, w2, w3 = words
    lane = tl.arange(0, 8)[None, None, :]
    left = tl.where(lane < 2, w0[:, :, None], w1[:, :, None])
    right = tl.where(lane < 6, w2[:, :, None], w3[:, :, None])
    word = tl.where(lane < 4, left, right)  # by tl.join the product would have a worse layout
    half = (word >> lane % 2 * 16).to(tl.uint16).reshape(BLOCK_M, BLOCK_K)
    if x.dtype.primitive_bitwidth == 16:
        x = (x.to(tl.uint16, bitcast=True) & half).to(x.dtype, bitcast=True)
    else:
        x = tl.where(half != 0, x, 0.0)
    return x


def mask_word(mask: Tensor | None, K: int) -> int:
    """Bytes of the mask of K columns to be loaded at once, 0 without one: WORD of the functions below.

    A pipelined loop loads ahead what has 4 bytes, and waits for what has one.
    """
    if mask is None:
        return 0
    return 4 if K % 32 == 0 and mask.data_ptr() % 4 == 0 else 1


@triton.jit
def load_packed(mask_ptr, offs_m, col_start, M, K, BLOCK_K: tl.constexpr, WORD: tl.constexpr):
    """A tile of the mask ``[M, ceil(K / 8)]`` as it is stored, WORD bytes in an element; 0 outside of it.

    ``col_start`` is a multiple of BLOCK_K.
    """
    columns: tl.constexpr = 8 * WORD
    row_words = (K + columns - 1) // columns
    offs_w = col_start // columns + tl.arange(0, BLOCK_K // columns)
    if WORD == 4:
        mask_ptr = mask_ptr.to(tl.pointer_type(tl.int32))
    return tl.load(
        mask_ptr + offs_m.to(tl.int64)[:, None] * row_words + offs_w[None, :],
        mask=(offs_m[:, None] < M) & (offs_w[None, :] < row_words),
        other=0,
    ).to(tl.int32)  # [BLOCK_M, BLOCK_K / (8 WORD)]


@triton.jit
def keep_tile(packed, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, WORD: tl.constexpr):
    """The boolean tile ``[BLOCK_M, BLOCK_K]`` of what `load_packed` gave, for sums in fp32.

    Rows past M are False; so are columns past K, but for those that share K's last byte, which are draws
    like any other.
    """
    bit = (1 << tl.arange(0, 8 * WORD))[None, None, :]
    return ((packed[:, :, None] & bit) != 0).reshape(BLOCK_M, BLOCK_K)


@triton.jit
def load_words(
    mask_ptr, offs_m, col_start, M, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """The words of `draw_words` for a tile of the mask, loaded as `load_packed` does."""
    packed = load_packed(mask_ptr, offs_m, col_start, M, K, BLOCK_K, WORD)
    if WORD == 4:
        shifts = tl.arange(0, 4)[None, None, :] * 8
        packed = ((packed[:, :, None] >> shifts) & 0xFF).reshape(BLOCK_M, BLOCK_K // 8)
    bits = packed.to(tl.uint32)  # [BLOCK_M, BLOCK_K/8]
    return _word(bits, 0), _word(bits, 1), _word(bits, 2), _word(bits, 3)
