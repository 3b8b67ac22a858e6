"""`replay.cpp`, compiled where it runs: once a machine, while Python does its work.

It needs what Triton needs, a C++ compiler and Python's headers. Without them everything runs as before, and
`problem` says why; FASTLORA_REPLAY=0 asks for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .cache import cache_folder
from .direct import make_context

try:
    import fcntl
except ImportError:  # Windows, where Triton is not at home either
    fcntl = None  # type: ignore[assignment]

VARIABLE = "FASTLORA_REPLAY"
_NAME = "fastlora_replay"
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("replay.cpp", "tape.h"))

module: Any = None
"""The compiled module once it is there, configured for this GPU's driver."""
problem = "no fused call has run on a GPU yet"
"""Why there is none, or not yet."""
_thread: threading.Thread | None = None
_started = threading.Lock()


def start() -> None:
    """Load the module, or compile it in a thread of its own; a second call does nothing."""
    global _thread, problem
    with _started:
        if _thread is not None:
            return
        if os.environ.get(VARIABLE) == "0":
            problem = f"{VARIABLE} is 0"
            _thread = threading.Thread()
            return
        problem = "it is being compiled"
        _thread = threading.Thread(target=_make, name="fastlora-replay", daemon=True)
        _thread.start()


def wait() -> str:
    """Start, and wait until the module is there or cannot be; return the problem, "" for none."""
    start()
    if _thread is not None and _thread.ident is not None:
        _thread.join()
    return problem


def _make() -> None:
    global module, problem
    try:
        try:
            made = load(compiled())
        except ImportError:  # cut short, or made where libraries are newer
            compiled().unlink(missing_ok=True)
            made = load(compiled())
        made.configure(*_driver_functions(), make_context, "cuda")
    except Exception as error:  # whatever it is, it is the problem
        problem = str(error) or repr(error)
    else:
        module, problem = made, ""


def _driver_functions() -> tuple[int, ...]:
    cuda = ctypes.CDLL("libcuda.so.1")
    names = (
        "cuLaunchKernelEx", "cuTensorMapEncodeTiled", "cuStreamIsCapturing", "cuCtxGetCurrent"
    )  # fmt: skip
    return tuple(ctypes.cast(getattr(cuda, name), ctypes.c_void_p).value or 0 for name in names)


def load(path: Path) -> Any:
    """The module in a file that `compiled` gave."""
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} cannot be loaded")
    made = importlib.util.module_from_spec(spec)
    loader.exec_module(made)
    return made


def compiled() -> Path:
    """The compiled module for this Python, this torch and these sources; compiled if it is not there yet.

    Raises:
        RuntimeError: there is no compiler, or it fails: with what it said.
        OSError: the cache's folder cannot be written.
    """
    command = _command()
    sources = (path.read_text(encoding="utf-8") for path in _SOURCES)
    text = "\0".join((torch.__version__, sys.version, *command, *sources))
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_folder() / f"{_NAME}-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(path.with_suffix(".lock")):
            if not path.exists():
                _compile(command, path)
    return path


def _compile(command: list[str], path: Path) -> None:
    """Run the compiler; the file appears whole, also if this process ends before the compiler does."""
    script = 'to=$0 tmp=$0.$$; "$@" -o "$tmp" && mv -f "$tmp" "$to" || { rm -f "$tmp"; exit 1; }'
    done = subprocess.run(
        ["sh", "-c", script, str(path), *command],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")


@contextlib.contextmanager
def _one_process_at_a_time(path: Path) -> Iterator[None]:
    """Let the processes of a job wait for the first of them, where files can be locked."""
    with open(path, "w", encoding="utf-8") as file:
        with contextlib.suppress(OSError, AttributeError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, which may have arguments, or what is on the path."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def _command() -> list[str]:
    found = compiler()
    if not found:
        raise RuntimeError("there is no C++ compiler: neither CXX, nor c++ or g++")
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    return [
        *shlex.split(found), "-std=c++20", "-O2", "-shared", "-fPIC", "-w",
        f"-DTORCH_EXTENSION_NAME={_NAME}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-I{include}", f"-I{include / 'torch/csrc/api/include'}",
        f"-I{sysconfig.get_path('include')}", str(_SOURCES[0]),
        f"-L{torch_folder / 'lib'}", "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip


def clear() -> None:
    """Forget every program, for when the plans they were recorded from are replaced."""
    if module is not None:
        module.clear()
