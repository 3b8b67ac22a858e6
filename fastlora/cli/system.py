"""What a result must be read beside: the machine, and the versions of what ran on it."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import shutil
import subprocess
import sys

import torch
from rich.console import Console

import fastlora

LIBRARIES = ("torch", "triton", "peft", "transformers", "numpy")


def library_version(name: str) -> str:
    """The installed version of a distribution, or ``"not installed"``."""
    try:
        # torch's own word names its build too, as in 2.13.0+cpu; its metadata may not.
        return torch.__version__ if name == "torch" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.lru_cache(maxsize=1)
def driver_version() -> str:
    """The NVIDIA driver's version as ``nvidia-smi`` gives it, or ``"unknown"``."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = answer.stdout.split()
    return lines[0] if lines else "unknown"


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
    else:
        facts["GPU"] = "none that CUDA can use"
        facts["CPU"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    facts["Python"] = platform.python_version()
    facts["fastlora"] = fastlora.__version__
    facts.update({name: library_version(name) for name in LIBRARIES})
    return facts


def make_console() -> Console:
    """A console as wide as the terminal, or wide enough for the tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else 150, highlight=False)


def pick_device(name: str) -> torch.device:
    """The device for ``--device``: ``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        SystemExit: CUDA is asked for and not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {name}: torch {torch.__version__} sees no CUDA GPU")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
