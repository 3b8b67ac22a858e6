"""Measuring launch configurations on the GPU at hand: what is tried, how it is checked, and what is kept.

An op is timed within the step that it is part of, as the library launches it: the kernel that makes s may
run beside the product, and that of dA and dB beside dx, so that what is best alone need not be best there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.autograd import fused_backward, fused_forward
from fastlora.bench.clock import (
    MAX_GRAPH_CALLS,
    CaptureError,
    Clock,
    calls_for,
    estimate_ms,
    first_line,
    time_graphs,
)
from fastlora.bench.problems import sets_past_l2
from fastlora.bench.stats import Spread, spread
from fastlora.kernels.config import keep_scale
from fastlora.kernels.lora_grad_a import lora_grad_a
from fastlora.kernels.lora_grad_b import lora_grad_b
from fastlora.kernels.lora_product import lora_dx
from fastlora.kernels.lora_shrink import lora_shrink
from fastlora.kernels.tuned import Asked, Row, Values, trying, values_of
from fastlora.tune_candidates import STEPS, Shape, candidates, describe_changes
from fastlora.tune_file import TuneFile

MIN_GAIN = 0.01
"""A candidate must save more of its step's time than this, and than the noise, twice."""

REPEATS = 10
AT_ONCE = 6
"""Candidates that take turns with the default: each holds its results in a graph of its own."""

DEFAULT = "default"

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3}
"""Bounds on the difference between two orders of the same sums, over the norm: a few roundings."""

Answers = Mapping[str, Values]
Step = Callable[[int], tuple[Tensor | None, ...]]
Measure = Callable[[Step, Mapping[str, Answers]], Mapping[str, Spread]]
"""Times a step, with the answers that `fastlora.kernels.tuned.trying` takes, by name: ms a call."""


class TuneError(RuntimeError):
    """Tuning cannot go on in this process."""


@dataclass(frozen=True)
class Outcome:
    """What became of one row; ``row`` is ``None`` where the step did not run at all."""

    shape: Shape
    step: str
    key: str
    row: Row | None
    fresh: bool
    """Whether it was measured now, rather than found in the file."""
    message: str = ""


def make_steps(shape: Shape, device: torch.device) -> dict[str, Step]:
    """The steps of a shape by the names of `STEPS`, on inputs that rotate past L2."""
    M, K, N, R, dtype, p = shape.M, shape.K, shape.N, shape.R, shape.dtype, shape.p
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        made = torch.empty(size, dtype=dtype, device=device)
        return made.normal_(0.0, scale, generator=generator)

    sets = sets_past_l2(M * (K + N) * dtype.itemsize, device)
    xs, dys = [draw(M, K) for _ in range(sets)], [draw(M, N) for _ in range(sets)]
    weight, A, B = (draw(*size, scale=size[1] ** -0.5) for size in ((N, K), (R, K), (N, R)))
    adapter_dtype = shape.adapter_dtype or dtype
    A, B = A.to(adapter_dtype), B.to(adapter_dtype)
    seed = torch.tensor(7, device=device) if p > 0 else None
    with trying({}):
        made = [lora_shrink(x, A, 1.0, p, seed) for x in xs]
        dss = [lora_shrink(dy, B.t(), 1.0, factor=keep_scale(p))[0] for dy in dys]

    def forward(i: int) -> tuple[Tensor | None, ...]:
        return fused_forward(xs[i % sets], weight, None, A, B, seed, None, 1.0, p)

    def backward(i: int) -> tuple[Tensor | None, ...]:
        s, mask = made[i % sets]
        return fused_backward(
            dys[i % sets], xs[i % sets], weight, A, B, s, mask, None, 1.0, p, True, True, True
        )

    def dx(i: int) -> tuple[Tensor | None, ...]:
        return (lora_dx(dys[i % sets], weight, dss[i % sets], A, made[i % sets][1]),)

    def da(i: int) -> tuple[Tensor | None, ...]:
        return (lora_grad_a(xs[i % sets], dss[i % sets], made[i % sets][1], adapter_dtype),)

    def db(i: int) -> tuple[Tensor | None, ...]:
        return lora_grad_b(dys[i % sets], made[i % sets][0], B, 1.0, p)

    return dict(zip(STEPS, (forward, backward, dx, da, db), strict=True))


