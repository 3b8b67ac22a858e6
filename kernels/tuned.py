"""Launch configurations measured on this very GPU, laid over those of `config`: a file, read once.

A row says: where `config` chooses ``default`` for such a call, choose ``best``. It applies nowhere else, so
that a row never meets tiles that it was not measured against, and a changed default leaves it idle.
`python -m fastlora tune` writes the file; without one, or with one that is not exactly for this GPU, this
Triton and these kernels, every launch has its default.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from .cache import cache_folder
from .config import LaunchConfig, ReduceConfig, cdiv, next_power_of_2, rank_block

C = TypeVar("C", LaunchConfig, ReduceConfig)
Values = Mapping[str, int]
"""Fields of a configuration by name, but for those that follow from a shape: see `values_of`."""

FORMAT = 1

_LAUNCH = {"num_warps": (4, 8), "num_stages": (1, 2, 3, 4, 5, 6)}
_TILE = {"BLOCK_M": (64, 128, 256), "BLOCK_N": (64, 128, 256)}
_GEMM = _TILE | {"GROUP_M": (1, 2, 4, 8, 16)} | _LAUNCH
_TMA = _GEMM | {"BLOCK_N": (128, 256), "SUBTILES": (1, 2, 4)}  # BLOCK_K is one swizzle atom
_POINTER = _GEMM | {"BLOCK_K": (16, 32, 64, 128)}
_REDUCE = {"BLOCK_M": (16, 32, 64, 128), "BLOCK_C": (32, 64, 128, 256)} | _LAUNCH
SPACES: dict[str, dict[str, tuple[int, ...]]] = {
    # 32 rows at most: with more, its product with dropout may be miscompiled (`shrink_config`).
    "lora_shrink": {"BLOCK_M": (16, 32), "BLOCK_K": (32, 64, 128, 256, 512)} | _LAUNCH,
    "lora_forward_tma": _TMA,
    "lora_forward_pointer": _POINTER,
    "lora_grad_x_tma": _TMA,
    "lora_grad_x_pointer": _POINTER,
    "lora_grad_ab": _REDUCE,
    "lora_grad_a": _REDUCE,
    "lora_grad_b": _REDUCE,
}
"""What a row of an op may change, and to what; every other field is the default's."""

_FOLLOWS = ("row_splits", "SPLITS")  # from the shape and the blocks


@dataclass(frozen=True)
class Identity:
    """What a file's measurements hold for."""

    name: str
    capability: str
    triton: str
    kernels: str
    """`kernels_hash` of the sources that were measured."""


@dataclass(frozen=True)
class Row:
    """One measurement: us of the step that the op is part of, with its default and with the best."""

    default: Values
    best: Values
    default_us: float
    best_us: float
    tried: int
    """Candidates that were measured."""
    skipped: int
    """Candidates that did not compile, did not run, or gave other numbers."""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """The rows in use on a device, and where there are none the reason."""

    path: Path | None = None
    rows: Mapping[str, Row] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Asked:
    """One question that `choose` was asked."""

    op: str
    default: LaunchConfig | ReduceConfig
    itemsize: int
    R: int


@dataclass
class Trial:
    """What `choose` answers in place of the file, by key, and what it was asked."""

    answers: Mapping[str, Values]
    asked: dict[str, Asked] = field(default_factory=dict)


_trial: Trial | None = None


def bucket(n: int) -> int:
    """The power of two nearest to n, by ratio: 4096 for 2897 to 5792."""
    above = next_power_of_2(max(1, n))
    return above if 2 * n * n > above * above else above // 2


def make_key(
    op: str, itemsize: int, precision: str, R: int, sizes: Values, flags: Mapping[str, bool]
) -> str:
    """The class of calls that a row is for, in words: ``lora_shrink 16-bit r16 M8192 K4096 dropout``."""
    words = [op, "16-bit" if itemsize == 2 else precision, f"r{rank_block(R)}"]
    words += [f"{name}{bucket(size)}" for name, size in sizes.items()]
    return " ".join([*words, *(name for name, on in flags.items() if on)])


