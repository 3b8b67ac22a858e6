"""Launch decisions of the kernels for many adapters, as those in `fastlora.kernels.config`."""

from __future__ import annotations

from dataclasses import replace

try:
    from triton import __version__ as _triton
except ImportError:  # the tables of a routing have their sizes without it, too
    _triton = "0.0"

from .config import (
    LaunchConfig,
    ReduceConfig,
    cdiv,
    gemm_tma_config,
    grad_a_config,
    next_power_of_2,
    rank_block,
)


def multi_shrink_config(
    itemsize: int, R: int, precision: str, block_m: int, dropout: bool = False
) -> LaunchConfig:
    """Tiles of `lora_multi_shrink`: ``BLOCK_M`` gathered rows, ``BLOCK_N`` ranks, ``BLOCK_K`` of x.

    As `shrink_config`, but for a block of at most 64 ranks: past an adapter's own rank its programs end.
    A tile of 16 rows and ranks is one warp's: 22 us at 8192 x 4096 on one H200, where four, of which each
    two make the same, take 25. Drawing a mask wants them.
    """
    block_r = min(rank_block(R), 64)
    if precision == "ieee" and itemsize == 4:
        return LaunchConfig(block_m, block_r, 32, num_warps=4, num_stages=3)
    stages = 4 if block_r <= 32 else 3  # fp32 adapters beside 16-bit x take twice the room
    warps = 1 if block_r == 16 and itemsize == 2 and not dropout else 4
    return LaunchConfig(block_m, block_r, 256 // itemsize, num_warps=warps, num_stages=stages)


MULTI_BLOCK_M = 16
"""Rows of a block of `lora_multi_shrink`: few, so that a batch of many adapters pads few rows."""

MULTI_TILES = (64, 128)
"""Each BLOCK_M that the tiles of `lora_multi_gemm` may have."""


def multi_gemm_tma_config(
    M: int, N: int, itemsize: int, num_sms: int, masked_rank: int | None
) -> LaunchConfig:
    """Tiles of `lora_multi_gemm` by TMA: those of grad_x with dropout, whose loop it shares.

    Its rank product stands outside of the ring as well, so that the ring has three stages.
    """
    return gemm_tma_config(M, N, itemsize, num_sms, 64 if masked_rank is None else masked_rank)


MULTI_RING_CHUNK = 16
"""Tiles that a program of `lora_multi_gemm_ring` sorts at once: hexadecimal digits of a number."""


MULTI_SORTED_TILE = 128
"""The BLOCK_M that the tiles of `lora_multi_gemm_ring` have."""


def makes_pairs(R: int, itemsize: int) -> bool:
    """Whether s is written once more, for tiles of two adapters by TMA: in 16 bits, one block of ranks.

    8192 rows in blocks of 200, 32 adapters, rank 16, over the base product: 4096 -> 4096 1.13 (1.16 without),
    with a table of ranks 1.16 (1.21); -> 14336 1.12 (1.17), 1.14 (1.27) (one H200, in a graph).
    """
    return R <= 64 and R % 8 == 0 and itemsize == 2


MULTI_GATHER_ABOVE = 12
"""Adapters in more than half of the tiles from which on `lora_multi_gemm_ring` goes through the rows sorted.

8192 random rows, 4096 -> 4096, rank 16, over the base product, in brackets in the order they come in: of 8
adapters 1.24 (1.22), 12 1.24 (1.24), 16 1.25 (1.27), 32 1.26 (1.39); -> 14336 1.21 (1.19), 1.21 (1.22), 1.22
(1.25), 1.23 (1.36) (one H200, in a graph).
"""


def multi_ring_config(c: LaunchConfig) -> tuple[LaunchConfig, int]:
    """Tiles of `lora_multi_gemm_ring`, and the stages of the product of a tile with several adapters.

    The ring has a stage more than ``c``, of `multi_gemm_tma_config`, has: no operand stands beside it. In a
    tile with several adapters a store may still read its room when the next tile's loads begin.
    """
    return replace(c, num_stages=4, SUBTILES=2), 3


def slots_at_once(width: int, block_r: int, itemsize: int, b_itemsize: int) -> int:
    """Adapters that one product of `lora_multi_gemm` takes where a tile has several: 128 bytes of ranks.

    fp32 adapters beside 16-bit x come one by one: their tile takes twice the registers.
    """
    if b_itemsize > itemsize:
        return 1
    return max(1, min(next_power_of_2(width), 128 // (block_r * itemsize)))


def multi_gathers(M: int, K: int, R: int) -> bool:
    """Whether each row gathers its own B, even where rows share an adapter: ``M R / K`` of W's bytes."""
    return M <= 256 and M * R <= 4 * K


def multi_decode_config(
    M: int, N: int, itemsize: int, num_sms: int, early: bool = True
) -> LaunchConfig | None:
    """Tiles of `lora_multi_decode`, one launch for the product and the update, or ``None`` for two.

    16 rows, 4096 -> 4096, 16 adapters, rank 16: 10.0 us with the kernel that makes s (cuBLAS alone: 9.1).
    Where one program an SM is enough, no two may fit: ``early``, while programs that make s are there, pairs
    of them crowd onto some SMs, and it takes 15.5. With 64 rows the gather is not hidden: 22.5 at best, where
    cuBLAS and two kernels take 17.5 (an H200). -> 14336: 36.2 with a sixth stage, 37.5 without.
    """
    if M > 16:
        return None
    depth, wide = 256 // itemsize, cdiv(N, 64) >= num_sms
    tile = (64, depth) if wide else (32, 2 * depth)
    return LaunchConfig(16, *tile, num_warps=4, num_stages=6 if early else 5)


def rows_ranks(R: int, tile: int, num_warps: int, itemsize: int) -> int:
    """Ranks of B that are gathered at once for a tile of so many elements: 256 bytes a thread."""
    return max(2, min(rank_block(R), 8192 * num_warps // (tile * itemsize)))


FEW_BLOCK_M = 16 if tuple(map(int, _triton.split(".")[:2])) < (3, 5) else 8
"""Rows of a block of `lora_multi_shrink_blocks` and `lora_multi_add_blocks`: a tensor core's columns.

Triton 3.4 has no product of fewer than 16.
"""


def multi_reads_rows(M: int) -> bool:
    """Whether each row reads its own A and B, and adapters pass through L2 without staying.

    us with 64 rows, 64 adapters, 4096 -> 4096: rank 16 16.9, 17.3 where A goes by blocks; rank 64 33.5 and
    37.0. With 256 rows, of which four share an adapter: 34.3 and 29.6 (an H200, in a graph). With 16 rows
    everything fits into L2.
    """
    return 16 < M <= 64


def multi_shrink_rows_config(K: int, R: int, itemsize: int) -> tuple[int, int, int]:
    """Ranks and columns of a step of `lora_multi_shrink_rows`, 16 KB of A, and parts of K, 4 at most.

    Long rows and few parts: `lora_multi_add` loads each part.
    """
    block_k = min(4096 // itemsize, max(16, next_power_of_2(max(1, K))))
    return min(4, next_power_of_2(R)), block_k, max(1, min(4, K // block_k))


def multi_shrink_blocks_config(
    M: int, K: int, R: int, itemsize: int, a_itemsize: int
) -> tuple[LaunchConfig, int]:
    """Tiles of `lora_multi_shrink_blocks`, whose warps have BLOCK_K columns each, and parts of K.

    256 rows, 64 adapters, 4096 -> 4096: 5.0 us with 4 parts, 5.8 with 2 or 8, and 6.5 where a block has 16
    rows on the left. With 16 rows, where W is read beside it, -> 1024: 8.7 with 2, 9.4 with 4.
    """
    c = LaunchConfig(
        FEW_BLOCK_M,
        min(rank_block(R), 128 // a_itemsize),
        128 // itemsize,
        num_warps=4,
        num_stages=3,
    )
    return c, max(1, min(4, K * itemsize // (4096 if M <= 16 else 1024)))


def multi_add_config(R: int, itemsize: int) -> tuple[int, int]:
    """Columns and ranks of a program of `lora_multi_add`: 8 KB of B, all on their way at once."""
    block_r = min(rank_block(R), 64)
    return 8192 // (block_r * itemsize), block_r


def multi_add_blocks_config(R: int, itemsize: int) -> tuple[int, int]:
    """Columns and ranks of a program of `lora_multi_add_blocks`: 8 KB of B, or 16 at rank 64."""
    block_r = min(rank_block(R), 64)
    return max(256, 8192 // block_r) // itemsize, block_r


def multi_grad_config(
    M: int, K: int, R: int, L: int, itemsize: int, num_sms: int, precision: str
) -> ReduceConfig:
    """Config of `lora_multi_grad`: as `grad_a_config`, with a program an adapter and block of columns.

    Rows are split only where few adapters leave SMs idle: every split writes fp32 ``[L, R, K]``.
    """
    c = grad_a_config(M, K, R, itemsize, num_sms, precision)
    programs = cdiv(K, c.BLOCK_C) * min(L, M)
    splits = max(1, min(cdiv(M, c.BLOCK_M), 2 * num_sms // programs))
    return ReduceConfig(c.BLOCK_M, c.BLOCK_C, splits, c.num_warps, c.num_stages)


ROUTE_ROWS = 16384
"""Most rows that `lora_route_rows` sorts: it compares each two of them, which grows faster than a sort does.

With more rows the layers take so long that the launches of a sort by torch no longer count.
"""

ROUTE_TILE = 128
"""Most rows of a tile whose adapters `lora_route_tables` finds: it compares each two rows of a tile."""


def route_block(M: int, num_sms: int) -> int:
    """Rows of a program of `lora_route_rows`: as many as leave two programs an SM, 16 to 64.

    A program reads all ids, so that more rows have fewer reads each; 64 take 16 counters a thread.
    """
    block = 16
    while block < 64 and cdiv(M, block) > 2 * num_sms:
        block *= 2
    return block


def route_chunk(M: int) -> int:
    """Positions that a program of `lora_route_tables` takes at a step: all, or 2048, 8 a thread.

    Three sizes alone, so that few kernels are compiled for batches of many lengths.
    """
    return 128 if M <= 128 else 512 if M <= 512 else 2048
