"""Tuned launch configurations: the table, its file, the measuring with a made-up clock, the command."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rich", reason="the commands print through rich")

import fastlora
from fastlora import tune as tuning
from fastlora import tune_file
from fastlora.__main__ import main
from fastlora.bench.clock import HostClock
from fastlora.bench.stats import Spread
from fastlora.cli import tune as command
from fastlora.kernels import tuned
from fastlora.kernels.config import LaunchConfig, ReduceConfig
from fastlora.kernels.tuned import Asked, Identity, Row, choose, values_of
from fastlora.tune import DEFAULT, TuneError, Tuner, difference
from fastlora.tune_candidates import Shape, candidates, least_shared_bytes
from fastlora.tune_file import TuneFile

CPU = torch.device("cpu")
GPU = Identity("Made-up GPU (40GB)", "8.0", "3.7.1", fastlora.__version__)
OP, SIZES = "lora_grad_a", {"M": 8192, "K": 4096}
BASE = ReduceConfig(64, 128, 4, num_warps=4, num_stages=3)
KEY = "lora_grad_a 16-bit r16 M8192 K4096"
WIDE = values_of(BASE) | {"BLOCK_C": 256}
DEEP = values_of(BASE) | {"num_stages": 4}
SHRINK = LaunchConfig(32, 16, 128, num_warps=4, num_stages=4)
SHRINK_KEY = "lora_shrink 16-bit r16 M64 K128"


def ask(op=OP, default=BASE, R=16, sizes=SIZES, **flags):
    return choose(op, default, CPU, 2, "tf32", R, sizes, **flags)


def row(best=WIDE, default=None, **changes):
    default = values_of(BASE) if default is None else default
    return Row(
        default, best, **{"default_us": 10.0, "best_us": 8.0, "tried": 3, "skipped": 1} | changes
    )


def content(**changes):
    rows = {KEY: dataclasses.asdict(row())}
    return {"format": 1, "gpu": dataclasses.asdict(GPU), "rows": rows} | changes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and a GPU in place of every device."""
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned, "identify", lambda device: GPU)
    tuned.forget()
    yield tmp_path
    tuned.forget()


def write(folder, value):
    path = tuned.file_of(GPU.name)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    tuned.forget()
    return path


# The table.


@pytest.mark.parametrize(
    ("n", "power"),
    [(1, 1), (2, 2), (3, 4), (2896, 2048), (2897, 4096), (4096, 4096), (5792, 4096), (5793, 8192),
     (14336, 16384), (11008, 8192)],
)  # fmt: skip
def test_bucket_is_the_nearest_power_of_two_by_ratio(n, power):
    assert tuned.bucket(n) == power


def test_key_is_readable_and_tells_what_differs():
    key = tuned.make_key("lora_shrink", 2, "tf32", 12, {"M": 8000, "K": 14336}, {"dropout": True})
    assert key == "lora_shrink 16-bit r16 M8192 K16384 dropout"
    fp32 = [tuned.make_key(OP, 4, p, 17, SIZES, {"dropout": False}) for p in ("tf32", "ieee")]
    assert fp32 == [f"lora_grad_a {p} r32 M8192 K4096" for p in ("tf32", "ieee")]


def test_without_a_gpu_nothing_is_read(monkeypatch):
    monkeypatch.setattr(tuned, "file_of", lambda name: pytest.fail("looked for a file"))
    assert ask() is BASE
    assert tuned.table(CPU).problem == "the kernels do not run on a GPU here"


def test_no_file_means_defaults(folder):
    assert ask() is BASE
    assert tuned.table(CPU) == tuned.Table(
        folder / "tuned-Made_up_GPU_40GB.json", {}, "there is no such file"
    )


def test_a_row_applies_to_its_class_of_calls_only(folder):
    write(folder, content())
    assert ask() == ReduceConfig(64, 256, 8, num_warps=4, num_stages=3)
    assert ask(sizes={"M": 6000, "K": 5000}).BLOCK_C == 256
    for other in ({"R": 17}, {"sizes": {"M": 4096, "K": 4096}}, {"dropout": True}):
        assert ask(**other) is BASE
    changed = dataclasses.replace(BASE, num_stages=2)
    assert ask(default=changed) is changed, "a default that it was not measured against"


