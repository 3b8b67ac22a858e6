"""Triton's cache on disk: shared by processes, unwritable, and broken; kernels compile without a GPU."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import pytest

pytest.importorskip("triton.knobs", reason="needs Triton")

COMPILE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import compile_kernels
(row,) = compile_kernels.compile_case(compile_kernels.Case("shrink", 90))
print(row.get("error") or row["registers"])
"""


@pytest.fixture(scope="module")
def shared(run_python, tmp_path_factory):
    """A cache that two processes filled at the same time, and what each printed."""
    folder = tmp_path_factory.mktemp("cache")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda _: run_python(COMPILE, TRITON_CACHE_DIR=str(folder)), range(2)))
    return folder, said


def test_two_processes_share_a_cache(shared):
    folder, (first, second) = shared
    assert first == second
    assert int(first) > 0
    assert len(list(folder.rglob("*.cubin"))) == 1


def test_a_broken_entry_is_named(shared, run_python):
    folder, _ = shared
    (entry,) = (p for p in folder.rglob("_lora*.json"))
    whole = entry.read_text()
    entry.write_text("")
    said = run_python(COMPILE, TRITON_CACHE_DIR=str(folder))
    entry.write_text(whole)
    assert said.startswith("RuntimeError: Triton failed to read or write a file")
    assert str(folder) in said
    assert "TRITON_CACHE_DIR" in said


def test_a_folder_that_cannot_be_written_is_named(run_python, tmp_path):
    # A file in its place: permissions would not stop root, which tests in containers run as.
    folder = tmp_path / "cache"
    folder.write_text("")
    said = run_python(COMPILE, TRITON_CACHE_DIR=str(folder))
    assert said.startswith("RuntimeError: Triton failed to read or write a file")
    assert str(folder) in said
