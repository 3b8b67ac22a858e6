"""The clock, the statistics, the files of results and the comparison of the benchmark suite."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the commands print through rich")

from fastlora.bench import clock as clock_file
from fastlora.bench.cases import TRAIN_TABLE, ServeCase, TrainCase, select, suites
from fastlora.bench.clock import (
    CaptureError,
    CudaClock,
    HostClock,
    Samples,
    calls_for,
    in_turns,
    timing_lines,
)
from fastlora.bench.compare import compare, describe_changes
from fastlora.bench.registry import FLOOR
from fastlora.bench.results import OOM, Result, Results, Store, case_record, load
from fastlora.bench.shapes import MODELS
from fastlora.bench.stats import mann_whitney, spread
from fastlora.bench.workloads import schedules_of
from fastlora.kernels import native

ROOT = Path(__file__).resolve().parent.parent


class FakeCuda:
    """What `CudaClock` asks of torch.cuda; GPU time passes when a call is enqueued or replayed."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.gpu_ms = 0.0
        self.stream_now = "default"
        self.fail_capture = False
        self.allocated, self.peak = 100, 100

    def work(self, ms: float) -> None:
        self.log.append("call")
        self.gpu_ms += ms
        self.peak = max(self.peak, self.allocated + 50)


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(native, "wait", lambda: "")  # which would compile

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing
            self.at = -1.0

        def record(self) -> None:
            fake.log.append("record")
            self.at = fake.gpu_ms

        def elapsed_time(self, end: Event) -> float:
            assert fake.log[-1] == "sync", "an event is read before the device is idle"
            return end.at - self.at

    class Stream:
        def wait_stream(self, other: object) -> None:
            fake.log.append("wait")

    class CUDAGraph:
        ms = 0.0

        def replay(self) -> None:
            fake.log.append("replay")
            fake.gpu_ms += self.ms

    @contextlib.contextmanager
    def stream(side: object) -> Iterator[None]:
        before, fake.stream_now = fake.stream_now, "side"
        yield
        fake.stream_now = before

    class Graph:
        def __init__(self, graph: CUDAGraph) -> None:
            self.graph = graph

        def __enter__(self) -> None:
            fake.stream_now, self.began = "capture", fake.gpu_ms

        def __exit__(self, *_: object) -> None:
            # As torch's: an error in the block or at its end leaves the stream as it is.
            if fake.fail_capture:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.graph.ms, fake.gpu_ms = fake.gpu_ms - self.began, self.began
            fake.stream_now = "default"

    default = Stream()
    replaced: dict[str, Any] = {
        "set_device": lambda d: None,
        "Event": Event,
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda *a: default,
        "set_stream": lambda s: setattr(fake, "stream_now", "default" if s is default else "?"),
        "CUDAGraph": CUDAGraph,
        "graph": Graph,
        "_sleep": lambda cycles: fake.log.append("sleep"),
        "synchronize": lambda *a: fake.log.append("sync"),
        "memory_allocated": lambda *a: fake.allocated,
        "reset_peak_memory_stats": lambda *a: setattr(fake, "peak", fake.allocated),
        "max_memory_allocated": lambda *a: fake.peak,
        "empty_cache": lambda: fake.log.append("empty"),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def test_eager_sample_is_between_events_after_a_lead_in(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_cuda(monkeypatch)
    sets: list[int] = []

    def call(i: int) -> None:
        sets.append(i)
        fake.work(2.0)

    clock = CudaClock(torch.device("cuda", 0))
    device, wall, host = clock.eager_sample(call, first=5, calls=3)
    assert device == 2.0
    assert sets == [5, 6, 7, 8, 9]
    assert (
        wall * 5 >= host * 3 > 0
    )  # of five calls from idle to idle, and of the three that are timed
    assert fake.log == ["sync", *["call"] * 2, "record", *["call"] * 3, "record", "sync"]
    fake.log.clear()
    assert clock.eager_sample(call, first=5, calls=1)[0] == 2.0
    assert fake.log == ["sync", "record", "call", "record", "sync"]


def test_graph_sample_is_gpu_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_cuda(monkeypatch)
    streams, sets = [], []

    def call(i: int) -> tuple[str, int]:
        streams.append(fake.stream_now)
        sets.append(i)
        fake.work(0.5)
        return "output", i

    clock = CudaClock(torch.device("cuda", 0))
    captured = clock.capture(call, 4)
    assert streams == ["side"] * 4 + ["capture"] * 4
    assert sets == [0, 1, 2, 3, 3, 2, 1, 0]  # no set is met for the first time in the capture
    assert captured.output == ("output", 0)  # of the first set, which the reference was made for
    assert captured.calls == 4
    fake.log.clear()
    assert clock.graph_sample(captured) == 0.5
    assert fake.log == ["sync", "replay", "sleep", "record", "replay", "record", "sync"]


def test_failed_capture_restores_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_cuda(monkeypatch)
    fake.fail_capture = True
    with pytest.raises(CaptureError, match="not permitted"):
        CudaClock(torch.device("cuda", 0)).capture(lambda i: fake.work(1.0), 2)
    assert fake.stream_now == "default"


def test_failed_capture_names_what_failed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_cuda(monkeypatch)
    fake.fail_capture = True  # its end raises too

    def reads_ids(i: int) -> None:
        if fake.stream_now == "capture":
            raise ValueError(f"set {i} syncs")

    with pytest.raises(CaptureError, match=r"set 1 syncs, in test_bench_core.py:\d+ reads_ids$"):
        CudaClock(torch.device("cuda", 0)).capture(reads_ids, 2)


def test_peak_is_what_one_call_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_cuda(monkeypatch)
    assert CudaClock(torch.device("cuda", 0)).peak_bytes(lambda i: fake.work(1.0)) == 50


def test_a_lost_context_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch)
    clock = CudaClock(torch.device("cuda", 0))

    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    assert not clock.healthy()
    clock.forget()  # must not hide the error that came first


def test_each_round_has_every_name_and_no_one_the_same_neighbour() -> None:
    turns = list(in_turns(["a", "b", "c"], 40))
    assert turns == list(in_turns(["a", "b", "c"], 40))
    assert all(sorted(turns[i : i + 3]) == ["a", "b", "c"] for i in range(0, 120, 3))
    assert {turns[i - 1] for i in range(1, 120) if turns[i] == "a"} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("ms", "most", "multiple", "calls"),
    [(1.0, 50, 1, 4), (100.0, 50, 1, 1), (0.001, 50, 1, 50), (1.0, 128, 3, 6), (0.0, 128, 8, 128)],
)
def test_calls_of_a_sample(ms: float, most: int, multiple: int, calls: int) -> None:
    assert calls_for(ms, most, multiple) == calls


