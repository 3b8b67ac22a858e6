"""Runs of the benchmark suite on small twins, through a clock that makes time up; the command; the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

pytest.importorskip("rich", reason="the commands print through rich")

import fastlora.bench
from fastlora import dispatch
from fastlora.bench import runner
from fastlora.bench.cases import Case, ModelCase, ServeCase, TrainCase, select
from fastlora.bench.clock import Captured, CaptureError, Clock, HostClock
from fastlora.bench.correctness import check_cases
from fastlora.bench.making import make_workload
from fastlora.bench.registry import FLOOR, Layer, Provider, TrainProvider, choose, providers_of
from fastlora.bench.results import ERROR, OK, OOM, WRONG, Result, Store, load
from fastlora.bench.runner import RestartError, Runner
from fastlora.bench.workloads import COPY, STEP, TrainWorkload

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
TINY = TrainCase("table", M=24, K=40, N=56, R=4, p=0.1, dtype="fp32", adapter_dtype="fp32")
PLAIN = replace(TINY, p=0.0)
MIXED = ServeCase("table", M=12, live=3, R=4, K=24, N=40, slots=6, dtype="fp32", cold=True)


@pytest.fixture(autouse=True)
def eager_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels have tests of their own; through the interpreter these would take minutes.

    Not on the GPU: many adapters on the eager path read their ids on the host, which no graph can hold.
    """
    with nullcontext() if request.node.get_closest_marker("gpu") else dispatch.force("eager"):
        yield


