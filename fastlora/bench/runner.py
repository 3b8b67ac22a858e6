"""Runs cases: checks, times, appends results; goes on after a failure, and where an earlier run stopped."""

from __future__ import annotations

import gc
import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fastlora.bench.cases import Case
from fastlora.bench.clock import (
    EAGER,
    EAGER_SAMPLE_MS,
    MAX_EAGER_CALLS,
    MAX_GRAPH_CALLS,
    Call,
    Captured,
    CaptureError,
    Clock,
    Samples,
    calls_for,
    estimate_ms,
    first_line,
    time_eager,
    time_graphs,
)
from fastlora.bench.making import make_workload
from fastlora.bench.registry import FLOOR, Provider
from fastlora.bench.results import ERROR, OK, OOM, WRONG, Result, Store, case_record
from fastlora.bench.workloads import (
    COPY,
    Contender,
    Workload,
    WrongNumbersError,
    in_words,
    schedules_of,
    tf32_products,
)

ATTEMPTS = 2
"""A case that ended the process this often is skipped."""


FEWER, FEWEST = 0.7, 0.4
"""Samples of a case outside of the tables as a share of theirs: 14 are enough for a comparison to show a
change, and 8 of a whole model, a step of which takes half a second."""


class RestartError(RuntimeError):
    """The process cannot go on: its CUDA context is lost, or a capture was left half done."""


class Listener(Protocol):
    """What is told of a run as it goes."""

    def case_began(self, case: Case) -> None:
        """A case is being prepared."""

    def case_ended(self, case: Case, seconds: float) -> None:
        """A case is done, or was skipped."""

    def block_timed(self, case: Case, results: list[Result]) -> None:
        """One mode of a case was timed; also called with failures alone."""

    def note(self, text: str) -> None:
        """Something that a reader should know."""


