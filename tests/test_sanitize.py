"""tests/sanitize.py reaches every kernel, so that what a sanitizer says of it is said of all of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def sanitize():
    path = Path(__file__).with_name("sanitize.py")
    spec = importlib.util.spec_from_file_location("sanitize", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # what it sets is for a process of its own
        patch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "0")
        spec.loader.exec_module(module)
    return module


def test_every_kernel_runs(sanitize):
    counts = sanitize.run()
    assert sanitize.missing(counts) == []
    assert all(counts.values())


def test_a_kernel_that_does_not_run_is_missed(sanitize):
    missing = sanitize.missing(sanitize.run("embedding"))
    assert "_lora_embedding_kernel" not in missing
    assert "_lora_merge_kernel" in missing
    assert not torch.backends.cuda.matmul.allow_tf32
