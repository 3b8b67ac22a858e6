"""What the tests of tuned launches share: a made-up GPU, one op with its rows and files, and a bench.

conftest makes it importable: importlib mode puts no test folder on sys.path.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastlora import tune as tuning
from fastlora.bench.clock import HostClock
from fastlora.bench.stats import Spread
from fastlora.kernels import tuned
from fastlora.kernels.config import LaunchConfig, ReduceConfig
from fastlora.kernels.tuned import Identity, Row, choose, kernels_hash, values_of
from fastlora.tune import Tuner
from fastlora.tune_candidates import Shape
from fastlora.tune_file import TuneFile

CPU = torch.device("cpu")
GPU = Identity("Made-up GPU (40GB)", "8.0", "3.7.1", kernels_hash())
OP, SIZES = "lora_grad_a", {"M": 8192, "K": 4096}
BASE = ReduceConfig(64, 128, 4, num_warps=4, num_stages=3)
KEY = "lora_grad_a 16-bit r16 M8192 K4096"
WIDE = values_of(BASE) | {"BLOCK_C": 256}
DEEP = values_of(BASE) | {"num_stages": 4}
SHRINK = LaunchConfig(32, 16, 128, num_warps=4, num_stages=4)

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
# On a GPU up to 256 rows of 16 bits take launches that are not tuned.
SMALL = Shape(270 if torch.cuda.is_available() else 70, 72, 136, 16, torch.bfloat16)


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


@pytest.fixture(name="folder")
def empty_folder(tmp_path, monkeypatch):
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
