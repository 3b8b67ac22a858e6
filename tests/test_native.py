"""How `replay.cpp` is compiled: in the background, once a machine, and what is said where it cannot be."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from fastlora.kernels import native


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "0")
    monkeypatch.setattr(native, "_thread", None)
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "problem", "")
    assert native.wait() == f"{native.VARIABLE} is 0"
    assert native.module is None


def test_without_a_compiler_there_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(native, "_thread", None)
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "problem", "")
    monkeypatch.setenv("CXX", "false")
    assert "false failed" in native.wait()
    assert native.module is None
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_compiler_outlives_the_process_that_began(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_python: Any
) -> None:
    """A script that ends before it still leaves the file to the next one; whole, and once."""
    slow, begun, go = (tmp_path / name for name in ("slow", "begun", "go"))
    slow.write_text(
        f"#!/bin/sh\ntouch {begun}\nwhile [ ! -e {go} ]; do sleep 0.05; done\n"
        'for to; do :; done\necho done > "$to"\n'
    )
    slow.chmod(0o755)
    cache = tmp_path / "cache"
    env = {"CXX": f"{slow} -v", "FASTLORA_CACHE_DIR": str(cache)}
    code = f"""
import os, threading, time
from fastlora.kernels import native
threading.Thread(target=native.compiled, daemon=True).start()
while not os.path.exists({str(begun)!r}):
    time.sleep(0.05)
"""
    run_python(code, **env)
    assert not list(cache.glob("*.so"))
    go.touch()
    for _ in range(300):
        if list(cache.glob("*.so")):
            break
        time.sleep(0.1)
    (made,) = cache.glob("*.so")
    assert made.read_text() == "done\n"
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}
    for name in env:
        monkeypatch.setenv(name, env[name])
    assert native.compiled() == made
