"""What tuning goes over: linears, and for each op the neighbours of its default and the usual tiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastlora.kernels.config import rank_block
from fastlora.kernels.tuned import SPACES, Asked, Values, values_of

STEPS = ("forward", "backward", "dx alone", "dA alone", "dB alone")
"""What is timed of each linear."""

_GEMM_TILES = (
    (256, 128, 8),
    (128, 256, 8),
    (128, 128, 8),
    (128, 128, 4),
    (64, 256, 4),
    (64, 128, 4),
    (128, 64, 4),
    (64, 64, 4),
)
"""Rows, columns and warps: at most 128 accumulators a thread, beyond which they spill."""

_ONE_BY_ONE = {
    "num_stages": (2, 3, 4, 5),
    "num_warps": (4, 8),
    "GROUP_M": (4, 16),
    "SUBTILES": (1, 2, 4),
}
"""What is changed alone, with the tile of the default."""

_DEEPEST = 4
"""Stages that another tile is given at most: as many as fit into shared memory, and one fewer."""

MAX_ACCUMULATORS = 128


@dataclass(frozen=True)
class Shape:
    """A linear that is tuned for: x ``[M, K]``, weight ``[N, K]``, an adapter of rank R, dropout p.

    ``adapter_dtype`` is that of x where it is ``None``.
    """

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    p: float = 0.0
    adapter_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if self.adapter_dtype not in (None, self.dtype):
            name += f" with {str(self.adapter_dtype).removeprefix('torch.')} adapters"
        return f"{self.M} tokens, {self.K} -> {self.N}, r={self.R}, {name}, p={self.p:g}"


def candidates(asked: Asked, shared_bytes: int) -> list[dict[str, int]]:
    """What to try in place of a default.

    Args:
        asked (Asked): the op, its default, and what else decides about shared memory.
        shared_bytes (int): shared memory that a program may have on the GPU.

    Returns:
        list[dict[str, int]]: each once, without the default, all within `SPACES`. The estimate of shared
        memory is a lower bound: some may still be too large to be launched.
    """
    default, space = values_of(asked.default), SPACES[asked.op]
    found: list[dict[str, int]] = []

    def fits(c: Values) -> bool:
        return least_shared_bytes(asked, c) <= shared_bytes

    def add(c: dict[str, int]) -> None:
        allowed = all(v == default[k] or v in space.get(k, ()) for k, v in c.items())
        if allowed and fits(c) and c != default and c not in found and _in_registers(c):
            found.append(c)

    for name, values in _ONE_BY_ONE.items():
        for value in values if name in space else ():
            add(default | {name: value})
    for tile in _tiles(asked.op, default):
        depths = [s for s in range(_DEEPEST, 1, -1) if fits(default | tile | {"num_stages": s})]
        for stages in depths[:2]:
            add(default | tile | {"num_stages": stages})
    return found


def _tiles(op: str, default: Values) -> Iterator[dict[str, int]]:
    space = SPACES[op]
    if op.startswith(("lora_forward", "lora_grad_x")):
        # Without tensor cores, where the default's is 16, a product is unrolled: no deeper.
        free = "BLOCK_K" in space and default["BLOCK_K"] > 16
        depths = (32, 64) if free else (default["BLOCK_K"],)
        for (m, n, warps), k in itertools.product(_GEMM_TILES, depths):
            yield {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps}
        return
    columns = "BLOCK_K" if op == "lora_shrink" else "BLOCK_C"
    sizes = (default[columns] // 2, default[columns], default[columns] * 2)
    for m, c in itertools.product((16, 32, 64, 128), sizes):
        yield {"BLOCK_M": m, columns: c}


def least_shared_bytes(asked: Asked, c: Values) -> int:
    """What the ring of a kernel takes at least: pointer loads for `mma.sync` keep one stage fewer."""
    ranks, stages = rank_block(asked.R), c["num_stages"]
    if "BLOCK_C" in c:
        step = c["BLOCK_M"] * (c["BLOCK_C"] + ranks)
    elif asked.op == "lora_shrink":
        step = c["BLOCK_K"] * (c["BLOCK_M"] + ranks)
    else:
        step = c["BLOCK_K"] * (c["BLOCK_M"] + c["BLOCK_N"])
    if not asked.op.endswith("_tma"):
        return max(1, stages - 1) * step * asked.itemsize
    part = c["BLOCK_M"] * c["BLOCK_N"] // c["SUBTILES"]  # on its way out
    return (stages * step + part) * asked.itemsize


def _in_registers(c: Values) -> bool:
    if "BLOCK_N" not in c or "BLOCK_C" in c:
        return True
    return c["BLOCK_M"] * c["BLOCK_N"] <= MAX_ACCUMULATORS * 32 * c["num_warps"]


def describe_changes(default: Values, best: Values) -> str:
    """What differs, in words: ``BLOCK_M 64, num_warps 4``."""
    return ", ".join(f"{k} {v}" for k, v in best.items() if v != default[k]) or "nothing"
