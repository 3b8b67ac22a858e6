"""The bench command: measure, resume, restart, compare; providers from a file, the documented one too."""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the commands print through rich")

import fastlora.bench
from fastlora import dispatch
from fastlora.__main__ import build_parser, main
from fastlora.bench import registry
from fastlora.bench.cases import Case, TrainCase
from fastlora.bench.clock import Captured, CaptureError, Clock, HostClock
from fastlora.bench.correctness import check_cases
from fastlora.bench.registry import FLOOR, TrainProvider, choose, providers_of
from fastlora.bench.results import ERROR, OK, Result, Store, load
from fastlora.cli import bench, system
from fastlora.cli.system import make_console

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
TINY = TrainCase("table", M=24, K=40, N=56, R=4, p=0.1, dtype="fp32", adapter_dtype="fp32")
PLAIN = replace(TINY, p=0.0)


@pytest.fixture(autouse=True)
def eager_path() -> Iterator[None]:
    """The kernels have tests of their own; through the interpreter these would take minutes."""
    with dispatch.force("eager"):
        yield


class CaptureFails(HostClock):
    def capture(self, call: Any, calls: int) -> Captured:
        raise CaptureError("no CUDA graph: a sync")


MINE = """
from fastlora.bench import Layer, TrainProvider, register


@register
class Mine(TrainProvider):
    name, label = "{name}", "my own"

    def make(self, problem, p):
        def forward(x):
            update = x @ problem.lora_A.t() @ problem.lora_B.t()
            return x @ problem.weight.t() + problem.scaling * update

        return Layer(forward, problem.lora_A, problem.lora_B)
"""


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PROVIDERS", dict(registry._PROVIDERS))


@pytest.mark.usefixtures("own_registry")
def test_a_file_adds_a_provider(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(name="mine"))
    registry.load_file(path)
    chosen, _ = choose(("train",), ("mine",), CPU, slow=False)
    (checked,) = check_cases([PLAIN], chosen, CPU)
    assert checked.problem == ""
    with pytest.raises(ValueError, match="there already"):
        registry.load_file(path)
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match="registers no provider"):
        registry.load_file(path)
    with pytest.raises(ValueError, match="no such file"):
        registry.load_file(tmp_path / "nothing.py")
    path.write_text("from fastlora.bench import register\nregister(int)\n")
    with pytest.raises(ValueError, match=r"mine\.py: .*subclass of Provider"):
        registry.load_file(path)
    with pytest.raises(ValueError, match="unknown provider 'nobody'"):
        choose(("train",), ("nobody",), CPU, slow=False)
    with pytest.raises(ValueError, match="no provider of loop measures train"):
        choose(("train",), ("loop",), CPU, slow=False)


@pytest.mark.usefixtures("own_registry")
def test_what_is_no_provider_is_refused() -> None:
    with pytest.raises(TypeError, match="subclass of Provider"):
        fastlora.bench.register(int)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="must have a name"):
        fastlora.bench.register(type("Nameless", (TrainProvider,), {}))


def arguments(folder: Path, *more: str) -> Any:
    return build_parser().parse_args(["bench", "--out", str(folder), "--repeats", "3", *more])


def measure(
    folder: Path, *more: str, cases: list[Case] | None = None, clock: Clock | None = None
) -> int:
    given, known = arguments(folder, *more), providers_of("train")
    providers = {"train": [known["fastlora"], known["eager"]]}
    return bench._measure(
        make_console(), given, clock or HostClock(), cases or [TINY], providers, []
    )


