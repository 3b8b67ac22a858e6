"""The tensors of a case: of a trained layer's size, in enough copies to push each other out of L2."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import fastlora
from fastlora.bench.cases import ALPHA, DTYPES, ServeCase, TrainCase

MAX_SETS = 8


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache, 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20))


def sets_past_l2(bytes_of_a_set: int, device: torch.device) -> int:
    """How many sets of inputs push each other out of L2 before their turn comes again."""
    return min(MAX_SETS, max(2, -(-2 * l2_bytes(device) // max(1, bytes_of_a_set)) + 1))


class _Drawer:
    """Random tensors from one generator."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float, dtype: torch.dtype) -> Tensor:
        t = torch.empty(shape, dtype=dtype, device=self.device)
        return t.normal_(0.0, scale, generator=self.generator)


@dataclass(frozen=True)
class TrainProblem:
    """One linear and its adapter; several x and dy, so that successive calls do not meet a warm L2."""

    case: TrainCase
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

    @property
    def dtype(self) -> torch.dtype:
        """Of x and of the weight."""
        return self.weight.dtype


def make_train_problem(case: TrainCase, device: torch.device, seed: int = 0) -> TrainProblem:
    """Random tensors: y of order one, and a LoRA branch that matters.

    Args:
        case (TrainCase): sizes and dtypes.
        device (torch.device): where to put them.
        seed (int): of a generator of that device. Default: 0.

    Returns:
        TrainProblem: x, lora_A and lora_B want gradients, weight does not.
    """
    draw = _Drawer(device, seed)
    dtype, adapter_dtype = DTYPES[case.dtype], DTYPES[case.adapter_dtype]
    M, K, N, R = case.M, case.K, case.N, case.R
    sets = sets_past_l2(M * (K + N) * dtype.itemsize, device)
    return TrainProblem(
        case=case,
        xs=tuple(draw(M, K, scale=1.0, dtype=dtype).requires_grad_() for _ in range(sets)),
        dys=tuple(draw(M, N, scale=1.0, dtype=dtype) for _ in range(sets)),
        weight=draw(N, K, scale=K**-0.5, dtype=dtype),
        lora_A=draw(R, K, scale=K**-0.5, dtype=adapter_dtype).requires_grad_(),
        lora_B=draw(N, R, scale=R**-0.5, dtype=adapter_dtype).requires_grad_(),
        scaling=ALPHA / R,
    )


@dataclass(frozen=True)
class ServeSet:
    """What one call of a serving case reads."""

    x: Tensor
    dy: Tensor | None
    weight: Tensor
    lora_A: Tensor
    """``[slots, R, K]``."""
    lora_B: Tensor
    """``[slots, N, R]``."""


@dataclass(frozen=True)
class ServeProblem:
    """One linear whose rows use different adapters; several sets where the case is cold or trains."""

    case: ServeCase
    sets: tuple[ServeSet, ...]
    ids: Tensor
    """int64 ``[M]`` on the device: the slot of each row, -1 for none."""
    ids_list: tuple[int, ...]
    """The same, on the host."""
    slots: int
    scaling: float

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.ids.device

    @property
    def dtype(self) -> torch.dtype:
        """Of x and of the weights."""
        return self.sets[0].x.dtype

    @cached_property
    def ranks(self) -> Tensor | None:
        """The rank of each slot, where the stack has a table of them."""
        if self.case.layout != "requests":
            return None
        return torch.full((self.slots,), self.case.R, dtype=torch.int32, device=self.device)

    @cached_property
    def routing(self) -> fastlora.Routing:
        """The rows sorted by adapter: made once a step, shared by all layers."""
        return fastlora.route(self.ids, self.slots)

    @cached_property
    def rows_of(self) -> dict[int, Tensor]:
        """The rows of each adapter that occurs, as indices on the device."""
        return {
            slot: (self.ids == slot).nonzero().squeeze(1)
            for slot in sorted(set(self.ids_list))
            if slot >= 0
        }


def adapter_ids(case: ServeCase, slots: int, seed: int) -> list[int]:
    """The slot of each row; the live adapters lie spread over the slots."""
    if case.layout == "base":
        return [-1] * case.M
    live = [index * slots // case.live for index in range(case.live)]
    if case.layout == "blocks":
        return [live[row * case.live // case.M] for row in range(case.M)]
    generator = torch.Generator().manual_seed(seed)
    if case.layout == "requests":
        ends = torch.randperm(case.M - 1, generator=generator)[: case.live - 1].sort().values + 1
        return [live[int(run)] for run in torch.bucketize(torch.arange(case.M), ends, right=True)]
    if case.layout == "random":
        drawn = torch.randint(case.live, (case.M,), generator=generator).tolist()
        return [live[index] for index in drawn]
    return [slot for slot, _ in zip(itertools.cycle(live), range(case.M), strict=False)]


def make_serve_problem(case: ServeCase, device: torch.device, seed: int = 0) -> ServeProblem:
    """Random tensors, as for training; every slot is filled, live or not.

    Args:
        case (ServeCase): sizes and layout.
        device (torch.device): where to put them.
        seed (int): of the generators. Default: 0.

    Returns:
        ServeProblem: with gradients wanted where the case trains.
    """
    draw, dtype = _Drawer(device, seed), DTYPES[case.dtype]
    M, K, N, R, slots = case.M, case.K, case.N, case.R, max(case.slots, case.live)
    moved = case.work("forward")[1]
    # Warm: one set, as serving papers measure. A training step is large enough for two.
    count = sets_past_l2(moved, device) if case.cold else (2 if case.train else 1)
    sets: list[ServeSet] = []
    for _ in range(count):
        first = sets[0] if sets and case.train else None
        sets.append(
            ServeSet(
                x=draw(M, K, scale=1.0, dtype=dtype).requires_grad_(case.train),
                dy=draw(M, N, scale=1.0, dtype=dtype) if case.train else None,
                weight=first.weight if first else draw(N, K, scale=K**-0.5, dtype=dtype),
                lora_A=first.lora_A if first
                else draw(slots, R, K, scale=K**-0.5, dtype=dtype).requires_grad_(case.train),
                lora_B=first.lora_B if first
                else draw(slots, N, R, scale=R**-0.5, dtype=dtype).requires_grad_(case.train),
            )
        )  # fmt: skip
    ids = adapter_ids(case, slots, seed)
    return ServeProblem(
        case=case,
        sets=tuple(sets),
        ids=torch.tensor(ids, device=device),
        ids_list=tuple(ids),
        slots=slots,
        scaling=ALPHA / R,
    )