def test_file_is_read_once(folder, monkeypatch):
    path = write(folder, content())
    assert ask().BLOCK_C == 256
    path.unlink()
    assert ask().BLOCK_C == 256
    tuned.forget()
    assert ask() is BASE


@pytest.mark.parametrize(
    ("op", "blocks", "M", "splits"),
    [(OP, {"BLOCK_C": 64}, 8192, 2), (OP, {"BLOCK_C": 256}, 8192, 8), (OP, {"BLOCK_C": 256}, 300, 5),
     (OP, {"num_warps": 8}, 8192, 4), ("lora_grad_b", {"BLOCK_C": 256}, 8192, 8),
     ("lora_grad_ab", {"BLOCK_C": 256}, 8192, 4)],
)  # fmt: skip
def test_programs_stay_as_many_where_rows_are_split(op, blocks, M, splits):
    sizes = {"M": M, "N" if op == "lora_grad_b" else "K": 4096}
    key = tuned.make_key(op, 2, "tf32", 16, sizes, {})
    with tuned.trying({key: values_of(BASE) | blocks}) as trial:
        chosen = ask(op, sizes=sizes)
    assert chosen == dataclasses.replace(BASE, **blocks, row_splits=splits)
    assert trial.asked == {key: Asked(op, BASE, 2, 16)}


def test_a_trial_stands_in_for_the_file_and_ends(folder):
    write(folder, content())
    with tuned.trying({}):
        assert ask() is BASE
        with tuned.trying({KEY: DEEP}):
            assert ask().num_stages == 4
        assert ask() is BASE
    assert ask().BLOCK_C == 256


DEEPLY = "[" * 100_000
BAD_FILES = [
    ("", "no complete JSON"),
    (json.dumps(content())[:-9], "no complete JSON"),
    (DEEPLY, ""),
    ("[]", "format must be 1, got 'list'"),
    (content(format=2), "format must be 1, got 2"),
    (content(gpu=None), "measured with name None, here it is 'Made-up GPU"),
    (content(rows=[]), "rows must be an object, got list"),
    (content(rows={KEY: 3}), "must have"),
    (content(rows={KEY: {"best": {}}}), "must have"),
    *(
        (content(gpu=dataclasses.asdict(dataclasses.replace(GPU, **{name: "other"}))),
         f"measured with {name} 'other', here it is")
        for name in ("name", "capability", "triton", "fastlora")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("value", "reason"), BAD_FILES)
def test_a_file_of_no_use_means_defaults_and_a_reason(folder, value, reason):
    path = write(folder, value)
    table = tuned.table(CPU)
    assert table.path == path
    assert table.rows == {}
    assert table.problem
    assert reason in table.problem
    assert ask() is BASE


def test_a_file_that_is_no_text_or_no_file_means_defaults(folder):
    path = tuned.file_of(GPU.name)
    path.write_bytes(b"\xff\xfe{}")
    assert "utf-8" in tuned.table(CPU).problem
    path.unlink()
    path.mkdir()
    tuned.forget()
    assert "directory" in tuned.table(CPU).problem
    assert ask() is BASE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"best": WIDE | {"BLOCK_C": 48}}, "BLOCK_C must be one of [32, 64, 128, 256], got 48"),
        ({"best": WIDE | {"num_warps": 3}}, "num_warps must be one of [4, 8], got 3"),
        ({"best": WIDE | {"num_stages": 7}}, "num_stages must be one of"),
        ({"best": WIDE | {"BLOCK_C": True}}, "BLOCK_C must be an integer, got True"),
        ({"best": WIDE | {"BLOCK_C": "256"}}, "BLOCK_C must be an integer, got '256'"),
        ({"best": WIDE | {"row_splits": 8}}, "best must have"),
        ({"default": {"BLOCK_M": 64}}, "default must have"),
        ({"default_us": float("nan")}, "default_us must be a number"),
        ({"best_us": -1}, "best_us must be a number from 0 on, got -1"),
        ({"tried": True}, "tried must be a number"),
        ({"note": 5}, "note must be a string, got 5"),
        ({"speed": 1}, "must have"),
    ],
)  # fmt: skip
def test_a_row_that_tuning_would_not_write_is_refused(folder, changes, reason):
    write(folder, content(rows={KEY: dataclasses.asdict(row()) | changes}))
    assert reason in tuned.table(CPU).problem
    assert KEY in tuned.table(CPU).problem
    assert ask() is BASE