def test_the_command_measures_resumes_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert measure(tmp_path) == 0
    out = capsys.readouterr().out
    assert "24 tokens, 40 -> 56" in out
    assert re.search(r"fastlora \d+\.\d\dx  eager", out)
    assert "fastlora" in (tmp_path / "table.txt").read_text()
    assert measure(tmp_path, cases=[TINY, PLAIN]) == 0
    found = load(tmp_path)
    (tmp_path / "report.html").unlink()  # every run ends with one
    assert len(found.runs) == 2
    assert found.ceilings["copy_gb_per_s"] > 0
    assert "sources" in found.runs[0]["machine"]
    assert main(["bench", "report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2
    # Everything is in the page: nothing is fetched, neither by a tag nor by a style.
    assert not re.search(r"(src|href)=\"(?!data:|#)|@import|url\(", page)
    words = re.sub(r"base64,[^\"]+", "", page)
    assert not re.search(r"https?:|=[\"']?//|<(script|link|iframe|object|embed)", words)
    images = re.findall(r"<img [^>]*>", words)
    assert images
    assert all(re.search(r" alt=\"[^\"]{10,}\"", image) for image in images)
    # A wide table scrolls in a place of its own, and a column that says nothing is not there.
    assert page.count("<table>") == page.count('<div class="scroll"')
    assert ">host us</th>" in page
    assert ">tokens/s</th>" not in page
    assert 'name="viewport"' in page
    for data in re.findall(r"base64,([^\"]+)", page):
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert (tmp_path / "train_eager.png").stat().st_size > 1000
    assert main(["bench", "--compare", str(tmp_path), str(tmp_path)]) == 0


def test_results_of_another_machine_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure(tmp_path) == 0
    machine = {"GPU": "another", "driver": "unknown"}
    monkeypatch.setattr(bench, "describe_machine", lambda device: machine)
    with pytest.raises(ValueError, match=r"made with GPU none .*, here it is another"):
        measure(tmp_path)
    assert measure(tmp_path, "--fresh") == 0
    assert load(tmp_path / "results.old.jsonl").runs[0]["machine"]["GPU"] != "another"


def test_a_provider_that_changed_is_not_taken_for_the_one_that_was_measured(tmp_path: Path) -> None:
    path, out = tmp_path / "mine.py", tmp_path / "out"
    path.write_text("one")
    assert measure(out, "--provider", str(path)) == 0
    assert measure(out, "--provider", str(path)) == 0
    path.write_text("other")
    with pytest.raises(ValueError, match=r"mine\.py has changed since it was measured there"):
        measure(out, "--provider", str(path))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        bench._alone(tmp_path),
        pytest.raises(ValueError, match="another run measures into"),
        bench._alone(tmp_path),
    ):
        pass
    with bench._alone(tmp_path):
        pass


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.Runner, "run", stop)
    assert measure(tmp_path) == 130
    assert "the same command goes on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "label", ["mine, [/opt build]", "mine [bf16]", r"mine $\foo$ " + "long " * 20]
)
def test_labels_are_shown_as_they_are(
    label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(providers_of("train")["eager"], "label", label)
    assert measure(tmp_path) == 0
    table = re.sub(r"[\s│]+", " ", (tmp_path / "table.txt").read_text())
    assert label.split("long")[0].strip() in table
    assert (tmp_path / "report.html").exists()


def test_the_hash_of_the_sources_is_of_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or plain(path))
    first = system.source_state()["sources"]
    assert system.source_state()["sources"] == first
    assert {"clock.py", "peft_layers.py", "bank.py", "replay.cpp", "lora_forward.py"} <= set(read)


def test_a_cpu_has_no_clocks_of_a_gpu_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "query_gpu", lambda fields, device=None: dict.fromkeys(fields, "1"))
    assert system.read_clocks(CPU) == {}
    assert system.read_clocks(torch.device("cuda", 0)).keys() == set(system.CLOCKS)


def test_a_regression_gives_another_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, slower in (("a", 1.0), ("b", 1.1)):
        store = Store(tmp_path / name)
        store.append("run", machine={}, command="")
        for number in range(20):
            for provider_name, ms in ((FLOOR, 1.0), ("fastlora", 1.2 * slower)):
                samples = [ms * (1 + 0.001 * ((7 * i + number) % 11)) for i in range(20)]
                store.append_result(Result(
                    f"train/table/{number}", "train", "step", "eager", provider_name, provider_name,
                    device_ms=samples, block=number,
                ))  # fmt: skip
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["bench", "--compare", a, b]) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert main(["bench", "--compare", b, a]) == 0
    assert "Mann-Whitney" in capsys.readouterr().out


def test_restart_is_the_same_command_with_the_time_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *args: started.append(args))
    monkeypatch.setattr(os, "environ", {**os.environ, "FASTLORA_BENCH_SPENT": "7.5"})
    monkeypatch.setattr(sys, "argv", ["fastlora", "bench", "--out", str(tmp_path)])
    measure(tmp_path, "--fresh", clock=CaptureFails())
    ((program, argv),) = started
    assert program == sys.executable
    assert argv[1:] == ["-m", "fastlora", "bench", "--out", str(tmp_path)]
    assert os.environ["FASTLORA_BENCH_RESTARTS"] == "1"
    assert float(os.environ["FASTLORA_BENCH_SPENT"]) > 7.5
    # --fresh must not set aside what the process before measured.
    measure(tmp_path, "--fresh")
    found = load(tmp_path).results
    assert found[TINY.id, "step", "graph", FLOOR].status == ERROR
    assert found[TINY.id, "forward", "graph", FLOOR].status == OK
    monkeypatch.setitem(os.environ, "FASTLORA_BENCH_RESTARTS", "30")
    assert bench._restart(30, 1.0) == 1


def test_list_filter_and_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "serve", "--filter", "2000", "--list"]) == 0
    listed = capsys.readouterr().out.split("\n")
    assert len([line for line in listed if line.startswith("serve/slots/")]) == 2
    for wrong in (["--filter", "nothing"], ["report"], ["--repeats", "1"], ["--providers", "x"]):
        assert main(["bench", *wrong]) == 2
    assert main(["bench", "--compare", "nowhere", "nowhere"]) == 2


@pytest.mark.usefixtures("own_registry")
def test_the_documented_provider_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    path = tmp_path / "addmm.py"
    path.write_text(text.split("```python\n")[1].split("```")[0])
    registry.load_file(path)
    chosen, _ = choose(("train",), ("addmm",), CPU, slow=False)
    for checked in check_cases([TINY, PLAIN], chosen, CPU):
        assert (checked.provider, checked.problem) == ("addmm", "")
