"""Launch decisions of `lora_one_pass`, as those in `fastlora.kernels.config`."""

from __future__ import annotations

from .config import FEW_ROWS, LaunchConfig, cdiv, rank_block


def one_pass_makers(M: int, K: int, R: int, c: LaunchConfig, tiles: int, programs: int) -> int:
    """How many programs of `lora_one_pass` make s: those with a tile of y less than others.

    0 where s is left to a kernel of its own: that is as fast where rows of tiles are too many for the
    programs that have time, three each of a full tile's, and where sums are short.

    Forward, us on one H200 in a CUDA graph, in brackets with a kernel for s before: 8192 tokens, 4096 ->
    4096 402 (414), rank 64 398 (416), rank 128 408 (429); 14336 -> 4096 1335 (1386); 2048 tokens 93 (102),
    512 tokens 29 (34). With all programs making s instead it was never faster: 433, 1480 and 111 in
    another run. 8192 tokens, 4096 -> 1024, where 8 programs have time: 118 (111).
    """
    spare = programs - tiles % programs
    at_once = min(3 if c.BLOCK_N == 256 else 1, 256 // rank_block(R))
    return spare if M > FEW_ROWS and K >= 2048 and at_once * spare >= cdiv(M, c.BLOCK_M) else 0


def one_pass_stages(block_r: int) -> int:
    """Steps of x and A that are on their way while s is made: no more than the GEMM has room for."""
    return 184 // (16 + block_r // 8)