@dataclass
class Runner:
    """One run over a list of cases.

    Args:
        store (Store): where results go; what it holds already is not measured again.
        clock (Clock): the device.
        providers (dict[str, list[Provider]]): by suite.
        listener (Listener): is told what happens.
        repeats (int): samples of each callable. Default: 20.
        seed (int): of every tensor. Default: 0.
        time_limit (float | None): seconds after which no case is begun. Default: ``None``.
        now (Callable[[], float]): the time in seconds, for tests.
    """

    store: Store
    clock: Clock
    providers: dict[str, list[Provider]]
    listener: Listener
    repeats: int = 20
    seed: int = 0
    time_limit: float | None = None
    now: Callable[[], float] = time.monotonic
    _seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def run(self, cases: Sequence[Case]) -> list[Case]:
        """Run what is not done yet.

        Returns:
            list[Case]: the cases for which there was no time.

        Raises:
            RestartError: everything measured is on disk; the same run in a new process goes on.
        """
        began = self.now()
        for index, case in enumerate(cases):
            if not self._pending(case):
                self.listener.case_ended(case, 0.0)
                continue
            if self._unfinished(case):
                self.listener.case_ended(case, 0.0)
                continue
            spent = self.now() - began
            if self.time_limit is not None and spent + self._expected(case) > self.time_limit:
                return [c for c in cases[index:] if self._pending(c)]
            started = self.now()
            self.listener.case_began(case)
            self.store.append("begin", case=case.id)
            try:
                with tf32_products(getattr(case, "dtype", "") == "tf32"):
                    self._run_case(case)
            finally:
                # Also before a restart: what failed is on record and will not be tried again.
                seconds = self.now() - started
                self.store.append("end", case=case.id, seconds=round(seconds, 1))
            self._seconds[case.suite].append(seconds)
            self.listener.case_ended(case, seconds)
            if len(self._seconds[case.suite]) == 1 and self.clock.device.type == "cuda":
                # Every capture collects garbage: 0.2 s each if it had to look through what torch, PEFT and
                # transformers are made of, which this case has imported.
                gc.collect()
                gc.freeze()
        return []

    def _expected(self, case: Case) -> float:
        """How long the slowest of the last cases of the suite took."""
        return max(self._seconds[case.suite][-5:], default=0.0)

    def _unfinished(self, case: Case) -> bool:
        if self.store.results.unfinished.get(case.id, 0) < ATTEMPTS:
            return False
        self.listener.note(f"{case.id}: skipped, it ended the process {ATTEMPTS} times")
        return True

    def _providers_for(self, case: Case) -> list[Provider]:
        return [p for p in self.providers.get(case.suite, ()) if p.handles(case)]

    def _pending(self, case: Case) -> dict[tuple[str, str], list[Provider]]:
        """The blocks that lack a result, with the providers that belong into them."""
        done = self.store.results.results
        pending = {}
        for mode, schedules in schedules_of(case).items():
            for schedule in schedules:
                wanted = [p for p in self._providers_for(case) if p.graphable or schedule == EAGER]
                keys = [(case.id, mode, schedule, p.name) for p in wanted]
                floor = done.get((case.id, mode, schedule, FLOOR))
                if floor is not None and floor.status != OK:
                    continue  # without a floor there is nothing to compare with
                lacking = [key for key in keys if key not in done]
                if lacking or floor is None:
                    failed = {key[3] for key in keys if key in done and done[key].status != OK}
                    pending[mode, schedule] = [p for p in wanted if p.name not in failed]
        return pending

    def _run_case(self, case: Case) -> None:
        pending = self._pending(case)
        if self.clock.device.type == "cuda" and any(
            "compile" in p.name for p in self._providers_for(case)
        ):
            # Every case is compiled for its own shapes; past its limit dynamo would run them eagerly.
            importlib.import_module("torch._dynamo").reset()
        try:
            workload = make_workload(case, self.clock.device, self.seed)
            floors = workload.floors()
        except Exception as error:
            status, message = describe(error)
            results = [
                self._failure(case, block, name, label, status, message)
                for block in pending
                for name, label in [(FLOOR, "floor")] + [(p.name, p.label) for p in pending[block]]
            ]
            self._failed(case, results)
            return
        self.store.append(**_as_append(case_record(case), workload.facts()))
        contenders: dict[str, Contender] = {floor.name: floor for floor in floors}
        try:
            for provider in self._providers_for(case):
                if any(provider in wanted for wanted in pending.values()):
                    self._prepare(case, workload, provider, pending, contenders)
            for block, wanted in pending.items():
                names = [floor.name for floor in floors] + [p.name for p in wanted]
                taking_part = [contenders[name] for name in names if name in contenders]
                self._time_block(case, workload, block, taking_part)
        finally:
            contenders.clear()
            floors.clear()
            del workload
            self.clock.forget()

    def _prepare(
        self,
        case: Case,
        workload: Workload,
        provider: Provider,
        pending: dict[tuple[str, str], list[Provider]],
        contenders: dict[str, Contender],
    ) -> None:
        """Make and check a provider; one that fails is on record and takes part in no block."""
        try:
            contenders[provider.name] = workload.contender(provider)
            return
        except Exception as error:
            status, message = describe(error)
        blocks = [block for block, wanted in pending.items() if provider in wanted]
        self._failed(case, [
            self._failure(case, block, provider.name, provider.label, status, message)
            for block in blocks
        ])  # fmt: skip

    def _failure(
        self, case: Case, block: tuple[str, str], name: str, label: str, status: str, message: str
    ) -> Result:
        mode, schedule = block
        return Result(case.id, case.suite, mode, schedule, name, label, status, message)

    def _failed(self, case: Case, results: list[Result]) -> None:
        """Record failures; a new process is needed where the device does not work any more."""
        for result in results:
            self.store.append_result(result)
        self.listener.block_timed(case, results)
        self.clock.forget() if self.clock.healthy() else self._restart(results)

    def _restart(self, results: list[Result]) -> None:
        if not results:
            raise RestartError("the device does not work any more")
        r = results[0]
        raise RestartError(f"{r.case}, {r.mode}, {r.schedule}: {r.label}: {r.message}")

    def _time_block(
        self, case: Case, workload: Workload, block: tuple[str, str], contenders: list[Contender]
    ) -> None:
        """Warm up, capture where asked, and time in turns."""
        mode, schedule = block
        ready: dict[str, Contender] = {}
        counts: dict[str, int] = {}
        graphs: dict[str, Captured] = {}
        results: dict[str, Result] = {}
        stamp = time.time_ns() // 1000
        for contender in contenders:
            result = Result(
                case.id, case.suite, mode, schedule, contender.name, contender.label, block=stamp,
                errors=contender.errors, checked_at_p=contender.checked_at_p,
                saved_bytes=contender.saved_bytes if contender.name != FLOOR else None,
            )  # fmt: skip
            call, captured = contender.calls[mode], True
            try:
                ms = estimate_ms(self.clock, call)
                if schedule == EAGER:
                    counts[contender.name] = calls_for(
                        ms, MAX_EAGER_CALLS, sample_ms=EAGER_SAMPLE_MS
                    )
                    result.peak_bytes = self.clock.peak_bytes(call)
                else:
                    graphs[contender.name] = self._capture(workload, contender, mode, ms, result)
            except Exception as error:
                result.status, result.message = describe(error)
                captured = not isinstance(error, CaptureError)
            if result.status != OK:  # after the error is gone, with what its frames held
                self._failed(case, [result])
                if not captured:  # torch's generator may still believe that it is being captured
                    self._restart([result])
                continue
            ready[contender.name], results[contender.name] = contender, result
        share = {"table": 1.0, "finetune": FEWEST}.get(case.tag, FEWER)
        repeats = max(min(3, self.repeats), round(share * self.repeats))
        timed: dict[str, Samples]
        if not ready:
            return
        try:
            if schedule == EAGER:
                calls: dict[str, Call] = {name: c.calls[mode] for name, c in ready.items()}
                timed = time_eager(self.clock, calls, counts, repeats)
            else:
                timed = time_graphs(self.clock, graphs, repeats)
        except Exception as error:  # which of them it was cannot be told from a late CUDA error
            for result in results.values():
                result.status, result.message = describe(error)
            graphs.clear()
            self._failed(case, list(results.values()))
            return
        for name, samples in timed.items():
            for key, value in vars(samples).items():
                setattr(results[name], key, value)
            self.store.append_result(results[name])
        graphs.clear()
        self.clock.forget()
        self.listener.block_timed(case, list(results.values()))

    def _capture(
        self, workload: Workload, contender: Contender, mode: str, ms: float, result: Result
    ) -> Captured:
        """The graph, whose result is checked as the eager one was."""
        sets = 1 if contender.name == COPY else workload.sets
        graph = self.clock.capture(
            contender.calls[mode], calls_for(ms, MAX_GRAPH_CALLS, multiple=sets)
        )
        if contender.verify is not None:
            errors = contender.verify(mode, graph.output)
            if not all(error <= workload.tolerance for error in errors.values()):
                raise WrongNumbersError(f"wrong numbers in a CUDA graph: {in_words(errors)}")
            result.errors = {**result.errors, **errors}
        return Captured(graph.replay, graph.calls)