def measure_on(clock: Clock) -> Measure:
    """GPU time alone, of replays of CUDA graphs that take turns."""

    def measure(step: Step, variants: Mapping[str, Answers]) -> Mapping[str, Spread]:
        captured, calls = {}, 0
        for name, answers in variants.items():
            with trying(answers):  # a graph keeps the kernels that it was captured with
                ms = estimate_ms(clock, step)
                calls = calls or calls_for(ms, MAX_GRAPH_CALLS)
                captured[name] = clock.capture(step, calls)
        samples = time_graphs(clock, captured, REPEATS)
        return {name: spread(mine.device_ms) for name, mine in samples.items()}

    return measure


def difference(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> str:
    """What is wrong with results that should be ``want`` but for the order of sums; "" if nothing is.

    A single element may be off by four times the bound over the largest value, so that one bad tile shows.
    """
    if len(got) != len(want):
        return f"{len(got)} results instead of {len(want)}"
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if g is None or w is None:
            if g is not w:
                return f"result {i} is there once only"
            continue
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"result {i} is {g.dtype} {tuple(g.shape)}, not {w.dtype} {tuple(w.shape)}"
        if not g.dtype.is_floating_point:
            if not torch.equal(g, w):
                return f"result {i} differs"
            continue
        if not torch.isfinite(g).all():
            return f"result {i} is not finite"
        tolerance, error, exact = TOLERANCE[g.dtype], (g.float() - w.float()).abs(), w.float().abs()
        for norm, slack in ((torch.linalg.vector_norm, 1), (torch.amax, 4)):
            if norm(error) > slack * tolerance * norm(exact):
                return f"result {i} is off by {float(norm(error) / norm(exact)):.1e}"
    return ""


class Tuner:
    """Measures what a file does not have yet, and writes each row as soon as it is known.

    Args:
        file (TuneFile): where rows go.
        clock (Clock): the device.
        measure (Measure): the timing, `measure_on` the clock as a rule.
        shared_bytes (int): shared memory that a program may have.
        again (bool): measure what the file has too. Default: ``False``.
        deadline (float | None): of `time.monotonic`, after which no row is begun. Default: ``None``.
    """

    def __init__(
        self,
        file: TuneFile,
        clock: Clock,
        measure: Measure,
        shared_bytes: int,
        *,
        again: bool = False,
        deadline: float | None = None,
    ) -> None:
        self.file, self.clock, self.measure = file, clock, measure
        self.shared_bytes, self.again, self.deadline = shared_bytes, again, deadline
        self.out_of_time = False
        self._seen: set[str] = set()

    def tune(self, shape: Shape) -> Iterator[Outcome]:
        """Give an outcome for each row of a shape, in turn.

        Raises:
            TuneError: the GPU does not work any more; what was measured is in the file.
            OSError: the file cannot be written.
        """
        try:
            steps = make_steps(shape, self.clock.device)
        except torch.OutOfMemoryError as error:
            yield Outcome(shape, STEPS[0], "", None, True, first_line(error))
            return
        for name, step in steps.items():
            if self._late():
                return
            try:
                with trying({}) as trial:
                    want = [step(0), step(1)]
            except Exception as error:
                self._check_health("the default")
                yield Outcome(shape, name, "", None, True, first_line(error))
                continue
            for key, asked in trial.asked.items():
                if self._late():
                    return
                known = self.file.rows.get(key)
                if key in self._seen or (known and not self.again and _current(known, asked)):
                    yield Outcome(shape, name, key, known, False)
                    continue
                row = self._measure_row(step, key, asked, trial.asked, want)
                self.file.add(key, row)
                self._seen.add(key)
                self.clock.forget()
                yield Outcome(shape, name, key, row, True, row.note)

    def _measure_row(
        self,
        step: Step,
        key: str,
        asked: Asked,
        others: Mapping[str, Asked],
        want: Sequence[tuple[Tensor | None, ...]],
    ) -> Row:
        """Try every candidate of one op, with what is known already of the others in the step."""
        rows = self.file.rows
        base = {
            k: rows[k].best for k, a in others.items() if k != key and k in rows and _current(rows[k], a)
        }  # fmt: skip
        default = values_of(asked.default)
        good: dict[str, Values] = {}
        skipped = 0
        for candidate in candidates(asked, self.shared_bytes):
            name = describe_changes(default, candidate)
            problem = self._problem(step, base | {key: candidate}, want)
            if not problem:
                good[name] = candidate
                continue
            skipped += 1
            if not self.clock.healthy():
                note = f"not measured: with {name} the GPU failed: {problem}"
                # So that the next run does not meet it again.
                self.file.add(key, Row(default, default, 0.0, 0.0, len(good), skipped, note))
                raise TuneError(f"{key}: {note}; the same command goes on with the next")
        times = self._best(step, base, key, good)
        if times is None:
            alone = self.measure(step, {DEFAULT: base})[DEFAULT].median * 1e3
            return Row(default, default, alone, alone, len(good), skipped)
        name, before, after = times
        best = good.get(name, default)
        return Row(default, best, before * 1e3, after * 1e3, len(good), skipped)

    def _problem(
        self, step: Step, answers: Answers, want: Sequence[tuple[Tensor | None, ...]]
    ) -> str:
        try:
            with trying(answers):
                for i, right in enumerate(want):
                    _spoil_free_memory(right)
                    problem = difference(step(i), right)
                    if problem:
                        return problem
        except Exception as error:
            return first_line(error)
        return ""

    def _best(
        self, step: Step, base: dict[str, Values], key: str, good: Mapping[str, Values]
    ) -> tuple[str, float, float] | None:
        """The name of what is best, and ms of the default and of it; ``None`` without candidates."""
        names, found = list(good), []
        for first in range(0, len(names), AT_ONCE):
            variants: dict[str, Answers]
            variants = {name: base | {key: good[name]} for name in names[first : first + AT_ONCE]}
            times = self._time(step, {DEFAULT: base} | variants)
            before = times[DEFAULT]
            found += [(times[n].median / before.median, n, before, times[n]) for n in variants]
        if not found:
            return None
        _, name, before, after = min(found, key=lambda each: each[0])
        if is_faster(before, after):
            again = self._time(step, {DEFAULT: base, name: base | {key: good[name]}})
            before, after = again[DEFAULT], again[name]
            if is_faster(before, after):
                return name, before.median, after.median
        return DEFAULT, before.median, before.median

    def _time(self, step: Step, variants: Mapping[str, Answers]) -> Mapping[str, Spread]:
        try:
            return self.measure(step, variants)
        except CaptureError as error:
            raise TuneError(f"{error}; the same command goes on") from error
        finally:
            self.clock.forget()

    def _check_health(self, what: str) -> None:
        if not self.clock.healthy():
            raise TuneError(f"the GPU failed with {what}; start again")

    def _late(self) -> bool:
        self.out_of_time |= self.deadline is not None and time.monotonic() >= self.deadline
        return self.out_of_time


def is_faster(before: Spread, after: Spread) -> bool:
    """Whether a candidate saves more than noise."""
    return 1 - after.median / before.median > max(MIN_GAIN, before.noise, after.noise)


def _current(row: Row, asked: Asked) -> bool:
    """Whether a row was measured against today's default."""
    return row.default == values_of(asked.default)


def _spoil_free_memory(results: Sequence[Tensor | None]) -> None:
    """Leave NaN in what torch's pool gives out next: a tile that is not written must not find the old one."""
    sizes = [t for t in results if t is not None and t.dtype.is_floating_point]
    spoiled = [torch.full_like(t, float("nan")) for t in sizes]
    del spoiled