class FakeClock(HostClock):
    """Runs a callable once for a sample, which takes as long as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = True
        self.captures = 0
        self.fail_capture_number = 0

    def eager_sample(self, call: Any, first: int, calls: int) -> tuple[float, float, float]:
        call(first)
        return 2.0, 2.5, 0.5

    def capture(self, call: Any, calls: int) -> Captured:
        self.captures += 1
        if self.captures == self.fail_capture_number:
            raise CaptureError("no CUDA graph: a sync")
        return Captured(lambda: None, calls, call(0))

    def graph_sample(self, captured: Captured) -> float:
        return 1.0

    def peak_bytes(self, call: Any) -> int:
        return 1 << 20

    def healthy(self) -> bool:
        return self.alive


class Listener:
    def __init__(self) -> None:
        self.began: list[str] = []
        self.notes: list[str] = []

    def case_began(self, case: Case) -> None:
        self.began.append(case.id)

    def case_ended(self, case: Case, seconds: float) -> None: ...

    def block_timed(self, case: Case, results: list[Result]) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def train_providers(*extra: TrainProvider) -> dict[str, list[Provider]]:
    known = providers_of("train")
    return {"train": [known["fastlora"], known["eager"], *extra]}


def make_runner(
    folder: Path, providers: dict[str, list[Provider]], clock: Clock | None = None, **options: Any
) -> Runner:
    return Runner(Store(folder), clock or FakeClock(), providers, Listener(), 3, **options)


def provider(name: str, make: Callable[[Any, float], Layer]) -> TrainProvider:
    """A provider that is in no registry."""
    kind = type(name, (TrainProvider,), {
        "name": name, "label": name, "make": lambda self, problem, p: make(problem, p),
    })  # fmt: skip
    return kind()


def eager(problem: Any, p: float) -> Layer:
    made = providers_of("train")["eager"]
    assert isinstance(made, TrainProvider)
    return made.make(problem, p)


def raising(error: Exception) -> Callable[[Any, float], Layer]:
    def make(problem: Any, p: float) -> Layer:
        raise error

    return make


def test_every_mode_and_schedule_is_timed_once(tmp_path: Path) -> None:
    made = make_runner(tmp_path, train_providers())
    assert made.run([TINY]) == []
    found = load(tmp_path)
    blocks = found.blocks()
    assert {key[1:] for key in blocks} == {
        (mode, schedule) for mode in ("step", "forward") for schedule in ("eager", "graph")
    }
    for rows in blocks.values():
        assert [row.provider for row in rows] == [FLOOR, "fastlora", "eager"]
        assert all(row.status == OK and len(row.device_ms) == 3 for row in rows)
    ours = found.results[TINY.id, "step", "eager", "fastlora"]
    assert ours.checked_at_p == TINY.p  # with its mask
    assert set(ours.errors) == {"y", "dx", "dA", "dB"}
    assert max(ours.errors.values()) < 1e-5
    assert found.results[TINY.id, "step", "eager", "eager"].checked_at_p == 0.0
    assert (ours.peak_bytes, ours.host_ms) == (1 << 20, [0.5] * 3)
    assert found.results[TINY.id, "step", "graph", "fastlora"].host_ms == []
    assert found.unfinished == {}


def test_a_second_run_measures_what_is_missing(tmp_path: Path) -> None:
    make_runner(tmp_path, train_providers()).run([TINY])
    lines = len((tmp_path / "results.jsonl").read_text().splitlines())
    again = make_runner(tmp_path, train_providers())
    again.run([TINY])
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == lines
    more = make_runner(tmp_path, train_providers(provider("mine", eager)))
    more.run([TINY, PLAIN])
    found = load(tmp_path).results
    assert (PLAIN.id, "step", "graph", "mine") in found
    assert found[TINY.id, "step", "eager", "mine"].status == OK


def test_wrong_numbers_and_crashes_are_not_timed(tmp_path: Path) -> None:
    def wrong(problem: Any, p: float) -> Layer:
        layer = eager(problem, p)
        return Layer(lambda x: layer.forward(x) * 1.1, layer.lora_A, layer.lora_B)

    def nan(problem: Any, p: float) -> Layer:
        layer = eager(problem, p)
        return Layer(lambda x: layer.forward(x) * torch.nan, layer.lora_A, layer.lora_B)

    peers = (
        provider("wrong", wrong),
        provider("nan", nan),
        provider("crash", raising(RuntimeError("no such kernel\nand more"))),
        provider("large", raising(torch.OutOfMemoryError("CUDA out of memory. Tried"))),
        provider("cublas", raising(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"))),
    )
    make_runner(tmp_path, train_providers(*peers)).run([TINY])
    found = load(tmp_path).results
    status = {name: found[TINY.id, "step", "eager", name].status for _, _, _, name in found}
    assert status == {
        FLOOR: OK, "fastlora": OK, "eager": OK, "wrong": WRONG, "nan": WRONG, "crash": ERROR,
        "large": OOM, "cublas": OOM,
    }  # fmt: skip
    crashed = found[TINY.id, "forward", "graph", "crash"]
    assert crashed.message == "RuntimeError: no such kernel"
    assert not crashed.device_ms
    assert "wrong numbers" in found[TINY.id, "step", "eager", "wrong"].message


@pytest.mark.parametrize("numbers", ["other", "nan"])
def test_a_graph_with_other_numbers_is_wrong(tmp_path: Path, numbers: str) -> None:
    class StaleClock(FakeClock):
        def capture(self, call: Any, calls: int) -> Captured:
            output = call(1)  # another set of inputs than the one asked for
            if numbers == "nan":
                output = tree_map(lambda t: torch.full_like(t, torch.nan), output)
            return Captured(lambda: None, calls, output)

    made = make_runner(tmp_path, train_providers(), StaleClock())
    made.run([PLAIN])
    found = load(tmp_path).results
    assert found[PLAIN.id, "step", "eager", "fastlora"].status == OK
    for mode in ("step", "forward"):
        stale = found[PLAIN.id, mode, "graph", "fastlora"]
        assert stale.status == WRONG
        assert "in a CUDA graph" in stale.message


def test_a_case_too_large_for_the_gpu_is_skipped_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(case: Case, *args: Any) -> Any:
        if case is TINY:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_workload(case, *args)

    monkeypatch.setattr(runner, "make_workload", make)
    make_runner(tmp_path, train_providers()).run([TINY, PLAIN])
    found = load(tmp_path).results
    skipped = found[TINY.id, "step", "eager", "fastlora"]
    assert (skipped.status, skipped.message) == (OOM, "does not fit into this GPU's memory")
    assert found[PLAIN.id, "step", "eager", "fastlora"].status == OK


def test_failed_capture_restarts_and_is_not_tried_again(tmp_path: Path) -> None:
    clock = FakeClock()
    clock.fail_capture_number = 2  # fastlora's, after the floor's
    said = rf"^{re.escape(TINY.id)}, step, graph: fastlora: CaptureError: no CUDA graph: a sync$"
    with pytest.raises(RestartError, match=said):
        make_runner(tmp_path, train_providers(), clock).run([TINY])
    again = make_runner(tmp_path, train_providers())
    assert again.run([TINY]) == []
    found = load(tmp_path).results
    assert found[TINY.id, "step", "graph", "fastlora"].status == ERROR
    assert found[TINY.id, "step", "graph", "eager"].status == OK
    assert found[TINY.id, "forward", "graph", "fastlora"].status == OK


def test_a_lost_device_restarts(tmp_path: Path) -> None:
    clock = FakeClock()

    def lose(problem: Any, p: float) -> Layer:
        clock.alive = False
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    providers = train_providers(provider("killer", lose))
    with pytest.raises(RestartError, match="illegal memory access"):
        make_runner(tmp_path, providers, clock).run([TINY, PLAIN])
    assert make_runner(tmp_path, providers).run([TINY]) == []
    found = load(tmp_path).results
    assert found[TINY.id, "step", "graph", "killer"].status == ERROR
    assert found[TINY.id, "step", "graph", "fastlora"].status == OK


def test_an_error_that_surfaces_in_the_turns_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*args: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(runner, "time_eager", late)
    make_runner(tmp_path, train_providers()).run([TINY])
    found = load(tmp_path).results
    assert found[TINY.id, "step", "eager", "fastlora"].status == ERROR
    assert found[TINY.id, "step", "graph", "fastlora"].status == OK


def test_a_case_that_ended_the_process_twice_is_skipped(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        store.append("begin", case=TINY.id)
    made = make_runner(tmp_path, train_providers())
    made.run([TINY, PLAIN])
    assert isinstance(made.listener, Listener)
    assert made.listener.began == [PLAIN.id]
    assert TINY.id in made.listener.notes[0]


def test_no_case_begins_that_would_pass_the_time_limit(tmp_path: Path) -> None:
    times = iter(range(0, 10_000, 30))  # 30 s pass between two looks at the clock
    made = make_runner(tmp_path, train_providers(), time_limit=100.0, now=lambda: next(times))
    assert made.run([TINY, PLAIN]) == [PLAIN]
    assert (PLAIN.id, "step", "eager", "fastlora") not in load(tmp_path).results


def test_serving_is_timed_beside_a_copy(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    known = providers_of("serve")
    names = ("fastlora", "fastlora-routed", "loop", "bmm", "peft-mixed")
    made = make_runner(tmp_path, {"serve": [known[name] for name in names]})
    trained = replace(MIXED, cold=False, train=True, p=0.25, layout="blocks")
    base = replace(MIXED, layout="base", cold=False)
    made.run([MIXED, trained, base])
    results = load(tmp_path)
    rows = {key[1:]: found for key, found in results.blocks().items() if key[0] == MIXED.id}
    graph, eager_rows = rows["forward", "graph"], rows["forward", "eager"]
    assert [r.provider for r in graph] == [FLOOR, COPY, *names[:-1]]  # PEFT's copies lists
    assert [r.provider for r in eager_rows] == [FLOOR, COPY, *names]
    for result in results.results.values():
        assert result.status == OK, result
        if result.provider not in (FLOOR, COPY):
            assert result.errors
            assert max(result.errors.values()) < 1e-5, result
    assert (trained.id, STEP, "eager", "bmm") not in results.results  # it has no backward here
    assert set(results.results[trained.id, STEP, "eager", "loop"].errors) == {"y", "dx", "dA", "dB"}


def test_every_provider_agrees_with_the_reference() -> None:
    chosen, left_out = choose(("train",), None, CPU, slow=False)
    assert any("nothing is compiled" in reason for reason in left_out)
    checked = check_cases([TINY, replace(TINY, adapter_dtype="fp32", dtype="bf16")], chosen, CPU)
    assert {c.provider for c in checked} >= {"fastlora", "eager"}
    for one in checked:
        assert one.problem == "", one
        assert set(one.errors) == {"y", "dx", "dA", "dB"}


def test_models_agree_with_merged_weights() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    chosen, _ = choose(("model",), None, CPU, slow=False)
    cases: list[Case] = [
        ModelCase("layer", "layer", p=0.1, layers=2),
        ModelCase("finetune", "finetune", p=0.1, layers=2, checkpointing=True),
        ModelCase("generate", "generate", batch=4, adapters=3),
    ]
    checked = check_cases(cases, chosen, CPU)
    assert {"fastlora", "peft", "peft-default", "fastlora-multi", "peft-mixed"} <= {
        c.provider for c in checked
    }
    for one in checked:
        assert one.problem == "", one
        assert max(one.errors.values()) < 1e-4, one


def test_a_model_that_ignores_its_adapters_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from fastlora.bench.llama import Llama
    from fastlora.bench.models import generation
    from fastlora.bench.registry import ModelProvider

    class Frozen(ModelProvider):
        name, label, kinds = "frozen", "frozen", ("generate",)

        def make(self, llama: Llama, p: float) -> Any:
            return generation(llama, llama.shared())

    case = ModelCase("generate", "generate", batch=2, adapters=2).shrunk()
    good = providers_of("model")["fastlora-multi"]
    make_runner(tmp_path, {"model": [Frozen(), good]}).run([case])
    found = load(tmp_path)
    assert found.results[case.id, "generate", "eager", "frozen"].status == WRONG
    timed = found.results[case.id, "generate", "eager", "fastlora-multi"]
    assert (timed.status, len(timed.device_ms)) == (OK, 3)
    assert found.cases[case.id]["facts"] == {"layers": 1, "vocab": 128}


def test_a_training_step_of_a_model_is_timed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    case = ModelCase("layer", "layer", p=0.1).shrunk()
    make_runner(tmp_path, {"model": [providers_of("model")["fastlora"]]}).run([case])
    found = load(tmp_path).results
    for mode in ("step", "forward"):
        assert found[case.id, mode, "eager", "fastlora"].status == OK, found
        assert found[case.id, mode, "eager", FLOOR].device_ms


def test_layers_follow_from_memory() -> None:
    from fastlora.bench.llama import layers_that_fit

    case = ModelCase("finetune", "finetune")
    sizes = [layers_that_fit(case, gib * 2**30) for gib in (0, 24, 80, 141, 10_000)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, 32)
    assert 4 < sizes[2] < 32
    assert layers_that_fit(replace(case, p=0.1), 80 * 2**30) < sizes[2]


def test_saved_bytes_are_those_beyond_the_arguments() -> None:
    workload = TrainWorkload(PLAIN, CPU)
    saved = {
        name: workload.contender(providers_of("train")[name]).saved_bytes for name in ("eager",)
    }
    assert saved["eager"] == PLAIN.M * PLAIN.R * 4  # x A^T


def test_providers_do_not_touch_the_frozen_weight() -> None:
    workload = TrainWorkload(PLAIN, CPU)
    before = workload.problem.weight.clone()
    for name in ("fastlora", "eager"):
        workload.contender(providers_of("train")[name])
    assert torch.equal(workload.problem.weight, before)
    assert isinstance(workload.problem.xs[0], Tensor)
    assert not workload.problem.weight.requires_grad


def test_quick_holds_some_of_every_suite() -> None:
    assert {case.suite for case in select("quick")} == {"train", "serve", "model"}


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.no_poison
def test_bench_on_the_gpu(tmp_path: Path) -> None:
    clock = fastlora.bench.clock.CudaClock(torch.device("cuda", 0))
    case = TrainCase("table", 512, 256, 512)
    served = ServeCase("table", 64, 8, 16, 256, 512, cold=True)
    chosen, _ = choose(("train", "serve"), None, clock.device, slow=False)
    Runner(Store(tmp_path), clock, chosen, Listener(), 3).run([case, served])
    for result in load(tmp_path).results.values():
        assert result.status == OK, result
        assert min(result.device_ms) > 0
