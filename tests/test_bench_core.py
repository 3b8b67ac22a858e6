"""The clock, the statistics and the files of results of the benchmark suite."""

from __future__ import annotations

import contextlib
import itertools
import json
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
    Captured,
    CaptureError,
    CudaClock,
    HostClock,
    Samples,
    calls_for,
    in_turns,
    timing_lines,
)
from fastlora.bench.registry import FLOOR
from fastlora.bench.results import Result, Store, case_record, load
from fastlora.bench.shapes import MODELS
from fastlora.bench.stats import spread
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


def test_every_graph_is_replayed_before_the_first_sample() -> None:
    seen: list[str] = []
    captured = {n: Captured(lambda n=n: seen.append(n), 1) for n in ("a", "b")}
    samples = clock_file.time_graphs(HostClock(), captured, repeats=3)
    assert [len(s.device_ms) for s in samples.values()] == [3, 3]
    assert seen == ["a", "b", *in_turns(["a", "b"], 3)]


def test_every_call_gets_the_next_inputs() -> None:
    seen: list[int] = []
    calls = {"a": seen.append, "b": seen.append}
    clock_file.time_eager(HostClock(), calls, {"a": 2, "b": 1}, repeats=3)
    assert seen == list(range(9))


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
    runs = adapter_ids(ServeCase("t", 90, 5, 2, 8, 16, layout="requests"), 10, 0)
    lengths = {slot: len(list(rows)) for slot, rows in itertools.groupby(runs)}
    assert list(lengths) == [0, 2, 4, 6, 8]
    assert sum(lengths.values()) == 90
    assert len(set(lengths.values())) > 1
    assert adapter_ids(ServeCase("t", 4, 1, 2, 8, 16, layout="base"), 8, 0) == [-1] * 4
    drawn = adapter_ids(ServeCase("t", 200, 5, 2, 8, 16, layout="random"), 5, 0)
    assert set(drawn) == set(range(5))
