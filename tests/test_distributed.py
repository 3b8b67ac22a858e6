"""DDP, FSDP2 and tensor parallelism: two gloo processes against one."""

from __future__ import annotations

import json
import re

import pytest
from launch_ranks import HERE, RANKS, launch


def test_two_processes_equal_one(tmp_path, interpreter_problem):
    # One launch for all: starting the two interpreters costs more than the checks.
    source = "".join(
        (HERE / f"distributed_{kind}.py").read_text(encoding="utf-8") for kind in ("data", "tensor")
    )
    names = re.findall(r"^def (\w+)\(folder\)", source, re.MULTILINE)
    assert len(names) >= 36
    script = HERE / "distributed_checks.py"
    outputs = launch([script, tmp_path], tmp_path, interpret=not interpreter_problem)
    for output in outputs:
        ran = [line for line in output.splitlines() if line in names]
        assert sorted(ran) == sorted(names)
    if interpreter_problem:
        pytest.skip(f"{interpreter_problem}: all of it passed, but on the eager path")


def test_example_equals_one_process(tmp_path):
    script = HERE.parent / "examples" / "finetune_distributed.py"
    figures = tmp_path / "figures.json"
    arguments = ["--mode", "tp", "--cpu", "--check", "--steps", 3, "--warmup", 1, "--json", figures]
    output = launch([script, *arguments], tmp_path, interpret=False)[0]
    assert "equal to one process" in output
    data = json.loads(figures.read_text(encoding="utf-8"))
    assert len(data["losses"]) == 3 and len(data["peak_mib"]) == RANKS
    assert data["losses"] == pytest.approx(data["losses_of_one_process"], rel=1e-4)
