"""The cases of ``python -m fastlora bench`` under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

Results are grouped by case and mode; a provider is checked against the reference before it is timed. The
suite is ``quick`` unless ``FASTLORA_BENCH_SUITE`` names another. Without a CUDA GPU only the checks run, on
small twins.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("fastlora") is None:  # a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import fastlora.bench  # noqa: F401 - registers the providers
from fastlora.bench.cases import Case, select
from fastlora.bench.clock import EAGER
from fastlora.bench.making import make_workload
from fastlora.bench.registry import FLOOR, Provider, choose
from fastlora.bench.runner import describe
from fastlora.bench.workloads import MODE_LABELS, Workload, schedules_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = select(os.environ.get("FASTLORA_BENCH_SUITE", "quick"))
PROVIDERS, _ = choose(("train", "serve", "model"), None, DEVICE, slow=False)

# pytest-benchmark skips what does not ask for its fixture, and warns of what does and times nothing.
only_checked = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")


def id_of(value: Any) -> str:
    return str(getattr(value, "id", getattr(value, "name", value)))


def pairs(cases: list[Case]) -> list[tuple[Case, Provider]]:
    return [(c, p) for c in cases for p in PROVIDERS[c.suite] if p.handles(c)]


@only_checked
@pytest.mark.parametrize(("case", "provider"), pairs([c.shrunk() for c in CASES]), ids=id_of)
def test_numbers(benchmark: Any, case: Case, provider: Provider) -> None:
    workload = make_workload(case, DEVICE)
    errors = workload.contender(provider).errors
    assert errors
    assert all(error <= workload.tolerance for error in errors.values())


@pytest.fixture(scope="module")
def workloads() -> Iterator[dict[str, Workload]]:
    """The workload of the case at hand: one at a time, since each may fill the GPU."""
    held: dict[str, Workload] = {}
    yield held
    held.clear()


TIMED = [
    (case, mode, name)
    for case in CASES
    for mode in schedules_of(case)
    for name in (FLOOR, *(p.name for p in PROVIDERS[case.suite] if p.handles(case)))
]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="nothing is timed without a CUDA GPU")
@pytest.mark.parametrize(
    ("case", "mode", "name"), TIMED if DEVICE.type == "cuda" else [(CASES[0], "", "")]
)
def test_time(
    benchmark: Any, workloads: dict[str, Workload], case: Case, mode: str, name: str
) -> None:
    """Eager calls, a sync after each. Graphs, turns and resumed runs are what the command is for."""
    if case.id not in workloads:
        workloads.clear()
        torch.cuda.empty_cache()
        importlib.import_module("torch._dynamo").reset()
        try:
            workloads[case.id] = make_workload(case, DEVICE)
        except torch.OutOfMemoryError:
            pytest.skip(f"{case.id} does not fit into this GPU's memory")
    workload = workloads[case.id]
    try:
        found = {c.name: c for c in workload.floors()}
        if name != FLOOR:
            provider = next(p for p in PROVIDERS[case.suite] if p.name == name)
            found[name] = workload.contender(provider)
    except torch.OutOfMemoryError as error:
        pytest.skip(" ".join(describe(error)))
    call = found[name].calls[mode]
    turn = iter(range(1 << 30))

    def timed() -> None:
        call(next(turn))
        torch.cuda.synchronize()

    benchmark.group = f"{case.id}: {MODE_LABELS[mode]}, {EAGER}"
    benchmark.extra_info.update(
        case=case.title, provider=found[name].label, errors=found[name].errors
    )
    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
