"""The tune command: its arguments, what it prints and keeps; what doctor says of tuned launches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rich", reason="the commands print through rich")

from tune_cases import (
    GPU,
    KEY,
    Bench,
    ask,
    content,
    empty_folder,  # noqa: F401  (the fixture `folder`)
    row,
    write,
)

from fastlora import tune as tuning
from fastlora.__main__ import main
from fastlora.cli import tune as command
from fastlora.kernels import tuned
from fastlora.tune import DEFAULT
from fastlora.tune_file import TuneFile


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is there")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert main(["tune"]) == 2
    assert capsys.readouterr().out.splitlines() == [
        "tune: no CUDA GPU that the kernels run on here: nothing can be measured"
    ]
    assert main(["tune", "--show"]) == 0
    assert "No CUDA GPU here" in capsys.readouterr().out


def test_dry_run_lists_the_product_and_writes_nothing(folder, capsys):
    words = ["--shapes", "64x32,128x64", "--tokens", "8", "--ranks", "4,8", "--dropout", "0,0.1"]
    assert main(["tune", "--dry-run", "--device", "cpu", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("8 tokens, 64 -> 32, r=4, bfloat16, p=0: forward, backward, ")
    assert lines[-1] == f"8 shapes; rows would go to {folder / 'tuned-Made_up_GPU_40GB.json'}"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--shapes", "4096"],
            "--shapes: expected in_features x out_features, as in 4096x14336, got '4096'",
        ),
        (["--shapes", "0x16"], "got '0x16'"),
        (["--tokens", "8,-1"], "--tokens: expected a token count from 1 on, got '-1'"),
        (["--ranks", "16,257"], "--ranks: expected a rank from 1 to 256, got '257'"),
        (["--ranks", ""], "--ranks: expected a rank from 1 to 256, got ''"),
        (["--dropout", "1"], "--dropout: expected a probability from 0 to below 1, got '1'"),
        (["--dropout", "nan"], "got 'nan'"),
        (["--dtype", "fp64"], "--dtype: invalid choice: 'fp64'"),
        (["--time-limit", "0"], "--time-limit: expected seconds above 0, got '0'"),
        (["--show", "--clear"], "not allowed with argument"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_show_and_clear(folder, capsys):
    path = tuned.file_of(GPU.name)
    assert main(["tune", "--show", "--device", "cpu"]) == 0
    assert f"{path}: there is no such file" in capsys.readouterr().out
    TuneFile(path, GPU).add(KEY, row())
    assert main(["tune", "--show", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert KEY in out
    assert "BLOCK_C 256" in out
    left = path.with_name(f"{path.name}.1.tmp")
    left.write_text("of a process that was killed")
    assert main(["tune", "--clear", "--device", "cpu"]) == 0
    assert f"Removed {path}" in capsys.readouterr().out
    assert not path.exists()
    assert not left.exists()
    assert main(["tune", "--clear", "--device", "cpu"]) == 0
    assert f"There was no {path}" in capsys.readouterr().out


@pytest.fixture
def on_made_up_gpu(folder, monkeypatch):
    """The command with a bench of its own in place of the GPU."""
    bench = Bench(folder, monkeypatch, {"BLOCK_C 256": 0.8})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    monkeypatch.setattr("fastlora.bench.clock.CudaClock", lambda device: bench.clock)
    monkeypatch.setattr(tuning, "measure_on", lambda clock: bench.measure)
    return bench


def test_it_measures_prints_a_table_and_keeps_the_rows(on_made_up_gpu, capsys):
    assert main(["tune", "--device", "cpu", "--shapes", "64x32"]) == 0
    out = capsys.readouterr().out
    assert f"{KEY}: 1000.0 us, best 800.0; 2 tried, 0 skipped" in out
    assert "what changed" in out
    assert ask().BLOCK_C == 256, "in use at once"
    assert main(["tune", "--device", "cpu", "--shapes", "64x32"]) == 0
    assert f"{KEY}: known" in capsys.readouterr().out
    assert len(on_made_up_gpu.rounds) == 2


def test_interrupted_it_says_what_is_kept(on_made_up_gpu, capsys):
    on_made_up_gpu.times = {DEFAULT: KeyboardInterrupt()}
    assert main(["tune", "--device", "cpu"]) == command.INTERRUPTED == 130
    assert "the same command goes on" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_ends_it(on_made_up_gpu, folder, monkeypatch, capsys):
    (folder / "file").write_text("")
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(folder / "file" / "below"))
    assert main(["tune", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("tune: cannot write to ")
    assert "FASTLORA_CACHE_DIR" in out


@pytest.mark.no_poison  # it would fill the large tensors that doctor only describes
def test_doctor_says_what_is_in_use_and_why_not(folder, capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    path = tuned.file_of(GPU.name)
    assert f"Tuned launches: defaults, for {path}: there is no such file" in capsys.readouterr().out
    write(folder, content())
    assert main(["doctor", "--device", "cpu"]) == 0
    assert f"Tuned launches: {path}, 1 rows, 1 of them not the default" in capsys.readouterr().out
