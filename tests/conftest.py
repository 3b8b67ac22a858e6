"""Shared settings: interpreted kernels without a GPU, poisoned outputs, fixed seeds."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Here, before a test file imports the kernels: @triton.jit reads it when it decorates them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test reaches a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No deadline: an interpreted kernel takes seconds. Derandomized: a red run repeats.
hypothesis.settings.register_profile(
    "fastlora",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastlora")

if "PYTEST_XDIST_WORKER" in os.environ and not HAS_CUDA:
    # One core a worker: torch's own threads would only contend.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if HAS_CUDA else "cpu"


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The helpers of tests/oracle.py, which importlib mode leaves off sys.path."""
    path = Path(__file__).with_name("oracle.py")
    spec = importlib.util.spec_from_file_location("oracle", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def fresh_plans() -> None:
    """No plan of another test, which may have replaced what it was made from."""
    launch = sys.modules.get("fastlora.kernels.launch")
    if launch is not None:
        launch.clear_plans()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, or 0x7F in every byte of an integer, so that an unwritten element shows."""
    if tensor.is_meta or tensor.numel() == 0:
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(int.from_bytes(b"\x7f" * tensor.element_size(), "big"))


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap an allocator so that what fastlora's own code allocates with it is poisoned."""

    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(tensor) if caller.partition(".")[0] == "fastlora" else tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("no_poison") is not None:
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
