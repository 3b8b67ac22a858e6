"""The problems that the benchmarks time, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))
DROPOUTS = (0.0, 0.1)
TOKENS, RANK, ALPHA = 8192, 16, 32.0

MAX_SETS = 8


@dataclass(frozen=True)
class Case:
    """One row of the table: sizes, dropout and dtypes."""

    M: int
    K: int
    N: int
    R: int
    p: float
    dtype: torch.dtype
    adapter_dtype: torch.dtype

    def __str__(self) -> str:
        """Sizes and dropout in words."""
        return f"{self.M} tokens, {self.K} -> {self.N}, r={self.R}, p={self.p:g}"


@dataclass(frozen=True)
class Problem:
    """The tensors of a case: several x and dy, so that successive calls do not meet a warm L2."""

    case: Case
    xs: tuple[Tensor, ...]
    dys: tuple[Tensor, ...]
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.weight.device


def default_cases(
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.bfloat16,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    dropouts: tuple[float, ...] = DROPOUTS,
    rank: int = RANK,
    adapter_dtype: torch.dtype | None = None,
) -> list[Case]:
    """Every shape with every dropout, shapes first."""
    return [
        Case(tokens, K, N, rank, p, dtype, adapter_dtype or dtype)
        for K, N in shapes
        for p in dropouts
    ]


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache, 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20))


def input_sets(case: Case, device: torch.device) -> int:
    """How many pairs of x and dy push each other out of L2 before their turn comes again."""
    pair = case.M * (case.K + case.N) * case.dtype.itemsize
    return min(MAX_SETS, max(2, -(-2 * l2_bytes(device) // max(1, pair))))


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Random tensors of a trained layer's size: y of order one and a LoRA branch that matters.

    Args:
        case (Case): sizes and dtypes.
        device (torch.device): where to put them.
        seed (int): of torch's generator of that device. Default: 0.

    Returns:
        Problem: x, lora_A and lora_B want gradients, weight does not.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
        t = torch.empty(rows, columns, dtype=dtype, device=device)
        return t.normal_(0.0, scale, generator=generator)

    sets = input_sets(case, device)
    return Problem(
        case=case,
        xs=tuple(draw(case.M, case.K, 1.0, case.dtype).requires_grad_() for _ in range(sets)),
        dys=tuple(draw(case.M, case.N, 1.0, case.dtype) for _ in range(sets)),
        weight=draw(case.N, case.K, case.K**-0.5, case.dtype),
        lora_A=draw(case.R, case.K, case.K**-0.5, case.adapter_dtype).requires_grad_(),
        lora_B=draw(case.N, case.R, case.R**-0.5, case.adapter_dtype).requires_grad_(),
        scaling=ALPHA / case.R,
    )