def _as_append(record: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    values = {**record, "facts": facts}
    values["kind"] = values.pop("type")
    return values


def describe(error: Exception) -> tuple[str, str]:
    """Status and one line for what went wrong."""
    message = first_line(error)
    if isinstance(error, WrongNumbersError):
        return WRONG, str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("out of memory", "ALLOC_FAILED")
    ):
        return OOM, "does not fit into this GPU's memory"
    return ERROR, message


def measure_ceilings(clock: Clock, repeats: int = 10) -> dict[str, float]:
    """What this card reaches: GB/s of a large copy (bytes read and written) and TFLOP/s of a bf16 product.

    Args:
        clock (Clock): the device.
        repeats (int): samples. Default: 10.

    Returns:
        dict[str, float]: ``copy_gb_per_s`` and ``matmul_tflop_per_s``.
    """
    large = clock.device.type == "cuda"
    elements, size = (2**29, 8192) if large else (2**16, 64)
    source = torch.ones(elements, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    generator = torch.Generator(clock.device).manual_seed(0)
    a, b = (
        torch.empty(size, size, dtype=torch.bfloat16, device=clock.device).normal_(
            generator=generator
        )
        for _ in range(2)
    )
    calls: dict[str, Call] = {"copy": lambda i: target.copy_(source), "matmul": lambda i: a @ b.t()}
    counts = {name: calls_for(estimate_ms(clock, c), MAX_EAGER_CALLS) for name, c in calls.items()}
    timed = time_eager(clock, calls, counts, repeats)
    ms = {name: sorted(s.device_ms)[len(s.device_ms) // 2] for name, s in timed.items()}
    clock.forget()
    return {
        "copy_gb_per_s": 2 * elements / ms["copy"] / 1e6,
        "matmul_tflop_per_s": 2 * size**3 / ms["matmul"] / 1e9,
    }
