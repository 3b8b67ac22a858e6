"""Launch decisions: pure functions of shape, dtype and architecture. No tensors, no Triton.

Figures are from one H100, where they name no H200 (triton 3.6.0, torch 2.11+cu130, bf16); an architecture
with no row of its own gets the pointer rows, whose shared memory fits every GPU since sm_80.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PHILOX_ROUNDS = 7
"""Rounds of Philox-4x32, for the kernels and for the reference.

Seven pass TestU01's BigCrush (Salmon et al., 2011, table 2); ten are the usual safety margin, which
costs a dropout kernel a tenth of its instructions.
"""

DROPOUT_LEVELS = 1 << 14
"""Dropout compares 14 random bits of an element, so ``p`` is rounded to a multiple of 2**-14."""

MAX_RANK = 256


def dropout_threshold(p: float) -> int:
    """How many of the 16384 levels are dropped: an element is kept iff its draw reaches this."""
    return round(p * DROPOUT_LEVELS)


def keep_scale(p: float) -> float:
    """The factor ``1 / (1 - p)`` of the kept elements, for the ``p`` that is really used.

    It is taken from the rounded probability, so that dropout keeps the mean exactly; 0 for ``p = 1``.
    """
    kept = DROPOUT_LEVELS - dropout_threshold(p)
    return DROPOUT_LEVELS / kept if kept else 0.0


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options of one kernel."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8
    SUBTILES: int = 1
    SPLITS: int = 1


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def rank_block(R: int) -> int:
    """The power of two, 16 at least as `tl.dot` needs, that holds a rank."""
    return max(16, next_power_of_2(R))


def rank_step(R: int, itemsize: int) -> int:
    """Ranks taken by one step of the rank product inside a GEMM: its tiles must fit beside the ring."""
    return min(128 // itemsize, rank_block(R))


def vector(size: int) -> int:
    """The power of two, 16 at most, that divides a size: how many elements may be loaded at once."""
    return math.gcd(size, 16)


def gemm_boxes(
    c: LaunchConfig, *, nk: bool = True, rank_product: bool = False, outputs: int = 1
) -> tuple[tuple[int, int], ...]:
    """Blocks of a TMA GEMM's descriptors: x, W (``[N, K]`` if ``nk``), perhaps s and B, and the outputs."""
    right = (c.BLOCK_N, c.BLOCK_K) if nk else (c.BLOCK_K, c.BLOCK_N)
    products = ((c.BLOCK_M, c.BLOCK_K), right) * (2 if rank_product else 1)
    return (*products, *[(c.BLOCK_M, c.BLOCK_N // c.SUBTILES)] * outputs)


def runs_beside(M: int, N: int, num_sms: int) -> bool:
    """Whether `lora_shrink` leaves room for the GEMM to begin beside it, where its share of time is large.

    8192 tokens, 4096 -> 1024: 112 us for both instead of 122; 2048 tokens, 4096 -> 4096: 103 instead of
    109. With more tiles the narrower ring costs what the overlap saves (4096 -> 4096: 429 and 432).
    """
    return cdiv(M, 128) * cdiv(N, 256) <= 4 * num_sms


def gemm_tma_config(
    M: int,
    N: int,
    itemsize: int,
    num_sms: int,
    masked_rank: int | None = None,
    beside: bool = False,
) -> LaunchConfig:
    """Tiles of the persistent TMA GEMMs with an ``[M, N]`` output; ``masked_rank`` is grad_x's with dropout.

    ``beside``: leave a quarter of an SM's shared memory to the kernel before, which then runs on beside
    this one.

    Without a mask, 128x256 with 4 stages and its output stored in halves is level with cuBLAS without LoRA
    (8192^3: 0.99, 8192 x 4096 x 4096: 1.02); 3 stages and a whole store are up to 0.02 behind. So are
    256x128 and GROUP_M of 4 or 16; 128x128 is 1.05 times as slow. With a mask, the rank product's
    operands need a stage's room. With fewer tiles than SMs, 128x128 loses less to idle SMs.
    """
    block_k = 128 // itemsize  # 128 bytes: one swizzle atom of shared memory
    if cdiv(M, 128) * cdiv(N, 256) >= num_sms:
        if beside:
            # In quarters a store leaves room for two programs of `lora_grad_ab`.
            return LaunchConfig(128, 256, block_k, num_warps=8, num_stages=3, SUBTILES=4)
        if masked_rank is None and itemsize == 2:
            return LaunchConfig(128, 256, block_k, num_warps=8, num_stages=4, SUBTILES=2)
        # Beside a ring of 3 x 48 KB, a whole tile (64 KB) and rank 16's operands just fit.
        whole = itemsize == 2 and masked_rank is not None and masked_rank <= 16
        subtiles = 1 if whole else 2
        return LaunchConfig(128, 256, block_k, num_warps=8, num_stages=3, SUBTILES=subtiles)
    return LaunchConfig(128, 128, block_k, num_warps=8, num_stages=4, SUBTILES=2)


DECODE_ROWS = 16
"""Rows up to which `lora_decode` makes y in one launch: each program streams x and A beside its part of W."""

FEW_ROWS = 256
"""Rows up to which cuBLAS adds the frozen product to LoRA's share: it splits the sum over K, so that each SM
has a part of it."""


def decodes(M: int, R: int, itemsize: int, dropout: bool) -> bool:
    """Whether `lora_decode` makes y and s: few rows, 16-bit, no mask, and an A that can be read often."""
    return M <= DECODE_ROWS and R <= 64 and itemsize == 2 and not dropout


def adds_to_rank_product(M: int, itemsize: int, device_type: str, fused_fp32: bool) -> bool:
    """Whether cuBLAS adds the frozen product to LoRA's share in y or dx.

    In fp32, unless ``fused_fp32``: 8192 tokens, 4096 -> 4096 on one H200, forward 3.8 times the floor (eager
    PyTorch 1.06), both passes 2.5 (1.07). A forward in TF32 is fused: 1.07 (1.33); its dx, whose weight wgmma
    would have to turn round, is not: both passes 3.1 (1.38).

    And of few rows in 16 bit: us on one H200 in a CUDA graph, weights cold, beside those of the TMA GEMM and
    of eager PyTorch: y of 64 rows, 4096 -> 4096: 19.6, 29.2 and 25.0; of 256 rows 25.6, 30.8 and 33.1; 64
    rows, 4096 -> 14336: 39.4, 49.6 and 46.8; a backward of 64 rows: 21.4, 31.5 and 31.3. Called eagerly that
    is four launches more for both passes, which C++ makes (`fastlora.replay`).
    """
    faster = M <= FEW_ROWS if itemsize == 2 else not fused_fp32
    return device_type == "cuda" and faster


def decode_config(
    N: int, R: int, itemsizes: tuple[int, int], by_vectors: bool, num_sms: int, major: int
) -> LaunchConfig:
    """Tiles of `lora_decode`: W is on its way in 96 KB of shared memory, in 200 of Hopper's for larger ranks.

    ``itemsizes`` are those of x and of A. us of 16 rows on one H200 in a CUDA graph, weights cold, in
    brackets cuBLAS without LoRA: rank 16, 4096 -> 4096 13.4 (12.9), with four warps, which repeat each
    other's product with A, 20; -> 1024 9.5 (8.0), with 32 columns 12.2; -> 14336 36.0 (30.4); 14336 -> 4096
    36.8 (32.2). Rank 64, 4096 -> 4096 14.1 (13.3); -> 14336 33.0 (30.2), with 32 columns 45.8. Rows that
    cannot be loaded by vectors come through registers, which a short step spares.
    """
    itemsize, a_itemsize = itemsizes
    warps = 2 if R <= 32 else 4
    block_n, block_k = 32, 512 // itemsize
    if R <= 32 and cdiv(N, 16) <= num_sms:
        block_n = 16
    elif R > 32 and cdiv(N, 64) >= num_sms:
        block_n, block_k = 64, 256 // itemsize
    if R > 32 and a_itemsize > itemsize:  # a step's cast of A is in registers
        block_k = 128
    block_k = block_k if by_vectors else 64
    stage = ((16 + block_n) * itemsize + rank_block(R) * a_itemsize) * block_k
    room = (96 if major != 9 or R <= 32 or block_n == 64 else 200) << 10
    stages = min(4, max(2, room // stage + 1))
    return LaunchConfig(16, block_n, block_k, num_warps=warps, num_stages=stages)


def expand_config(M: int, itemsize: int) -> LaunchConfig:
    """Tiles of `lora_expand`, which writes and does little else."""
    return LaunchConfig(16 if M <= 16 else 64, 256 // itemsize, 0, num_warps=4, num_stages=1)


def gemm_pointer_config(itemsize: int, precision: str) -> LaunchConfig:
    """Tiles of the pointer GEMMs: sm_80 and later, any strides."""
    if precision == "ieee" and itemsize == 4:
        return LaunchConfig(64, 64, 16, num_warps=4, num_stages=3)
    if itemsize == 4:
        return LaunchConfig(128, 64, 32, num_warps=4, num_stages=3)
    return LaunchConfig(128, 128, 32, num_warps=8, num_stages=4)


def shrink_beside_config(M: int, num_sms: int) -> LaunchConfig:
    """`shrink_config` for 16-bit x and rank 16 where the GEMM begins beside it: one wave of small programs.

    All of them must have begun before the GEMM may, and two of them leave the GEMM room on an SM.
    """
    block_m = 32 if cdiv(M, 16) > 2 * num_sms else 16
    return LaunchConfig(block_m, 16, 128, num_warps=4, num_stages=3 if block_m == 32 else 4)


def shrink_config(
    M: int,
    R: int,
    itemsize: int,
    num_sms: int,
    precision: str = "tf32",
    dropout: bool = False,
    a_itemsize: int = 0,
) -> LaunchConfig:
    """Rows by columns of x that one step of `lora_shrink` reads: ``BLOCK_M`` x ``BLOCK_K``.

    With dropout ``BLOCK_M`` stays at 32 so that the product runs on `mma.sync`: with 64 rows and more it
    would be a `wgmma` whose left operand, x after dropout, comes from registers, which ptxas before 13.3 can
    miscompile inside a pipelined loop (triton#9433). The product ``A x^T``, whose masked operand is in
    shared memory, takes 53 us where this took 42 (8192 x 4096, rank 16, p = 0.1). The random numbers want
    warps: of few rows 16 are better, 12 us instead of 17 at 2048 x 4096 on one H200, of many 32, 26 us
    instead of 29 at 8192 x 4096; rank 256 82 us with 64 columns, 95 with 32.

    Large ranks without dropout take 64 rows where that fills the GPU; us at 8192 x 4096 on one H200, with 32
    rows in brackets: rank 64 22 (32), 128 28 (42), 256 44 (55).
    """
    if precision == "ieee" and itemsize == 4:
        return LaunchConfig(32, 16, 32, num_warps=4, num_stages=3)
    if dropout and itemsize == 2 and R <= 32:
        rows = 32 if cdiv(M, 32) > num_sms else 16
        return LaunchConfig(rows, 16, 256, num_warps=4, num_stages=3)
    if dropout and itemsize == 2 and R > 64:
        return LaunchConfig(32, 16, 64, num_warps=4, num_stages=3)
    block_k = 128 if itemsize == 2 and R <= 128 else 64 if R <= 128 else 32
    if a_itemsize > itemsize and 32 < R <= 128:  # what is on its way of A takes twice the room
        return LaunchConfig(32, 16, block_k if R <= 64 else 64, num_warps=4, num_stages=3)
    full = 4 * cdiv(M, 64) >= 3 * num_sms
    if full and R > 32 and itemsize == 2 and not dropout and a_itemsize <= itemsize:
        if R <= 64:
            return LaunchConfig(64, 16, 128, num_warps=4, num_stages=3)
        if R <= 128:
            return LaunchConfig(64, 16, 64, num_warps=8, num_stages=4)
        return LaunchConfig(64, 16, 64, num_warps=4, num_stages=3)
    return LaunchConfig(32, 16, block_k, num_warps=4, num_stages=4 if R <= 64 else 3)


def shrink_splits(M: int, K: int, block_m: int, block_k: int, num_sms: int) -> int:
    """Into how many sums over K `lora_shrink` is split: for few rows, whose programs would leave SMs idle."""
    blocks = cdiv(M, block_m)
    if 8 * blocks > num_sms:
        return 1
    return max(1, min(num_sms // blocks, cdiv(K, block_k), 32))


def dora_norm_config(itemsize: int, R: int, precision: str) -> LaunchConfig:
    """Rows by columns of W that one step of `dora_norm` reads: ``BLOCK_N`` x ``BLOCK_K``.

    All of K is a program's, so rows are as few as `tl.dot` takes: 256 programs for 4096 rows. A step reads
    16 KB of A at most beside them, which come from L2. Not tuned on a GPU yet.
    """
    if precision == "ieee" and itemsize == 4:
        return LaunchConfig(16, 16, 32, num_warps=4, num_stages=3)
    block_k = min(512 // itemsize, (1 << 14) // (rank_block(R) * itemsize))
    return LaunchConfig(16, 16, block_k, num_warps=4, num_stages=3)


def merge_config(itemsize: int) -> LaunchConfig:
    """Tiles of `lora_merge`, by the size of an adapter's elements; not tuned on a GPU yet.

    fp32 products run without tensor cores and hold their operands in registers, so tiles are small.
    """
    if itemsize == 4:
        return LaunchConfig(0, 32, 64, num_warps=4, num_stages=1)
    return LaunchConfig(0, 64, 128, num_warps=4, num_stages=1)


@dataclass(frozen=True)
class ReduceConfig:
    """A pass over ``[M, C]`` that sums over rows: ``row_splits`` programs share a block of columns."""

    BLOCK_M: int
    BLOCK_C: int
    row_splits: int
    num_warps: int
    num_stages: int


def _row_splits(M: int, C: int, block_m: int, block_c: int, num_sms: int, per_sm: int) -> int:
    """As many row splits as fill the GPU ``per_sm`` deep, no more than there are row blocks."""
    return max(1, min(cdiv(M, block_m), num_sms * per_sm // cdiv(C, block_c)))


def grad_b_config(M: int, N: int, R: int, itemsize: int, num_sms: int) -> ReduceConfig | None:
    """Config of the pass that makes ds and dB from one read of dy, or ``None`` for two passes.

    It writes fp32 partial sums of ds, ``4 R / (BLOCK_C itemsize)`` of dy's own bytes: cheap for small
    ranks, dearer than reading dy twice above rank 32.
    """
    if R > 32:
        return None
    block_m, block_c = 64, 256 if itemsize == 2 else 64
    splits = _row_splits(M, N, block_m, block_c, num_sms, per_sm=1)
    return ReduceConfig(block_m, block_c, splits, num_warps=8, num_stages=3)


def grad_a_config(
    M: int,
    K: int,
    R: int,
    itemsize: int,
    num_sms: int,
    precision: str = "tf32",
    dropout: bool = False,
) -> ReduceConfig:
    """Config of ``dA = ds^T dropout(x)``, and of dB where it has a pass of its own.

    At 8192 x 4096 and rank 16: 29 us, 36 with a mask (41 with the blocks that are best without one).
    """
    if precision == "ieee" and itemsize == 4:
        block_m, block_c, warps = 16, 64 if R <= 64 else 32, 8
    elif dropout and R <= 32 and itemsize == 2:
        block_m, block_c, warps = 32, 256, 8
    else:
        block_m, block_c, warps = 64 if itemsize == 2 else 32, 128 if R <= 64 else 64, 4
    splits = _row_splits(M, K, block_m, block_c, num_sms, per_sm=2)
    return ReduceConfig(block_m, block_c, splits, num_warps=warps, num_stages=3)


def grad_ab_config(
    K: int,
    N: int,
    R: int,
    itemsize: int,
    num_sms: int,
    precision: str,
    dropout: bool = False,
) -> ReduceConfig:
    """Config of the launch that makes dA and dB while dx is computed beside it.

    A program takes a few columns over all rows, so that nothing is left to be summed. Up to rank 16 all
    programs are on the GPU at once, and small enough for the GEMM to fit beside two of them; above, beside
    one of them at most. It may be slow, for it has the
    time of the GEMM: 8192 tokens, 4096 -> 4096, rank 16: 54 us alone, of which dx beside it hides some 35.
    Larger ranks read as much of ds and s as of x and dy, which wants more loads on their way: us of both
    kernels on one H200, with the tiles before in brackets: rank 64 388 (409), 128 438 (545), 256 463 (588).
    Rank 32 without dropout, the whole backward: 470 us, with the tiles of rank 16 494. With dropout wider
    programs that nearly fill the GPU once: 1.21 instead of 1.22 of the floor at 4096 -> 4096 on one H200,
    1.31 instead of 1.32 of 2048 tokens; where they fill less of it, 1.64 and 1.54 (4096 -> 1024).
    """
    if precision == "ieee" and itemsize == 4:
        return ReduceConfig(16, 32, 1, num_warps=4, num_stages=2)
    block_c = 32
    while cdiv(K, block_c) + cdiv(N, block_c) > 2 * num_sms and block_c < 128:
        block_c *= 2
    if itemsize == 4:
        return ReduceConfig(32, min(block_c, 64), 1, num_warps=4, num_stages=2)
    if R > 32:
        return ReduceConfig(32, 64, 1, num_warps=4 if R <= 128 else 8, num_stages=4)
    programs = cdiv(K, 64) + cdiv(N, 64)
    if R > 16 and not dropout and programs <= num_sms:
        return ReduceConfig(128, 64, 1, num_warps=4, num_stages=4)
    if dropout and 3 * num_sms < 4 * programs <= 4 * num_sms:
        return ReduceConfig(64, 64, 1, num_warps=4, num_stages=3)
    return ReduceConfig(64, block_c, 1, num_warps=4, num_stages=3 if block_c > 32 else 4)


DS_ROWS = 64
"""Rows of ds that a mark of `lora_grad_ab_ds` stands for."""


def grad_ab_tma_config(K: int, N: int, R: int, num_sms: int) -> tuple[ReduceConfig, int, int, int]:
    """Config of `lora_grad_ab` by TMA, programs, those that may make ds, and stages of ds.

    30 KB, so that two programs fit beside the GEMM of dx on an SM; where there would be more, each takes
    several blocks of columns. us of the whole backward on one H200 in a CUDA graph, 8192 tokens, rank 16,
    without dropout, dx beside it, in brackets with pointers: 4096 -> 4096 452 (475), -> 14336 1546 (1601),
    8192 -> 8192 1753 (1801), 4096 -> 1024 126 (152). A step over 64 columns takes 87 instructions, one
    over 32 by pointers 84. Wider blocks have less room: 476 to 4096 with 128 columns.
    """
    blocks_b, blocks = cdiv(N, 64), cdiv(N, 64) + cdiv(K, 64)
    rounds = cdiv(blocks, 2 * num_sms)
    programs = cdiv(blocks, rounds)
    c = ReduceConfig(DS_ROWS, 64, 1, num_warps=4, num_stages=3 if R <= 64 else 2)
    deep = programs <= num_sms and R <= 32  # where each has an SM, and the room of two
    return c, programs, max(1, blocks_b - (rounds - 1) * programs), 5 if deep else c.num_stages


def grad_ab_makes_ds(M: int, K: int, N: int, R: int, num_sms: int, dropout: bool) -> bool:
    """Whether `lora_grad_ab_ds` makes ds too, in the time of the first tiles of dx, or a launch before.

    Not where most of it would wait for ds, which is dA, or where a program would make more than two blocks.
    us as above, in brackets with a launch for ds: 4096 -> 4096 465 (475), -> 14336 1506 (1527), 8192 -> 8192
    1721 (1746), 2048 tokens 4096 -> 4096 104 (112), but 14336 -> 4096 1614 (1571), 4096 -> 1024 132 (126),
    768 -> 3072 137 (90). With dropout dx adds ds A to a program's first tile at the end, up to rank 16, and
    only where an SM has one program of dA and dB: 4096 -> 4096 460 (488), 2048 tokens 103 (112), but -> 14336
    1644 (1610), 8192 -> 8192 1861 (1839).
    """
    _, programs, makers, _ = grad_ab_tma_config(K, N, R, num_sms)
    if M <= 2 * FEW_ROWS or N < K or cdiv(M, DS_ROWS) > 2 * makers:
        return False
    return R <= 64 and (not dropout or (R <= 16 and programs <= num_sms))


def dora_grad_config(M: int, N: int, itemsize: int, num_sms: int) -> ReduceConfig:
    """Config of `dora_grad`, a pass as wide as memory: 512 bytes of a row, and loads enough in flight.

    Not tuned on a GPU yet.
    """
    block_m, block_c = 16, 512 // itemsize
    splits = _row_splits(M, N, block_m, block_c, num_sms, per_sm=4)
    return ReduceConfig(block_m, block_c, splits, num_warps=4, num_stages=1)


def embedding_config(
    M: int, N: int, R: int, itemsize: int, num_sms: int, precision: str = "tf32"
) -> ReduceConfig:
    """Config of `lora_embedding`: ``row_splits`` programs share the columns of ``BLOCK_M`` rows.

    A block of B, ``BLOCK_C`` by the rank, takes 16 KB at most beside the rows on their way. Rows are
    split where there are too few of them to fill the GPU twice. Not tuned on a GPU yet.
    """
    block_m = 32 if cdiv(M, 32) >= 2 * num_sms else 16
    widest = 64 if precision == "ieee" and itemsize == 4 else 256
    block_c = max(16, min(widest, (1 << 14) // (rank_block(R) * itemsize)))
    splits = max(1, min(cdiv(N, block_c), 2 * num_sms // cdiv(M, block_m)))
    return ReduceConfig(block_m, block_c, splits, num_warps=4, num_stages=2)
