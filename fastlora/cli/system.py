"""What a result must be read beside: the machine, and the versions of what ran on it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import fastlora
from fastlora.kernels import native

LIBRARIES = ("torch", "triton", "peft", "transformers", "loralib", "numpy")


def library_version(name: str) -> str:
    """The installed version of a distribution, or ``"not installed"``."""
    try:
        # torch's own word names its build too, as in 2.13.0+cpu; its metadata may not.
        return torch.__version__ if name == "torch" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def query_gpu(fields: Sequence[str], device: torch.device | None = None) -> dict[str, str]:
    """What ``nvidia-smi`` says of one GPU, or nothing where it is not there or does not answer.

    Args:
        fields (Sequence[str]): of its ``--query-gpu``.
        device (torch.device | None): the GPU. Default: ``None``, the first one.

    Returns:
        dict[str, str]: field to value.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if device is not None:
        # By its name everywhere: CUDA and nvidia-smi may number the GPUs differently.
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        query += [f"--id=GPU-{uuid}"] if uuid is not None else []
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = answer.stdout.strip().splitlines()
    values = lines[0].split(", ") if lines else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


@functools.lru_cache(maxsize=1)
def driver_version() -> str:
    """The NVIDIA driver's version as ``nvidia-smi`` gives it, or ``"unknown"``."""
    return query_gpu(("driver_version",)).get("driver_version", "unknown")


CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")


def read_clocks(device: torch.device) -> dict[str, str]:
    """Clocks, temperature, power, and the reasons for which the GPU holds its clock back, as they are now.

    Nothing for a CPU, whatever GPU is beside it.
    """
    if device.type != "cuda":
        return {}
    return query_gpu(CLOCKS, device) or query_gpu(CLOCKS[:-1], device)


def source_state() -> dict[str, str]:
    """The git commit of the checkout, and a hash of the sources, which are there without git as well."""
    package = Path(fastlora.__file__).resolve().parent
    digest = hashlib.sha256()
    kernels = Path(native.__file__).resolve().parent  # beside the package in a checkout
    for folder, kinds in ((package, "py"), (kernels, "py cpp h")):
        for path in sorted(p for kind in kinds.split() for p in folder.rglob(f"*.{kind}")):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    state = {"git commit": "unknown", "sources": digest.hexdigest()[:12]}
    git = ["git", "-C", str(package)]
    try:
        commit, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=20, check=True)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return state
    state["git commit"] = commit.stdout.strip() + (" and changes" if changes.stdout.strip() else "")
    return state


def describe_machine(device: torch.device) -> dict[str, str]:
    """Device, driver and versions, in the order in which they are printed.

    Args:
        device (torch.device): a CUDA device or the CPU.

    Returns:
        dict[str, str]: label to value.
    """
    facts: dict[str, str] = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["GPU"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["SMs"] = str(properties.multi_processor_count)
        facts["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        facts["driver"] = driver_version()
        facts["CUDA of torch"] = str(torch.version.cuda)
        problem = native.wait()
        facts["eager calls"] = f"made by Python: {problem}" if problem else "made by C++"
    else:
        facts["GPU"] = "none that CUDA can use"
        facts["CPU"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    facts["Python"] = platform.python_version()
    facts["fastlora"] = fastlora.__version__
    facts.update({name: library_version(name) for name in LIBRARIES})
    return facts


INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def make_console() -> Console:
    """A console as wide as the terminal, or wide enough for the tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else 150, highlight=False)


def pick_device(name: str) -> torch.device:
    """The device for ``--device``: ``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        SystemExit: there is no such device, or CUDA is asked for and not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SystemExit(f"--device {name}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {name}: torch {torch.__version__} sees no CUDA GPU")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
