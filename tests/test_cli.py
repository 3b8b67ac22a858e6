from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the commands print through rich")

from fastlora import dispatch
from fastlora.__main__ import build_parser, main
from fastlora.bench.cases import Case, select
from fastlora.bench.correctness import Checked
from fastlora.cli import bench, check, demo, demo_task
from fastlora.cli.check import CheckReport, CheckResult
from fastlora.cli.memory import PeakMemory

CPU = torch.device("cpu")


def result(error: float = 0.0, path: str = "fused") -> CheckResult:
    return CheckResult("M=1", "float32", path, {"y": error}, 1e-4)


@pytest.mark.parametrize("command", ["demo", "doctor", "bench", "tune"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--device" in capsys.readouterr().out


def test_a_command_is_required() -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


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


@pytest.mark.parametrize("problem", ["", "wrong numbers: y 1.0"])
def test_bench_without_a_gpu_checks_and_times_nothing(
    problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def checked(cases: list[Case], *_: object) -> list[Checked]:
        seen.extend(cases)
        return [Checked(cases[0].id, "fastlora", "fastlora", {"y": 1e-3}, problem)]

    monkeypatch.setattr(bench, "check_cases", checked)
    monkeypatch.setattr(bench, "run_interpreted_check", lambda: CheckReport((result(),)))
    monkeypatch.setattr(bench, "run_check", lambda _: CheckReport((result(path="eager"),)))
    assert main(["bench", "--device", "cpu", "--suite", "all"]) == (1 if problem else 0)
    out = capsys.readouterr().out
    assert out.startswith("No CUDA GPU here: nothing is timed")
    assert problem in out
    assert [case.id for case in seen] == [case.id for case in select("quick")]


def test_interpreted_check_takes_the_kernels_and_passes(interpreter_problem: str) -> None:
    pytest.importorskip("triton")
    if interpreter_problem:
        pytest.skip(interpreter_problem)
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


def test_largest_difference_keeps_nan() -> None:
    assert demo.largest_difference([1.0, 2.0], [1.5, 1.0]) == 1.0
    assert math.isnan(demo.largest_difference([1.0, math.nan], [1.0, 2.0]))


def test_peak_memory_of_the_process() -> None:
    with PeakMemory(CPU) as memory:
        torch.ones(1 << 20)
    assert memory.peak_bytes > 0 or not Path("/proc/self/statm").exists()


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
def test_demo_on_the_gpu_uses_the_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    arguments = ["demo", "--model", "llama", "--steps", "3", "--batch", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "fused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--lr", "nan"], "expected a number above 0, got 'nan'"),
        (["demo", "--batch", "0"], "expected a batch size from 1 on, got '0'"),
        (["demo", "--dropout", "3"], "expected a probability from 0 to below 1, got '3'"),
        (["bench", "--time-limit", "nan"], "expected seconds above 0, got 'nan'"),
        (["demo", "--device", "abacus"], "--device abacus: "),
        (["doctor", "--device", "abacus"], "--device abacus: "),
        (["bench", "--device", "abacus"], "--device abacus: "),
        (["demo", "--out", "FILE/folder"], "--out .*FILE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").touch()
    words = [str(tmp_path / word) if word.startswith("FILE") else word for word in words]
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert re.search(message, f"{raised.value} {capsys.readouterr().err}")
