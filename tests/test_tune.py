"""Tuning: the candidates, the measuring with a made-up clock, the file that it writes, a GPU."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rich", reason="the commands print through rich")

from tune_cases import (
    BASE,
    DEEP,
    GPU,
    KEY,
    OP,
    OPS,
    SHRINK,
    SMALL,
    WIDE,
    Bench,
    ask,
    content,
    empty_folder,  # noqa: F401  (the fixture `folder`)
    row,
    write,
)

import fastlora
from fastlora import tune as tuning
from fastlora import tune_file
from fastlora.__main__ import main
from fastlora.bench.clock import HostClock
from fastlora.bench.stats import Spread
from fastlora.kernels import tuned
from fastlora.kernels.config import LaunchConfig, ReduceConfig
from fastlora.kernels.tuned import Asked, Row, values_of
from fastlora.tune import DEFAULT, TuneError, Tuner, difference
from fastlora.tune_candidates import candidates, least_shared_bytes
from fastlora.tune_file import TuneFile

# What is tried.

ASKED = [
    Asked("lora_shrink", SHRINK, 2, 16),
    Asked("lora_shrink", LaunchConfig(16, 16, 256, 4, 3), 2, 32),
    Asked("lora_forward_tma", LaunchConfig(128, 256, 64, 8, 4, SUBTILES=2), 2, 16),
    Asked("lora_grad_x_tma", LaunchConfig(128, 128, 32, 8, 4, SUBTILES=2), 4, 64),
    Asked("lora_forward_pointer", LaunchConfig(128, 128, 32, 8, 4), 2, 16),
    Asked("lora_grad_x_pointer", LaunchConfig(64, 64, 16, 4, 3), 4, 16),
    Asked("lora_grad_a", BASE, 2, 64),
    Asked("lora_grad_ab", ReduceConfig(64, 32, 1, 4, 4), 2, 16),
    Asked("lora_grad_b", ReduceConfig(64, 256, 1, 8, 3), 2, 16),
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda a: a.op)
@pytest.mark.parametrize("shared", [101_376, 232_448])
def test_candidates_are_few_allowed_and_fit(asked, shared):
    default, found = values_of(asked.default), candidates(asked, shared)
    assert 4 <= len(found) <= 36
    assert default not in found
    assert len({tuple(c.items()) for c in found}) == len(found)
    for c in found:
        tuned.check_values(asked.op, default, c)
        assert least_shared_bytes(asked, c) <= shared
        if "BLOCK_N" in c and asked.op != "lora_shrink":
            assert c["BLOCK_M"] * c["BLOCK_N"] // (32 * c["num_warps"]) <= 128


def test_a_ring_that_does_not_fit_is_left_out():
    asked = Asked("lora_forward_tma", LaunchConfig(128, 128, 64, 8, 3, SUBTILES=2), 2, 16)
    tiles = {(c["BLOCK_M"], c["BLOCK_N"], c["num_stages"]) for c in candidates(asked, 101_376)}
    assert (128, 256, 2) not in tiles  # 2 x 48 KB, and 32 KB on its way out
    assert (64, 128, 3) in tiles


# Measuring, with an op that needs no kernel and a clock that is made up.


def test_the_fastest_is_kept_and_used(folder, monkeypatch):
    bench = Bench(folder, monkeypatch, {"BLOCK_C 256": 0.8, "num_stages 4": 0.9})
    (outcome,) = bench.run()
    assert outcome.row == Row(values_of(BASE), WIDE, 1000.0, 800.0, tried=2, skipped=0)
    assert (outcome.key, outcome.step, outcome.fresh) == (KEY, "forward", True)
    assert bench.rows() == {KEY: outcome.row}
    assert [list(names) for names in bench.rounds] == [
        [DEFAULT, "BLOCK_C 256", "num_stages 4"],
        [DEFAULT, "BLOCK_C 256"],
    ]
    tuned.forget()
    assert ask().BLOCK_C == 256


@pytest.mark.parametrize(
    "times",
    [
        {"BLOCK_C 256": 0.995},  # less than what counts
        {"BLOCK_C 256": Spread(0.9, 0.8, 1.2)},  # less than its noise
        {DEFAULT: Spread(1.0, 0.8, 1.2), "BLOCK_C 256": 0.9},
        lambda turn: {"BLOCK_C 256": 0.8 if turn == 1 else 1.0},  # not confirmed
    ],
)
def test_what_is_not_faster_beyond_noise_twice_leaves_the_default(folder, monkeypatch, times):
    (outcome,) = Bench(folder, monkeypatch, times).run()
    assert outcome.row.best == outcome.row.default == values_of(BASE)
    assert outcome.row.default_us == outcome.row.best_us == 1000.0
    tuned.forget()
    assert ask() is BASE


def test_wrong_numbers_and_errors_are_skipped_before_they_are_timed(folder, monkeypatch):
    bench = Bench(folder, monkeypatch, {"BLOCK_C 256": 0.1, "num_stages 4": 0.1})
    bench.outputs = {
        (OP, 256, 3): 1.2,
        (OP, 128, 4): RuntimeError("out of resource: shared memory"),
    }
    (outcome,) = bench.run()
    assert outcome.row == Row(values_of(BASE), values_of(BASE), 1000.0, 1000.0, tried=0, skipped=2)
    assert [list(names) for names in bench.rounds] == [[DEFAULT]]
    bench.outputs = {(OP, 256, 3): float("nan")}
    (outcome,) = bench.run(again=True)
    assert outcome.row.best == DEEP
    assert (outcome.row.tried, outcome.row.skipped) == (1, 1)


def test_a_second_run_measures_nothing_unless_asked(folder, monkeypatch):
    bench = Bench(folder, monkeypatch, {"BLOCK_C 256": 0.8})
    first = bench.run()
    bench.rounds.clear()
    second = bench.run()
    assert bench.rounds == []
    assert [(o.row, o.fresh) for o in second] == [(first[0].row, False)]
    bench.times = {"num_stages 4": 0.5}
    assert bench.run(again=True)[0].row.best == DEEP
    assert bench.rows()[KEY].best == DEEP


def test_again_measures_a_class_of_calls_once_a_run(folder, monkeypatch):
    bench = Bench(folder, monkeypatch, {})
    bench.run()
    tuner = bench.tuner(again=True)
    assert [o.fresh for _ in range(2) for o in tuner.tune(SMALL)] == [True, False]


def test_what_a_candidate_does_not_write_is_not_taken_for_the_right_numbers(folder, monkeypatch):
    bench = Bench(folder, monkeypatch, {"BLOCK_C 256": 0.1})
    given_out = torch.ones(4)  # memory that a pool gives out again, with the right numbers in it
    plain = bench.step

    def step(i):
        return (given_out,) if ask().BLOCK_C == 256 else plain(i)

    monkeypatch.setattr(torch, "full_like", lambda t, value: given_out.fill_(value))
    monkeypatch.setattr(tuning, "make_steps", lambda shape, device: {"forward": step})
    (outcome,) = bench.run()
    assert (outcome.row.tried, outcome.row.skipped) == (1, 1)
    assert outcome.row.best == values_of(BASE)


def test_a_row_of_another_default_is_measured_again(folder, monkeypatch):
    bench = Bench(folder, monkeypatch, {})
    old = values_of(BASE) | {"num_stages": 2}
    TuneFile(tuned.file_of(GPU.name), GPU).add(KEY, row(WIDE, old))
    assert bench.run()[0].fresh
    assert bench.rows()[KEY].default == values_of(BASE)


def test_an_interrupt_keeps_what_there_is_and_the_next_run_goes_on(folder, monkeypatch):
    bench = Bench(folder, monkeypatch, {"BLOCK_C 256": 0.8}, ops=(OP, "lora_grad_ab"))
    seen = []

    def stop(turn):
        return {"BLOCK_C 256": 0.8} if turn < 3 else {DEFAULT: KeyboardInterrupt()}

    bench.times = stop
    with pytest.raises(KeyboardInterrupt):
        seen.extend(bench.run())
    assert list(bench.rows()) == [KEY]
    assert [p.name for p in folder.iterdir() if p.suffix == ".tmp"] == []
    bench.rounds.clear()
    bench.times = {}
    assert [o.fresh for o in bench.run()] == [False, True]
    # The op that was measured before has its best while the other is measured.
    assert bench.rounds[0][DEFAULT] == {KEY: WIDE}
    assert bench.rounds[0]["num_stages 4"] == {KEY: WIDE, bench.key("lora_grad_ab"): DEEP}
    assert set(bench.rows()) == {KEY, bench.key("lora_grad_ab")}


def test_a_time_limit_begins_nothing_new(folder, monkeypatch):
    bench = Bench(folder, monkeypatch, {})
    tuner = bench.tuner(deadline=0.0)
    assert list(tuner.tune(SMALL)) == []
    assert tuner.out_of_time
    assert bench.rounds == []


def test_a_gpu_that_fails_is_an_error_and_its_candidate_is_not_met_again(folder, monkeypatch):
    bench = Bench(folder, monkeypatch, {"num_stages 4": 0.5})
    bench.outputs = {(OP, 256, 3): RuntimeError("illegal memory access")}
    bench.clock.healthy = lambda: False
    with pytest.raises(TuneError, match=r"BLOCK_C 256 the GPU failed.*illegal memory access"):
        bench.run()
    assert bench.rounds == []
    assert bench.rows()[KEY].best == values_of(BASE)
    bench.clock.healthy = lambda: True
    (outcome,) = bench.run()
    assert not outcome.fresh
    assert outcome.row.note.startswith("not measured: with BLOCK_C 256 the GPU failed")


def test_a_default_that_does_not_run_leaves_out_its_step(folder, monkeypatch):
    bench = Bench(folder, monkeypatch, {})
    bench.outputs = {(OP, 128, 3): torch.OutOfMemoryError("no room")}
    (outcome,) = bench.run()
    assert (outcome.row, outcome.message) == (None, "OutOfMemoryError: no room")
    assert bench.rows() == {}


def test_all_ops_of_a_linear_are_tuned(folder, monkeypatch):
    """The real steps, in the interpreter where there is no GPU: each op has a row that holds its best."""
    if torch.cuda.is_available():
        pytest.skip("the made-up GPU stands in for the CPU")
    monkeypatch.setattr(tuning, "candidates", lambda asked, shared: candidates(asked, shared)[:1])

    def measure(step, variants):
        return {name: Spread(*(1.0 if name == DEFAULT else 0.5,) * 3) for name in variants}

    file = TuneFile(tuned.file_of(GPU.name), GPU)
    shape = dataclasses.replace(SMALL, p=0.1)
    outcomes = list(Tuner(file, HostClock(), measure, 232_448).tune(shape))
    assert [o.message for o in outcomes if o.message] == []
    rows = tuned.read_table(GPU).rows
    assert {key.partition(" ")[0] for key in rows} == {op for op in OPS if "pointer" not in op}
    assert all(r.best != r.default and r.skipped == 0 for r in rows.values())
    assert {o.key for o in outcomes if o.fresh} == set(rows)
    again = list(Tuner(file, HostClock(), measure, 232_448).tune(shape))
    assert len(again) == len(outcomes)
    assert not any(o.fresh for o in again)


def test_difference_sees_what_tiling_must_not_change():
    want = torch.linspace(-1, 1, 4096).bfloat16().view(64, 64)
    mask = torch.arange(8, dtype=torch.uint8)
    assert difference((want, mask, None), (want, mask.clone(), None)) == ""
    assert difference((want * 1.004,), (want,)) == ""  # a rounding of bf16
    for wrong in (want * 1.02, want.float(), want[:32], want * float("nan"), None):
        assert difference((wrong,), (want,))
    one = want.clone()
    one[0, 0] += 0.1
    assert "off by" in difference((one,), (want,))
    assert difference((mask + 1,), (mask,)) == "result 0 differs"
    assert difference((), (want,)) == "0 results instead of 1"


# The file.


def test_rows_of_two_writers_are_both_kept(folder):
    one, two = (TuneFile(tuned.file_of(GPU.name), GPU) for _ in range(2))
    one.add(KEY, row())
    two.add(KEY + " dropout", row(DEEP))
    one.add(KEY + " x_strided", row())
    rows = tuned.read_table(GPU).rows
    assert {k: r.best for k, r in rows.items()} == {
        KEY: WIDE, KEY + " dropout": DEEP, KEY + " x_strided": WIDE
    }  # fmt: skip
    assert one.rows == rows


WRITER = """
import dataclasses, sys
from fastlora.kernels.tuned import Identity, Row, file_of
from fastlora.tune_file import TuneFile
name, triton, fastlora, mine = sys.argv[1:]
gpu = Identity(name, "8.0", triton, fastlora)
values = {"BLOCK_M": 64, "BLOCK_C": 128, "num_warps": 4, "num_stages": 3}
file = TuneFile(file_of(name), gpu)
for i in range(25):
    file.add(f"lora_grad_a {mine} {i}", Row(values, values, 1.0, 1.0, 0, 0))