def values_of(config: LaunchConfig | ReduceConfig) -> dict[str, int]:
    """The fields that a row states."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in _FOLLOWS}


def choose(
    op: str,
    default: C,
    device: torch.device,
    itemsize: int,
    precision: str,
    R: int,
    sizes: Values,
    **flags: bool,
) -> C:
    """The measured configuration of a call, or its default; asked when a plan is made, not at each call.

    Args:
        op (str): one of `SPACES`.
        default (LaunchConfig | ReduceConfig): what `config` gives for the call.
        device (torch.device): where the call runs.
        itemsize (int): bytes of an element of x.
        precision (str): of `dot_precision`.
        R (int): the rank.
        sizes (Mapping[str, int]): M, and of K and N those that the op has; the first after M is that of the
            columns over which a pass with ``row_splits`` goes.
        **flags (bool): all else that decides whether a configuration runs, or how fast.

    Returns:
        LaunchConfig | ReduceConfig: ``default`` itself wherever no row applies.
    """
    trial = _trial
    rows = {} if trial is not None else table(device).rows
    if trial is None and not rows:
        return default
    key = make_key(op, itemsize, precision, R, sizes, flags)
    if trial is not None:
        trial.asked.setdefault(key, Asked(op, default, itemsize, R))
        best = trial.answers.get(key)
    else:
        row = rows.get(key)
        best = row.best if row is not None and row.default == values_of(default) else None
    if best is None or best == values_of(default):
        return default
    if op in ("lora_grad_a", "lora_grad_b"):  # as many programs as before
        M, columns = list(sizes.values())[:2]
        old = dataclasses.asdict(default)
        programs = old["row_splits"] * cdiv(columns, old["BLOCK_C"])
        splits = min(cdiv(M, best["BLOCK_M"]), programs // cdiv(columns, best["BLOCK_C"]))
        best = {**best, "row_splits": max(1, splits)}
    return dataclasses.replace(default, **best)


@contextmanager
def trying(answers: Mapping[str, Values]) -> Iterator[Trial]:
    """Plans of the block are made with these answers, by key, and no file; for measuring and tests.

    It is the process's, not the thread's.
    """
    from .launch import clear_plans  # the rest of this file does without Triton

    global _trial
    before, _trial = _trial, Trial(answers)
    clear_plans()
    try:
        yield _trial
    finally:
        _trial = before
        clear_plans()


@functools.lru_cache(maxsize=64)
def table(device: torch.device) -> Table:
    """What is in use on a device: read once in a process, never an exception."""
    return read_table(identify(device))


def forget() -> None:
    """Read the file again when the next plan is made, and make all plans anew."""
    from .launch import clear_plans

    table.cache_clear()
    clear_plans()


@functools.cache
def kernels_hash() -> str:
    """The sources of the kernels and of their configurations, as 12 hexadecimal digits."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def identify(device: torch.device) -> Identity | None:
    """What runs there; ``None`` off CUDA, and for Triton's interpreter."""
    if device.type != "cuda":
        return None
    try:
        import triton
        from triton import knobs
    except ImportError:
        return None
    if knobs.runtime.interpret:
        return None
    p = torch.cuda.get_device_properties(device)
    return Identity(p.name, f"{p.major}.{p.minor}", triton.__version__, kernels_hash())


def file_of(name: str) -> Path:
    """The file of a GPU of this name."""
    return cache_folder() / f"tuned-{re.sub(r'[^A-Za-z0-9]+', '_', name).strip('_')}.json"


def read_table(identity: Identity | None) -> Table:
    """The file of a GPU, or the reason why it is not used; never an exception."""
    if identity is None:
        return Table(problem="the kernels do not run on a GPU here")
    path = None
    try:
        path = file_of(identity.name)
        return Table(path, parse(path.read_text(encoding="utf-8"), identity))
    except FileNotFoundError:
        return Table(path, problem="there is no such file")
    except (OSError, RuntimeError, ValueError) as error:  # RecursionError is a RuntimeError
        return Table(path, problem=" ".join(str(error).split()) or type(error).__name__)


def parse(text: str, identity: Identity) -> dict[str, Row]:
    """The rows of a file.

    Raises:
        ValueError: it is not a file of this format, not for this GPU and these versions, or any of its rows
            is not one that tuning could have written.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no complete JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"its format must be {FORMAT}, got {found!r}")
    made_for = content.get("gpu")
    for name, here in dataclasses.asdict(identity).items():
        there = made_for.get(name) if isinstance(made_for, dict) else None
        if there != here:
            raise ValueError(f"it was measured with {name} {there!r}, here it is {here!r}")
    rows = content.get("rows")
    if not isinstance(rows, dict):
        raise ValueError(f"its rows must be an object, got {type(rows).__name__}")
    return {key: _parse_row(key, row) for key, row in rows.items()}


def _parse_row(key: str, content: Any) -> Row:
    names = {f.name for f in dataclasses.fields(Row)}
    if not isinstance(content, dict) or set(content) != names:
        raise ValueError(f"row {key!r} must have {sorted(names)}, got {content!r:.200}")
    row = Row(**content)
    for name in ("default_us", "best_us", "tried", "skipped"):
        value = content[name]
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"row {key!r}: {name} must be a number from 0 on, got {value!r}")
    if not isinstance(row.note, str):
        raise ValueError(f"row {key!r}: note must be a string, got {row.note!r}")
    check_values(key, row.default, row.best)
    return row


def check_values(key: str, default: Any, best: Any) -> None:
    """Raise ``ValueError`` unless ``best`` may stand where the op of ``key`` has ``default``."""
    op = key.partition(" ")[0]
    space = SPACES.get(op)
    if space is None:
        raise ValueError(f"row {key!r}: the op must be one of {sorted(SPACES)}, got {op!r}")
    kind = ReduceConfig if "BLOCK_C" in space else LaunchConfig
    names = {f.name for f in dataclasses.fields(kind)} - set(_FOLLOWS)
    for label, found in (("default", default), ("best", best)):
        if not isinstance(found, dict) or set(found) != names:
            raise ValueError(f"row {key!r}: {label} must have {sorted(names)}, got {found!r:.200}")
        for name, value in found.items():
            if type(value) is not int:
                raise ValueError(f"row {key!r}: {name} must be an integer, got {value!r}")
    for name, value in best.items():
        if value != default[name] and value not in space.get(name, ()):
            allowed = sorted({default[name], *space.get(name, ())})
            raise ValueError(f"row {key!r}: {name} must be one of {allowed}, got {value}")