def test_interleaved_samples_have_one_length() -> None:
    seen: list[str] = []
    calls = {name: lambda i, name=name: seen.append(name) for name in ("a", "b")}
    samples = clock_file.time_eager(HostClock(), calls, {"a": 2, "b": 1}, repeats=3)
    assert [len(s.device_ms) for s in samples.values()] == [3, 3]
    assert "".join(seen) == "".join({"a": "aa", "b": "b"}[n] for n in in_turns(["a", "b"], 3))
    captured = {name: HostClock().capture(call, 2) for name, call in calls.items()}
    graphs = clock_file.time_graphs(HostClock(), captured, repeats=4)
    assert [len(s.device_ms) for s in graphs.values()] == [4, 4]
    assert not graphs["a"].host_ms


def test_a_line_for_each_callable_has_its_ratios_to_the_floor() -> None:
    samples = {"floor": Samples([2.0], [9.0], [0.5]), "lora": Samples([5.0], [9.0], [0.25])}
    first, second = timing_lines(samples, {}, "floor")
    assert re.fullmatch(r"floor +2\.000 ms .* x 1\.000  host 0\.500 ms", first)
    assert re.fullmatch(r"lora +5\.000 ms .* x 2\.500  host 0\.250 ms", second)
    assert timing_lines(samples, samples, "floor")[1].endswith("  graph 5.000 ms  x 2.500")


def test_spread() -> None:
    measured = spread([float(i) for i in range(11)])
    assert (measured.median, measured.p20, measured.p80) == (5.0, 2.0, 8.0)
    assert measured.noise == pytest.approx(0.6)
    assert spread([]).median != spread([]).median