"""


def test_two_processes_at_once_lose_no_row(folder):
    env = os.environ | {"PYTHONPATH": str(Path(fastlora.__file__).parents[1])}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, GPU.name, GPU.triton, GPU.kernels, mine], env=env
        )
        for mine in ("one", "two")
    ]
    assert [process.wait(300) for process in running] == [0, 0]
    assert set(tuned.read_table(GPU).rows) == {
        f"lora_grad_a {mine} {i}" for mine in ("one", "two") for i in range(25)
    }
    assert [p.name for p in folder.iterdir() if p.suffix == ".tmp"] == []


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_file_as_it_was(folder, monkeypatch, where):
    file = TuneFile(tuned.file_of(GPU.name), GPU)
    file.add(KEY, row())
    before = file.path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_file.os, where, stop)
    with pytest.raises(KeyboardInterrupt):
        file.add(KEY + " dropout", row())
    assert file.path.read_bytes() == before
    assert [p.name for p in folder.iterdir() if p.suffix == ".tmp"] == []


@pytest.mark.parametrize("value", ["", content(gpu=dataclasses.asdict(GPU) | {"triton": "3.4.0"})])
def test_a_file_of_no_use_is_replaced_by_the_first_row(folder, value):
    path = write(folder, value)
    file = TuneFile(path, GPU)
    assert file.replaces
    assert file.rows == {}
    file.add(KEY + " dropout", row())
    assert list(tuned.read_table(GPU).rows) == [KEY + " dropout"]


def test_a_folder_that_cannot_be_written_is_named(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(folder / "file" / "below"))
    with pytest.raises(OSError, match=r"file/below.*FASTLORA_CACHE_DIR"):
        TuneFile(tuned.file_of(GPU.name), GPU)


# A GPU.


@pytest.mark.gpu
def test_a_small_shape_on_the_gpu(tmp_path, monkeypatch, capsys):
    """Measured for real: the file is for this GPU, its rows are used, and results stay equal."""
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    tuned.forget()
    device = torch.device("cuda", torch.cuda.current_device())
    M, K, N, R = 512, 256, 512, 16
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16, requires_grad=True)
    W = torch.randn(N, K, device=device, dtype=torch.bfloat16) * K**-0.5
    A = torch.randn(R, K, device=device, dtype=torch.bfloat16).mul_(K**-0.5).requires_grad_()
    B = torch.randn(N, R, device=device, dtype=torch.bfloat16).mul_(R**-0.5).requires_grad_()

    def results():
        y = fastlora.lora_linear(x, W, A, B)
        return (y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, A, B)))

    want = results()
    assert main(["tune", "--shapes", f"{K}x{N}", "--tokens", str(M), "--ranks", str(R)]) == 0
    assert "skipped:" not in capsys.readouterr().out
    table = tuned.table(device)
    assert table.problem == ""
    assert table.path == tuned.file_of(torch.cuda.get_device_properties(device).name)
    pointer = torch.cuda.get_device_capability(device)[0] != 9
    variant = "tma" if pointer else "pointer"
    assert {key.partition(" ")[0] for key in table.rows} == {op for op in OPS if variant not in op}
    assert all(r.tried > 0 and 0 < r.best_us <= r.default_us for r in table.rows.values())
    assert difference(results(), want) == ""
    tuned.forget()
