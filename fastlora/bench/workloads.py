"""From a case and its providers to callables: each is checked against the reference before it is timed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora import reference
from fastlora.bench.cases import DTYPES, Case, ServeCase, TrainCase
from fastlora.bench.clock import EAGER, GRAPH, Call
from fastlora.bench.problems import ServeSet, make_serve_problem, make_train_problem
from fastlora.bench.registry import FLOOR, Layer, Provider, ServeProvider, TrainProvider

FORWARD, STEP, GENERATE = "forward", "step", "generate"

MODE_LABELS = {FORWARD: "forward", STEP: "forward + backward", GENERATE: "generation"}

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 2e-3}
"""Bounds on ``||got - want|| / ||want||``, for every provider alike; the reference is fp32."""

COPY = "copy"
"""A large copy, timed beside cold cases: bytes over its bandwidth is their bound."""
COPY_BYTES = 2**29


def schedules_of(case: Case) -> dict[str, tuple[str, ...]]:
    """The modes that are timed of a case, and how: eagerly, in a CUDA graph, or both."""
    if isinstance(case, TrainCase):
        return {STEP: (EAGER, GRAPH), FORWARD: (EAGER, GRAPH)}
    if isinstance(case, ServeCase):
        return {STEP if case.train else FORWARD: (GRAPH, EAGER)}
    return {GENERATE: (EAGER,)} if case.kind == "generate" else {STEP: (EAGER,), FORWARD: (EAGER,)}


class WrongNumbersError(RuntimeError):
    """A provider's result is not the reference's; it is not timed."""


@dataclass
class Contender:
    """What is timed of one provider."""

    name: str
    label: str
    calls: dict[str, Call]
    """By mode."""
    graphable: bool = True
    errors: dict[str, float] = field(default_factory=dict)
    checked_at_p: float = 0.0
    verify: Callable[[str, object], dict[str, float]] | None = None
    """Errors of what a call of a mode on the first set returned; ``None`` where masks differ."""
    saved_bytes: int | None = None
    """What a forward keeps for backward, beyond its arguments."""


class Workload(ABC):
    """A case with its tensors."""

    sets: int = 1
    tolerance: float

    @abstractmethod
    def floors(self) -> list[Contender]:
        """What everything is compared with, the floor itself first."""

    @abstractmethod
    def contender(self, provider: Provider) -> Contender:
        """Make and check.

        Raises:
            WrongNumbersError: an error is above the tolerance, or no number.
        """

    def facts(self) -> dict[str, Any]:
        """What a result must be read beside, such as the number of layers."""
        return {}

    def check(self, errors: dict[str, float]) -> None:
        """Raise for an error above the tolerance."""
        # NaN is not within it.
        if not all(error <= self.tolerance for error in errors.values()):
            raise WrongNumbersError(f"wrong numbers: {in_words(errors)}")


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Let fp32 products on the GPU round their operands to TF32, or not; references never do."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def in_words(errors: dict[str, float]) -> str:
    """Errors as text."""
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """``||got - want|| / ||want||`` of each tensor; a shape that differs is infinitely wrong."""
    errors = {}
    for name, wanted in want.items():
        if got[name].shape != wanted.shape:
            errors[name] = float("inf")
            continue
        error = (got[name].detach().float() - wanted).norm()
        errors[name] = float(error / wanted.norm().clamp_min(1e-30))
    return errors


def saved_bytes(forward: Callable[[], Tensor], given: Sequence[Tensor]) -> int:
    """What a forward saves for backward in memory of its own: ``given`` tensors are there anyway."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    for t in given:
        storages.pop(t.untyped_storage().data_ptr(), None)
    del y
    return sum(storages.values())


class TrainWorkload(Workload):
    """One LoRA linear, forward and forward + backward, eagerly and in a CUDA graph."""

    def __init__(self, case: TrainCase, device: torch.device, seed: int = 0) -> None:
        """Draw the tensors."""
        self.case, self.seed = case, seed
        self.problem = make_train_problem(case, device, seed)
        self.sets = len(self.problem.xs)
        self.tolerance = TOLERANCE[DTYPES[case.dtype]]
        self._wanted: dict[float, dict[str, Tensor]] = {}

    def floors(self) -> list[Contender]:
        """The frozen layer's two products."""
        weight, dys = self.problem.weight, self.problem.dys
        xs = [x.detach() for x in self.problem.xs]
        calls: dict[str, Call] = {
            FORWARD: lambda i: F.linear(xs[i % len(xs)], weight),
            STEP: lambda i: (F.linear(xs[i % len(xs)], weight), dys[i % len(dys)] @ weight),
        }
        return [Contender(FLOOR, "frozen layer alone (cuBLAS)", calls)]

    def contender(self, provider: Provider) -> Contender:
        """The layer; a provider with a mask of its own is checked without dropout."""
        assert isinstance(provider, TrainProvider)
        problem, p = self.problem, self.case.p
        checked_at_p = p if provider.same_mask else 0.0
        checked = provider.make(problem, checked_at_p)
        torch.manual_seed(self.seed)
        x = problem.xs[0]
        errors = self._errors(checked, checked_at_p, STEP, _step(checked, x, problem.dys[0]))
        self.check(errors)
        layer = checked if checked_at_p == p else provider.make(problem, p)
        xs, dys = problem.xs, problem.dys
        calls: dict[str, Call] = {
            FORWARD: lambda i: layer.forward(xs[i % len(xs)]),
            STEP: lambda i: _step(layer, xs[i % len(xs)], dys[i % len(dys)])[1:],
        }
        given = (*xs, problem.weight, layer.lora_A, layer.lora_B)

        def verify(mode: str, output: object) -> dict[str, float]:
            assert isinstance(output, (Tensor, tuple))
            found = (output,) if isinstance(output, Tensor) else (None, *output)
            return self._errors(layer, 0.0, mode, found)

        return Contender(
            provider.name, provider.label, calls, provider.graphable, errors, checked_at_p,
            verify=verify if p == 0 else None,
            # What a compiled function saves is its compiler's choice, and asking could compile it anew.
            saved_bytes=None
            if "compile" in provider.name
            else saved_bytes(lambda: layer.forward(x), given),
        )  # fmt: skip

    def _errors(
        self, layer: Layer, p: float, mode: str, found: tuple[Tensor | None, ...]
    ) -> dict[str, float]:
        if p not in self._wanted:
            with tf32_products(False):
                self._wanted[p] = self._reference(p)
        names = ("y", "dx", "dA", "dB")[: len(found)]
        got = {name: t for name, t in zip(names, found, strict=True) if t is not None}
        return relative_errors(got, {name: self._wanted[p][name] for name in got})

    def _reference(self, p: float) -> dict[str, Tensor]:
        problem = self.problem
        tensors = [problem.xs[0], problem.lora_A, problem.lora_B]
        x, lora_A, lora_B = (t.detach().float().requires_grad_() for t in tensors)
        torch.manual_seed(self.seed)
        y = reference.lora_linear(
            x, problem.weight.float(), lora_A, lora_B, scaling=problem.scaling, dropout_p=p
        )
        grads = torch.autograd.grad(y, (x, lora_A, lora_B), problem.dys[0].float())
        return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *grads), strict=True))


