"""Tuned launch configurations: keys, the file and what is refused of it, overrides in launches."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rich", reason="the commands print through rich")

from tune_cases import (
    BASE,
    CPU,
    DEEP,
    GPU,
    KEY,
    OP,
    OPS,
    SHRINK,
    SIZES,
    SMALL,
    WIDE,
    ask,
    content,
    empty_folder,  # noqa: F401  (the fixture `folder`)
    row,
    write,
)

import fastlora
from fastlora import tune as tuning
from fastlora.kernels import tuned
from fastlora.kernels.cache import cache_folder
from fastlora.kernels.config import ReduceConfig
from fastlora.kernels.tuned import Asked, values_of
from fastlora.tune import difference

SHRINK_KEY = "lora_shrink 16-bit r16 M64 K128 beside"


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
        for name in ("name", "capability", "triton", "kernels")
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
    assert cache_folder() == Path.home() / "tuned"
    monkeypatch.delenv("FASTLORA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fastlora"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == Path.home() / ".cache" / "fastlora"


# The launches.


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
    for name in ("lora_forward", "lora_grad_x", "lora_grad_ab_tma"):
        module = importlib.import_module(f"fastlora.kernels.{name}")
        monkeypatch.setattr(module, "has_tma", lambda major: False)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize(("p", "adapter_dtype"), [(0.0, None), (0.3, None), (0.3, torch.float32)])
def test_an_override_reaches_its_launch_and_the_numbers_stay(
    op, p, adapter_dtype, monkeypatch, device
):
    if op.endswith("_pointer") or op == "lora_grad_ab":
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
