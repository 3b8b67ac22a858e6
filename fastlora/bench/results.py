"""Results on disk: one JSON line for each thing that happened, appended as it happens.

Lines have a ``type``: ``run`` (machine, versions, command), ``ceiling`` (measured bandwidth and rate),
``case`` (its sizes), ``begin`` and ``end`` of it, ``result`` (every sample of one provider in one mode), and
``clocks``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlora.bench.clock import EAGER
from fastlora.bench.registry import FLOOR
from fastlora.bench.stats import Spread, spread

FILE = "results.jsonl"

OK, WRONG, OOM, ERROR = "ok", "wrong", "out of memory", "error"

Key = tuple[str, str, str, str]
"""Case, mode, schedule and provider."""


@dataclass
class Result:
    """One provider on one case, in one mode and schedule."""

    case: str
    suite: str
    mode: str
    schedule: str
    provider: str
    label: str
    status: str = OK
    message: str = ""
    device_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    calls: int = 1
    block: int = 0
    """Results of one block were timed in the same turns."""
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    checked_at_p: float = 0.0

    @property
    def key(self) -> Key:
        """What there is one result of."""
        return (self.case, self.mode, self.schedule, self.provider)

    @property
    def ms(self) -> Spread:
        """Device time: median and percentiles."""
        return spread(self.device_ms)


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{v:.5g}") for v in values]


@dataclass
class Results:
    """Everything that a file holds; of several results of one key the newest."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[Key, Result] = field(default_factory=dict)
    timed: dict[tuple[str, str, str, str, int], Result] = field(default_factory=dict)
    """By key and block: what was timed in the same turns."""
    ceilings: dict[str, float] = field(default_factory=dict)
    unfinished: dict[str, int] = field(default_factory=dict)
    """Cases that began and never ended, and how often."""
    broken_lines: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """Take one line in."""
        kind = record.pop("type")
        if kind == "run":
            self.runs.append(record)
        elif kind == "case":
            self.cases[record["case"]] = record
        elif kind == "begin":
            self.unfinished[record["case"]] = self.unfinished.get(record["case"], 0) + 1
        elif kind == "end":
            self.unfinished.pop(record["case"], None)
        elif kind == "ceiling":
            self.ceilings.update(record["values"])
        elif kind == "result":
            result = Result(**record)
            self.results[result.key] = result
            if result.device_ms:
                self.timed[(*result.key, result.block)] = result

    def beside(self, result: Result, provider: str) -> Result | None:
        """The result of another provider that was timed in the same turns."""
        return self.timed.get((*result.key[:3], provider, result.block))

    def floor_of(self, result: Result) -> Result | None:
        """The floor that was timed in the same turns."""
        return self.beside(result, FLOOR)

    def ratio(self, result: Result) -> float | None:
        """Median over the floor's median."""
        floor = self.floor_of(result)
        return result.ms.median / floor.ms.median if floor and result.device_ms else None

    def blocks(self) -> dict[tuple[str, str, str], list[Result]]:
        """Results by case, mode and schedule, in the order in which they came."""
        found: dict[tuple[str, str, str], list[Result]] = {}
        for result in self.results.values():
            found.setdefault((result.case, result.mode, result.schedule), []).append(result)
        return found


class Store:
    """A folder of results that grows line by line: what is written stays when the run is killed."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        """Open or make the folder; ``fresh`` sets what it holds aside."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        if fresh and self.path.exists():
            self.path.replace(_unused(folder / "results.old.jsonl"))
        self.results = load(self.path) if self.path.exists() else Results()
        self._end_cut_line()

    def append(self, kind: str, **values: Any) -> None:
        """Write one line, flushed, and take it in."""
        line = json.dumps({"type": kind, **values}, allow_nan=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.results.add(json.loads(line))

    def append_result(self, result: Result) -> None:
        """Write one result; samples keep five digits."""
        values = {
            **vars(result),
            "errors": {k: float(f"{v:.3g}") for k, v in result.errors.items()},
        }
        for name in ("device_ms", "wall_ms", "host_ms"):
            values[name] = _rounded(values[name])
        self.append("result", **values)

    def _end_cut_line(self) -> None:
        # A line that was cut by a kill must not swallow the next one.
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")


def _unused(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}.{number}{path.suffix}")
        number += 1
    return candidate


def load(path: Path) -> Results:
    """Read results.

    Args:
        path (Path): a folder of results, its file, or a ``.json`` file of a fastlora before 0.2.

    Raises:
        ValueError: there is nothing to read, or no line of it is a result.
    """
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise ValueError(f"{path}: no results there")
    if path.suffix == ".json":
        return _load_single_json(path)
    found = Results()
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        try:
            found.add(json.loads(line))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            found.broken_lines += 1
    if not found.runs and not found.results and found.broken_lines:
        raise ValueError(f"{path}: not a file of results")
    return found


def _load_single_json(path: Path) -> Results:
    """The format of ``benchmarks/results/h100_lora_linear.json``: one document, eager times only."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Results()
        found.add(
            {
                "type": "run",
                "machine": content["machine"],
                "command": content["command"],
                "note": content.get("note", ""),
            }
        )
        for block, entry in enumerate(content["cases"]):
            sizes = {**entry["case"]}
            for name in ("dtype", "adapter_dtype"):
                word = sizes[name].removeprefix("torch.")
                sizes[name] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[word]
            from fastlora.bench.cases import TrainCase

            case = TrainCase(tag="table", **sizes)
            found.add(case_record(case))
            for row in entry["rows"]:
                for long, samples in row["samples"].items():
                    mode = "step" if "backward" in long else "forward"
                    found.add({
                        "type": "result", "case": case.id, "suite": "train", "mode": mode,
                        "schedule": EAGER, "provider": row["provider"], "label": row["label"],
                        "message": row["problem"], **samples, "block": block,
                        "peak_bytes": row["peak_bytes"][long], "errors": row["errors"],
                        "checked_at_p": row["checked_at_p"],
                    })  # fmt: skip
        return found
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a file of results ({error})") from error


def case_record(case: Any) -> dict[str, Any]:
    """The line that describes a case."""
    modes = ("forward", "step", "generate")
    work = {mode: case.work(mode) for mode in modes}
    return {
        "type": "case", "case": case.id, "suite": case.suite, "tag": case.tag, "title": case.title,
        "tokens": case.tokens, "sizes": dict(vars(case)), "work": work,
    }  # fmt: skip
