from __future__ import annotations

import argparse
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the commands print through rich")

from fastlora import dispatch
from fastlora.__main__ import build_parser, main
from fastlora.cli import bench, check, demo, demo_task, providers, timing
from fastlora.cli.cases import Case, default_cases, make_problem
from fastlora.cli.check import CheckReport, CheckResult
from fastlora.cli.memory import PeakMemory

CPU = torch.device("cpu")
TINY = Case(M=24, K=40, N=56, R=4, p=0.1, dtype=torch.float32, adapter_dtype=torch.float32)


def result(error: float = 0.0, path: str = "fused") -> CheckResult:
    return CheckResult("M=1", "float32", path, {"y": error}, 1e-4)


@pytest.mark.parametrize("command", ["demo", "doctor", "bench"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--device" in capsys.readouterr().out


def test_a_command_is_required() -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_bench_arguments_are_parsed() -> None:
    args = build_parser().parse_args(
        ["bench", "--shapes", "64x32,32x96", "--dropout", "0,0.25", "--tokens", "8,16"]
    )
    assert args.shapes == ((64, 32), (32, 96))
    assert args.dropout == (0.0, 0.25)
    assert args.tokens == (8, 16)
    assert args.compile


@pytest.mark.parametrize("option", [("--shapes", "64"), ("--tokens", "many"), ("--dropout", "x")])
def test_bad_bench_arguments_are_refused(option: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["bench", *option])
    assert stop.value.code == 2


def test_default_table_is_the_documented_one() -> None:
    cases = default_cases()
    assert len(cases) == 8
    assert {(c.M, c.R, c.dtype, c.adapter_dtype) for c in cases} == {
        (8192, 16, torch.bfloat16, torch.bfloat16)
    }


@pytest.mark.no_poison  # it would fill the large tensors that doctor only describes
def test_doctor_names_a_path_for_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "rank 512 is above 256" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is there")
def test_cuda_without_a_gpu_is_a_clear_error() -> None:
    with pytest.raises(SystemExit, match="sees no CUDA GPU"):
        main(["doctor", "--device", "cuda"])


def test_bench_without_a_gpu_times_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "run_interpreted_check", lambda: CheckReport((result(),)))
    monkeypatch.setattr(bench, "run_check", lambda _: CheckReport((result(path="eager"),)))
    assert main(["bench", "--device", "cpu"]) == 0
    assert "nothing is timed" in capsys.readouterr().out


def test_interpreted_check_takes_the_kernels_and_passes() -> None:
    pytest.importorskip("triton")
    numpy = tuple(int(part) for part in version("numpy").split(".")[:2])
    if numpy >= (2, 4):
        pytest.skip("Triton's interpreter fails with numpy 2.4")
    report = check.run_interpreted_check()
    assert report.problem == ""
    assert report.fused
    assert report.passed
    assert "passed" in check.summarise(report, "here")


def test_a_check_that_does_not_run_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'the reason' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    report = check.run_interpreted_check()
    assert not report.passed
    assert "the reason" in check.summarise(report, "here")


@pytest.mark.parametrize(
    ("results", "passed"),
    [((), False), ((result(),), True), ((result(1.0),), False), ((result(math.nan),), False)],
    ids=["empty", "exact", "wrong", "nan"],
)
def test_check_report_passes_only_good_numbers(
    results: tuple[CheckResult, ...], passed: bool
) -> None:
    assert CheckReport(results).passed is passed


def test_spread() -> None:
    measured = timing.spread([float(i) for i in range(11)])
    assert (measured.median, measured.p20, measured.p80) == (5.0, 2.0, 8.0)


def test_largest_difference_keeps_nan() -> None:
    assert demo.largest_difference([1.0, 2.0], [1.5, 1.0]) == 1.0
    assert math.isnan(demo.largest_difference([1.0, math.nan], [1.0, 2.0]))


def test_peak_memory_of_the_process() -> None:
    with PeakMemory(CPU) as memory:
        torch.ones(1 << 20)
    assert memory.peak_bytes > 0 or not Path("/proc/self/statm").exists()


def fake_timing(
    calls: dict[str, timing.Call], *, repeats: int, inner: int
) -> dict[str, timing.Samples]:
    for call in calls.values():
        call(1)
    times = [1.0] * repeats
    return {name: timing.Samples(times, times, times) for name in calls}


@pytest.fixture
def no_cuda_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "time_interleaved", fake_timing)
    monkeypatch.setattr(bench, "peak_bytes", lambda call: 0)


