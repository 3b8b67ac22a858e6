"""Shared settings: interpreted kernels without a GPU, poisoned outputs, fixed seeds, tests run alone."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
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

# A developer's own measured configurations stay out of the tests. Workers have the folder of the process
# that starts them, so that `replay.cpp` is compiled once for all.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="fastlora-tests-")
    os.environ["FASTLORA_CACHE_DIR"] = _CACHE.name

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

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core a worker, and for the processes that it starts: torch's threads, which spin while they wait,
    # would only contend. With a GPU too: 14 workers of 16 threads made a test on the CPU 200 times slower.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


ALONE = "FASTLORA_TEST_ALONE"
"""Set where pytest runs one test for another pytest."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is marked ``alone`` in a process of its own, which may break there."""
    if pyfuncitem.get_closest_marker("alone") is None or ALONE in os.environ:
        return None
    # Without the options and the names of the workers of this pytest.
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_ADDOPTS", "PYTEST_XDIST"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath, env=env | {ALONE: "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0 or "1 passed" not in done.stdout:
        pytest.fail(
            f"in a process of its own, which ended with {done.returncode}:\n"
            f"{done.stdout}\n{done.stderr}",
            pytrace=False,
        )
    return True


def check_strides_in_bytes() -> None:
    """Make the interpreter of Triton 3.4 and 3.5 take the descriptors that its compiler takes.

    It asks for rows that are a multiple of 16 elements apart, where the compiler, and the interpreter
    from 3.6 on, ask for 16 bytes.
    """
    try:
        import triton
    except ImportError:
        return
    if not triton.__version__.startswith(("3.4.", "3.5.")):
        return
    from triton.runtime.interpreter import TensorDescHandle

    def validate(self: Any) -> None:
        itemsize = self.base.dtype.element_ty.primitive_bitwidth // 8
        *rows, last = (int(stride.data.item()) for stride in self.strides)
        assert self.base.data.item() % 16 == 0, "base must be 16-byte aligned"
        assert len(self.strides) == len(self.block_shape) == self.ndim
        assert all(stride * itemsize % 16 == 0 for stride in rows), (
            "strides must be 16-byte aligned"
        )
        assert last == 1, "last dim must be contiguous"

    TensorDescHandle.validate = validate


if not HAS_CUDA:
    check_strides_in_bytes()


class HelperFinder(importlib.abc.MetaPathFinder):
    """Makes `import peft_cases` work in tests: importlib mode leaves this folder off sys.path."""

    NAMES = (
        "bank_cases", "compile_cases", "kernel_checks", "launch_ranks", "peft_cases",
        "replay_driver", "tune_cases",
    )  # fmt: skip

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name not in self.NAMES:
            return None
        return importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))


sys.meta_path.append(HelperFinder())


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


@pytest.fixture(scope="session")
def interpreter_problem() -> str:
    """Why Triton's interpreter runs no kernel here, or an empty string."""
    numpy = tuple(int(part) for part in importlib.metadata.version("numpy").split(".")[:2])
    return "" if numpy < (2, 4) else "Triton's interpreter fails with numpy 2.4"


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Run code in a new process, without a GPU or Triton's interpreter; give what it prints."""

    def run(code: str, **variables: str) -> str:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        root = str(Path(__file__).resolve().parent.parent)
        env |= {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", **variables}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture(autouse=True)
def fresh_plans() -> None:
    """No plan or decision of another test, which may have replaced what it was made from."""
    launch = sys.modules.get("fastlora.kernels.launch")
    if launch is not None:
        launch.clear_plans()
    tuned = sys.modules.get("fastlora.kernels.tuned")
    if tuned is not None:
        tuned.table.cache_clear()
    functional = sys.modules.get("fastlora.functional")
    if functional is not None:
        functional._known_fused.clear()


@pytest.fixture
def fresh_compiler() -> None:
    """No graph of another test, and counters of this one alone."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(params=["fused", "eager"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test once on the kernels and once on the eager twins."""
    from fastlora import dispatch

    with dispatch.force("eager") if request.param == "eager" else contextlib.nullcontext():
        yield request.param


@pytest.fixture(params=["tma", "pointer"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A variant of the products: TMA where the tensors allow it, or pointers for all."""
    pytest.importorskip("triton")
    if request.param == "pointer":
        for name in ("lora_forward", "lora_forward_sliced", "lora_grad_x"):
            module = importlib.import_module(f"fastlora.kernels.{name}")
            monkeypatch.setattr(module, "has_tma", lambda major: False)
    elif HAS_CUDA and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the TMA variants run on sm_90")
    return str(request.param)


@pytest.fixture(autouse=True)
def give_back_memory() -> Iterator[None]:
    """What a large test leaves in torch's pool goes back: other workers share the GPU."""
    yield
    if HAS_CUDA and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


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


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `F.dropout`, which PEFT calls, draw the masks that fastlora draws from the same generator."""
    from fastlora import reference
    from fastlora.kernels.config import keep_scale

    def dropout(
        x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or p == 0:
            return x
        rows, K = x.numel() // x.shape[-1], x.shape[-1]
        keep = reference.dropout_keep_mask(reference.draw_seed(x.device), rows, K, p, x.device)
        return torch.where(keep.view(x.shape), x * keep_scale(p), 0)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)


@pytest.fixture(scope="session")
def replay_module() -> Any:
    """`replay.cpp`, compiled: on a GPU the one that is in use."""
    from fastlora.kernels import native

    if not native.compiler() or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("needs a C++ compiler and Python's headers")
    if HAS_CUDA:
        assert native.wait() == ""
        return native.module
    return native.load(native.compiled())


@pytest.fixture
def driver(replay_module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`replay.cpp` in use, and the driver that runs its kernels in the interpreter; ``None`` on a GPU."""
    from replay_driver import replaying

    with replaying(replay_module, monkeypatch) as found:
        yield found