@pytest.mark.parametrize(
    ("op", "field", "value"),
    [
        ("lora_shrink", "BLOCK_M", 64),  # a product that may be miscompiled
        ("lora_shrink", "BLOCK_N", 32),
        ("lora_forward_tma", "BLOCK_K", 64),  # not what a swizzle atom has
        ("lora_grad_x_pointer", "SUBTILES", 2),
        ("lora_forward", "num_stages", 3),
        ("multi_gemm", "num_stages", 3),
    ],
)
def test_what_an_op_cannot_have_is_refused(op, field, value):
    default = values_of(SHRINK)
    with pytest.raises(ValueError, match=field if op in tuned.SPACES else "the op must be one of"):
        tuned.check_values(f"{op} 16-bit", default, default | {field: value})


def test_cache_folder_goes_by_the_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLORA_CACHE_DIR", "~/tuned")
    assert tuned.cache_folder() == Path.home() / "tuned"
    monkeypatch.delenv("FASTLORA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.cache_folder() == tmp_path / "fastlora"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert tuned.cache_folder() == Path.home() / ".cache" / "fastlora"


# The launches.

OPS = {
    "lora_shrink": ("forward", {"BLOCK_M": 16, "num_stages": 2}),
    "lora_forward_tma": ("forward", {"BLOCK_M": 64, "SUBTILES": 1}),
    "lora_forward_pointer": ("forward", {"BLOCK_M": 64, "BLOCK_K": 64, "GROUP_M": 4}),
    "lora_grad_x_tma": ("backward", {"BLOCK_M": 64, "GROUP_M": 4}),
    "lora_grad_x_pointer": ("dx alone", {"BLOCK_N": 64, "num_warps": 4}),
    "lora_grad_ab": ("backward", {"BLOCK_M": 32, "BLOCK_C": 64}),
    "lora_grad_a": ("dA alone", {"BLOCK_M": 32, "BLOCK_C": 64}),
    "lora_grad_b": ("dB alone", {"BLOCK_M": 32, "BLOCK_C": 64}),
}
SMALL = Shape(70, 72, 136, 16, torch.bfloat16)


def watch_launches(monkeypatch):
    """Options of every launch that is prepared from now on, by op."""
    made = {}
    for op in OPS:
        name = op.removesuffix("_tma").removesuffix("_pointer")
        module = importlib.import_module(f"fastlora.kernels.{name}")
        plain = module.Launch

        def watched(kernel, *args, plain=plain, **options):
            made.setdefault(kernel.__name__, []).append(options)
            return plain(kernel, *args, **options)

        if plain.__module__.endswith("launch") and plain.__name__ == "Launch":
            monkeypatch.setattr(module, "Launch", watched)
    return made


def on_pointers(monkeypatch):
    for name in ("lora_forward", "lora_grad_x"):
        module = importlib.import_module(f"fastlora.kernels.{name}")
        monkeypatch.setattr(module, "has_tma", lambda major: False)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize(("p", "adapter_dtype"), [(0.0, None), (0.3, None), (0.3, torch.float32)])
def test_an_override_reaches_its_launch_and_the_numbers_stay(
    op, p, adapter_dtype, monkeypatch, device
):
    if op.endswith("_pointer"):
        on_pointers(monkeypatch)
    elif op.endswith("_tma") and device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the TMA variants run on sm_90")
    step_name, changes = OPS[op]
    shape = dataclasses.replace(SMALL, p=p, adapter_dtype=adapter_dtype)
    step = tuning.make_steps(shape, torch.device(device))[step_name]
    with tuned.trying({}) as trial:
        want = step(0)
    # The backward makes ds by lora_shrink too, without dropout.
    key = next(k for k, asked in trial.asked.items() if asked.op == op)
    made = watch_launches(monkeypatch)
    with tuned.trying({key: values_of(trial.asked[key].default) | changes}):
        got = step(0)
    assert difference(got, want) == ""
    kernel = f"_{op}_kernel"
    if op == "lora_grad_x_tma" and p > 0:
        kernel = "_lora_grad_x_dropout_kernel"
    assert any(changes.items() <= options.items() for options in made[kernel]), made[kernel]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the made-up GPU stands in for the CPU")
def test_a_file_reaches_the_public_function(folder, monkeypatch):
    x, W = torch.randn(64, 128).bfloat16(), torch.randn(48, 128).bfloat16()
    A, B = torch.randn(16, 128).bfloat16(), torch.randn(48, 16).bfloat16()
    made = watch_launches(monkeypatch)
    want = fastlora.lora_linear(x, W, A, B)
    (options,) = made["_lora_shrink_kernel"]
    default = values_of(
        importlib.import_module("fastlora.kernels.config").shrink_beside_config(64, 4)
    )
    assert options["BLOCK_K"] == default["BLOCK_K"] == 128
    best = default | {"BLOCK_K": 64}
    write(folder, content(rows={SHRINK_KEY: dataclasses.asdict(row(best, default))}))
    got = fastlora.lora_linear(x, W, A, B)
    assert made["_lora_shrink_kernel"][1]["BLOCK_K"] == 64
    assert difference((got,), (want,)) == ""


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


class Bench:
    """A step of one or two ops, candidates WIDE and DEEP for each, and the times that they shall take."""

    def __init__(self, folder, monkeypatch, times, ops=(OP,)):
        self.folder, self.times, self.ops = folder, times, ops
        self.rounds, self.outputs, self.clock = [], {}, HostClock()
        monkeypatch.setattr(tuning, "make_steps", lambda shape, device: {"forward": self.step})
        monkeypatch.setattr(
            tuning, "candidates",
            lambda asked, shared: [values_of(BASE) | {"BLOCK_C": 256}, values_of(BASE) | {"num_stages": 4}],
        )  # fmt: skip

    def key(self, op):
        return KEY.replace(OP, op)

    def step(self, i):
        results = []
        for op in self.ops:
            chosen = ask(op)
            output = self.outputs.get((op, chosen.BLOCK_C, chosen.num_stages), 1.0)
            if isinstance(output, Exception):
                raise output
            results.append(torch.full((4,), output))
        return tuple(results)

    def measure(self, step, variants):
        self.rounds.append({name: dict(answers) for name, answers in variants.items()})
        times = self.times(len(self.rounds)) if callable(self.times) else self.times
        found = {}
        for name in variants:
            ms = times.get(name, 1.0)
            if isinstance(ms, BaseException):
                raise ms
            found[name] = ms if isinstance(ms, Spread) else Spread(ms, ms, ms)
        return found

    def tuner(self, **options):
        file = TuneFile(tuned.file_of(GPU.name), GPU)
        return Tuner(file, self.clock, self.measure, 101_376, **options)

    def run(self, **options):
        return list(self.tuner(**options).tune(SMALL))

    def rows(self):
        return tuned.read_table(GPU).rows


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
            [sys.executable, "-c", WRITER, GPU.name, GPU.triton, GPU.fastlora, mine], env=env
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


# The command.


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


@pytest.mark.gpu
def test_a_small_shape_on_the_gpu(tmp_path, monkeypatch, capsys):
    """Measured for real: the file is for this GPU, its rows are used, and results stay equal."""
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    tuned.forget()
    device = torch.device("cuda", torch.cuda.current_device())
    M, K, N, R = 256, 256, 512, 16
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