@pytest.mark.parametrize("ties", [False, True])
def test_mann_whitney_is_scipys(ties: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    for shift in (0.0, 0.5, 2.0):
        a = [rng.gauss(0, 1) for _ in range(20)]
        b = [rng.gauss(shift, 1) for _ in range(17)]
        if ties:
            a, b = [round(v, 0) for v in a], [round(v, 0) for v in b]
        want = stats.mannwhitneyu(a, b, alternative="two-sided", method="asymptotic").pvalue
        assert mann_whitney(a, b) == pytest.approx(want, rel=1e-9)
    assert mann_whitney([], [1.0]) == 1.0
    assert mann_whitney([1.0, 1.0], [1.0]) == 1.0


def test_cases_have_one_id_each_and_the_documented_table() -> None:
    for name, cases in suites().items():
        ids = [case.id for case in cases]
        assert len(ids) == len(set(ids)), name
        assert all(schedules_of(case) for case in cases)
        json.dumps([case_record(case) for case in cases])
    table = [c for c in select("train", "^train/table/") if isinstance(c, TrainCase)]
    assert {(c.M, c.K, c.N) for c in table} == set(TRAIN_TABLE)
    assert {c.p for c in table} == {0.0, 0.1}
    assert {c.suite for c in select("all")} == {"train", "serve", "model"}
    assert {c.id for c in select("quick")} & {c.id for c in select("serve")}
    assert (3584, 512) in MODELS["qwen2.5-7b"].distinct_linears()
    with pytest.raises(ValueError, match="no case"):
        select("train", "nothing like it")
    with pytest.raises(ValueError, match="regular expression"):
        select("train", "(")


def test_work_counts_operations_and_bytes() -> None:
    case = TrainCase("t", 4, 8, 16, R=2)
    flops, moved = case.work("step")
    assert flops == 4 * 4 * 8 * 16 + 6 * 4 * 2 * 24
    forward = 2 * (4 * 8 + 16 * 8 + 4 * 16 + 2 * 24)
    assert case.work("forward") == (2 * 4 * 8 * 16 + 2 * 4 * 2 * 24, forward)
    assert moved == forward + 2 * (4 * 16 + 2 * 4 * 8 + 16 * 8) + 2 * 2 * 2 * 24
    # Slots that no row uses are not read.
    few, many = (ServeCase("t", 16, 4, 2, 8, 16, slots=slots) for slots in (4, 400))
    assert few.work("forward") == many.work("forward")


def planted(
    slower: float = 1.0, clock: float = 1.0, seed: int = 0, noise: float = 0.01, cases: int = 60
) -> Results:
    """A run of many cases; ``slower`` scales one result of fastlora, ``clock`` everything."""
    rng, found = random.Random(seed), Results()
    for number in range(cases):
        for provider, ms in ((FLOOR, 1.0), ("fastlora", 1.1), ("peft", 1.5)):
            drift = [1 + 0.02 * rng.random() for _ in range(20)]
            factor = slower if (number, provider) == (3, "fastlora") else 1.0
            samples = [ms * factor * clock * d * (1 + abs(rng.gauss(0, noise))) for d in drift]
            result = Result(
                f"train/table/{number}", "train", "step", "eager", provider, provider,
                device_ms=samples, block=number,
            )  # fmt: skip
            found.add({"type": "result", **vars(result)})
    return found


@pytest.mark.parametrize("seed", range(8))
def test_two_honest_runs_are_not_different(seed: int) -> None:
    changes = compare(planted(seed=seed), planted(seed=100 + seed, clock=1.07))
    assert len(changes) == 120
    assert not any(change.changed for change in changes)


@pytest.mark.parametrize("seed", range(8))
def test_a_planted_slowdown_of_a_tenth_is_a_regression(seed: int) -> None:
    changes = compare(planted(seed=seed), planted(seed=100 + seed, slower=1.1))
    (found,) = (change for change in changes if change.changed)
    assert found.key[0] == "train/table/3"
    assert found.regression
    assert found.effect == pytest.approx(0.1, abs=0.02)
    lines = describe_changes(changes)
    assert lines[0].startswith("REGRESSION: train/table/3")
    assert "1 regressions" in lines[-1]
    assert not any(c.regression for c in compare(planted(seed=seed, slower=1.1), planted(seed=9)))


def bound_by_the_host(ours: float, host: float, yardstick: bool = True) -> Results:
    rng, found = random.Random(ours + host), Results()
    for provider, ms in ((FLOOR, 0.1), ("fastlora", ours), ("eager", 0.4)):
        if provider == "eager" and not yardstick:
            continue
        samples = [
            ms * (1 if provider == FLOOR else host) * rng.uniform(1, 1.02) for _ in range(20)
        ]
        waits = [0.02 if provider == FLOOR else ms for ms in samples]
        result = Result(
            "train/table/0", "train", "step", "eager", provider, provider,
            device_ms=samples, host_ms=waits, block=1,
        )  # fmt: skip
        found.add({"type": "result", **vars(result)})
    return found


def test_a_slower_host_is_no_regression_and_slower_code_on_it_is() -> None:
    before = bound_by_the_host(ours=0.3, host=1.0)
    assert not any(c.changed for c in compare(before, bound_by_the_host(ours=0.34, host=1.7)))
    change = compare(before, bound_by_the_host(ours=0.45, host=0.8))[0]
    assert change.regression
    assert change.unit == "x eager"
    alone = [bound_by_the_host(ours, 1.0, yardstick=False) for ours in (0.3, 0.45)]
    assert not any(c.changed for c in compare(*alone))


def test_noise_as_large_as_the_change_is_no_regression() -> None:
    changes = compare(planted(noise=0.3, cases=8), planted(noise=0.3, cases=8, seed=7, slower=1.1))
    assert not any(change.changed for change in changes)


def test_a_peer_that_became_slower_is_no_regression_and_a_failure_of_ours_is() -> None:
    before, after = planted(cases=4), planted(cases=4, seed=1)
    for key, result in after.results.items():
        if key[3] == "peft":
            result.device_ms = [2 * ms for ms in result.device_ms]
        if key[3] == "fastlora" and key[0].endswith("/2"):
            result.status, result.message, result.device_ms = OOM, "does not fit", []
    changes = compare(before, after)
    assert sum(c.changed for c in changes) == 5
    (failed,) = (c for c in changes if c.regression)
    assert "does not fit" in describe_changes([failed])[0]
    with pytest.raises(ValueError, match="no result in common"):
        compare(before, Results())


def result_of(case: str, provider: str, ms: float, block: int = 1) -> Result:
    return Result(
        case, "train", "step", "eager", provider, provider, device_ms=[ms] * 3, block=block
    )


def test_store_outlives_a_cut_line(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append("run", machine={"GPU": "a"}, command="x")
    store.append("begin", case="c")
    store.append_result(result_of("c", FLOOR, 2.0))
    with store.path.open("a", encoding="utf-8") as file:
        file.write('{"type": "result", "case": "c", "sui')  # killed while it wrote
    again = Store(tmp_path)
    again.append_result(result_of("c", "fastlora", 3.0))
    found = load(tmp_path)
    assert found.broken_lines == 1
    assert found.unfinished == {"c": 1}
    assert found.ratio(found.results["c", "step", "eager", "fastlora"]) == 1.5
    fresh = Store(tmp_path, fresh=True)
    assert not fresh.results.results
    assert load(tmp_path / "results.old.jsonl").results


def test_a_result_keeps_the_floor_of_its_own_block(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for block, floor, name, ms in ((1, 2.0, "eager", 3.0), (2, 4.0, "fastlora", 4.4)):
        store.append_result(result_of("c", FLOOR, floor, block))
        store.append_result(result_of("c", name, ms, block))
    found = load(tmp_path)
    ratios = [found.ratio(found.results["c", "step", "eager", n]) for n in ("eager", "fastlora")]
    assert ratios == pytest.approx([1.5, 1.1])


def test_samples_of_an_older_version_are_read() -> None:
    found = load(ROOT / "benchmarks" / "results" / "h100_lora_linear.json")
    assert found.runs[0]["machine"]["GPU"] == "NVIDIA H100 80GB HBM3"
    key = ("train/table/8192x8192x8192/r16/p0/bf16", "step", "eager", "fastlora")
    assert found.ratio(found.results[key]) == pytest.approx(1.12, abs=0.005)
    assert set(found.cases) < {case.id for case in select("train")}


@pytest.mark.parametrize("content", ["not json\n", "[1, 2]\n"])
def test_what_is_no_file_of_results_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(ValueError, match="not a file of results"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no results there"):
        load(tmp_path / "nowhere")


def test_ids_of_serving_rows_follow_the_layout() -> None:
    from fastlora.bench.problems import adapter_ids

    case = ServeCase("t", 12, 3, 2, 8, 16)
    assert adapter_ids(case, 3, 0) == [0, 1, 2] * 4
    assert adapter_ids(ServeCase("t", 12, 3, 2, 8, 16, slots=300), 300, 0)[:3] == [0, 100, 200]
    blocks = adapter_ids(ServeCase("t", 12, 3, 2, 8, 16, layout="blocks"), 3, 0)
    assert [slot for slot, _ in itertools.groupby(blocks)] == [0, 1, 2]
    assert adapter_ids(ServeCase("t", 4, 1, 2, 8, 16, layout="base"), 8, 0) == [-1] * 4
    drawn = adapter_ids(ServeCase("t", 200, 5, 2, 8, 16, layout="random"), 5, 0)
    assert set(drawn) == set(range(5))