def _step(layer: Layer, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx, dA and dB."""
    y = layer.forward(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)


class ServeWorkload(Workload):
    """One linear whose rows use different adapters."""

    def __init__(self, case: ServeCase, device: torch.device, seed: int = 0) -> None:
        """Draw the tensors."""
        self.case, self.seed = case, seed
        self.problem = make_serve_problem(case, device, seed)
        self.sets = len(self.problem.sets)
        self.mode = STEP if case.train else FORWARD
        self.tolerance = TOLERANCE[DTYPES[case.dtype]]
        self._wanted: dict[float, dict[str, Tensor]] = {}

    def floors(self) -> list[Contender]:
        """The base layer, and beside cold cases a large copy."""
        sets = [(s.x.detach(), s.weight, s.dy) for s in self.problem.sets]

        def base(i: int) -> object:
            x, weight, dy = sets[i % len(sets)]
            y = F.linear(x, weight)
            return y if dy is None else (y, dy @ weight)

        found = [Contender(FLOOR, "base layer alone (cuBLAS)", {self.mode: base})]
        if self.case.cold:
            source = torch.empty(_copy_size(self.problem.device), dtype=torch.uint8)
            source = source.to(self.problem.device)
            target = torch.empty_like(source)
            copy: dict[str, Call] = {self.mode: lambda i: target.copy_(source)}
            found.append(Contender(COPY, f"copy of {source.numel() >> 20} MiB", copy))
        return found

    def contender(self, provider: Provider) -> Contender:
        """Checked without dropout where its mask is not the reference's."""
        assert isinstance(provider, ServeProvider)
        p = self.case.p
        checked_at_p = p if provider.same_mask else 0.0
        checked = replace(self.problem, case=replace(self.case, p=checked_at_p))
        torch.manual_seed(self.seed)
        call = self._call_of(provider.make(checked))
        errors = self._errors(checked_at_p, call(0))
        self.check(errors)
        if checked_at_p != p:
            call = self._call_of(provider.make(self.problem))
        return Contender(
            provider.name, provider.label, {self.mode: call}, provider.graphable, errors,
            checked_at_p, verify=(lambda _, output: self._errors(0.0, output)) if p == 0 else None,
        )  # fmt: skip

    def _call_of(self, forward: Callable[[ServeSet], Tensor]) -> Call:
        sets = self.problem.sets

        def serve(i: int) -> object:
            with torch.inference_mode():
                return forward(sets[i % len(sets)])

        def train(i: int) -> object:
            inputs = sets[i % len(sets)]
            y = forward(inputs)
            wanted = (inputs.x, inputs.lora_A, inputs.lora_B)
            return y.detach(), *torch.autograd.grad(y, wanted, inputs.dy)

        return train if self.case.train else serve

    def _errors(self, p: float, output: object) -> dict[str, float]:
        names = ("y", "dx", "dA", "dB") if self.case.train else ("y",)
        found: tuple[Any, ...] = output if isinstance(output, tuple) else (output,)
        if p not in self._wanted:
            with tf32_products(False):
                self._wanted[p] = self._reference(p)
        return relative_errors(dict(zip(names, found, strict=True)), self._wanted[p])

    def _reference(self, p: float) -> dict[str, Tensor]:
        problem, inputs, train = self.problem, self.problem.sets[0], self.case.train
        with torch.set_grad_enabled(train):
            # fp32 x makes the result fp32; the stacks are cast adapter by adapter.
            x = inputs.x.detach().float().requires_grad_(train)
            lora_A, lora_B = inputs.lora_A, inputs.lora_B
            torch.manual_seed(self.seed)
            y = reference.lora_linear_multi(
                x, inputs.weight.float(), lora_A, lora_B, problem.ids,
                scaling=problem.scaling, dropout_p=p,
            )  # fmt: skip
            if inputs.dy is None:
                return {"y": y}
            grads = torch.autograd.grad(y, (x, lora_A, lora_B), inputs.dy.float())
        wanted = (y.detach(), *(g.float() for g in grads))
        return dict(zip(("y", "dx", "dA", "dB"), wanted, strict=True))


def _copy_size(device: torch.device) -> int:
    return COPY_BYTES if device.type == "cuda" else 2**16