@pytest.mark.usefixtures("no_cuda_timing")
def test_every_provider_agrees_with_the_reference(tmp_path: Path) -> None:
    chosen, _ = providers.available(None)
    chosen = [p for p in chosen if p.name != "compile"]
    rows = bench.run_case(TINY, chosen, CPU, repeats=3, inner=2, seed=0)
    assert [row.provider for row in rows] == [providers.FLOOR, *(p.name for p in chosen)]
    for row in rows[1:]:
        assert row.problem == ""
        assert set(row.errors) == {"y", "dx", "dA", "dB"}
        assert max(row.errors.values()) < 1e-4, row.provider
    assert rows[1].checked_at_p == TINY.p  # fastlora, with its mask

    assert bench.make_table([(TINY, rows)], "fp32").row_count == 1 + len(rows)
    bench._write_json(tmp_path / "bench.json", {"GPU": "none"}, [(TINY, rows)])
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["cases"][0]["rows"][1]["x_floor"] == {bench.FORWARD: 1.0, bench.STEP: 1.0}
    assert len(written["cases"][0]["rows"][1]["samples"][bench.STEP]["device_ms"]) == 3


@pytest.mark.usefixtures("no_cuda_timing")
def test_wrong_numbers_and_crashes_are_not_timed() -> None:
    def wrong(problem: bench.Problem, p: float) -> bench.Layer:
        layer = providers.PROVIDERS["eager"].make(problem, p)
        return bench.Layer(lambda x: layer.forward(x) * 1.1, layer.lora_A, layer.lora_B)

    def crash(problem: bench.Problem, p: float) -> bench.Layer:
        raise RuntimeError("no such kernel\nand more")

    peers = [providers.Provider("wrong", "wrong", wrong), providers.Provider("crash", "c", crash)]
    _, first, second = bench.run_case(TINY, peers, CPU, repeats=1, inner=1, seed=0)
    assert first.problem.startswith("wrong numbers")
    assert second.problem == "RuntimeError: no such kernel"
    assert not first.samples
    assert not second.samples


def test_unknown_provider_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown provider 'x'"):
        providers.available(("x",))


def test_weight_of_a_problem_is_frozen() -> None:
    problem = make_problem(TINY, CPU)
    assert not problem.weight.requires_grad
    assert all(x.requires_grad for x in problem.xs)
    assert len(problem.xs) >= 2


def test_passages_have_one_topic_each() -> None:
    texts = [text for text, _ in demo_task.passages()]
    assert len(texts) == len(set(texts)) > 500
    assert {label for _, label in demo_task.passages()} == set(range(len(demo_task.TOPICS)))


def test_batches_repeat_with_the_seed() -> None:
    task = demo_task._byte_task(CPU, 4, torch.float32)
    first, again, other = (
        torch.stack([b.input_ids for b in task.batches(3, seed)]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_demo_trains_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    arguments = ["demo", "--model", "llama", "--steps", "3", "--batch", "1", "--device", "cpu"]
    # A training run through the interpreter would take minutes.
    with dispatch.force("eager"):
        assert main([*arguments, "--skip-check", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Largest difference of the two loss curves: 0.00e+00" in out
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.pt",
    }


@pytest.mark.parametrize("missing", [True, False], ids=["no package", "package"])
def test_model_package_is_found_or_named(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        monkeypatch.setattr(demo_task, "find_model_folder", lambda: None)
        with pytest.raises(SystemExit, match="--model minilm"):
            demo_task.make_task("minilm", CPU, None)
        assert "Llama" in demo_task.make_task("auto", CPU, None).name
        return
    pytest.importorskip("transformers")
    if demo_task.find_model_folder() is None:
        pytest.skip(f"{demo_task.MODEL_PACKAGE} is not installed")
    task = demo_task.make_task("auto", CPU, None)
    rows = {tuple(ids.tolist()) for ids in task.train.input_ids}
    assert not any(tuple(ids.tolist()) in rows for ids in task.held_out.input_ids)


@pytest.mark.parametrize("steps", ["0", "1"])
def test_demo_needs_two_steps(steps: str) -> None:
    with pytest.raises(SystemExit, match="at least 2"):
        demo.run(build_parser().parse_args(["demo", "--steps", steps, "--device", "cpu"]))


def test_options_of_a_command_do_not_clash() -> None:
    for module in (demo, bench):
        module.add_arguments(argparse.ArgumentParser())


@pytest.mark.gpu
def test_bench_on_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    arguments = [
        "bench",
        "--tokens",
        "512",
        "--shapes",
        "256x512",
        "--repeats",
        "3",
        "--no-compile",
    ]
    assert main([*arguments, "--json", str(path)]) == 0
    rows = [row for case in json.loads(path.read_text())["cases"] for row in case["rows"]]
    assert all(
        ms > 0 for row in rows if row["samples"] for ms in row["samples"][bench.STEP]["wall_ms"]
    )


@pytest.mark.gpu
def test_demo_on_the_gpu_uses_the_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    arguments = ["demo", "--model", "llama", "--steps", "3", "--batch", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "fused" in capsys.readouterr().out
