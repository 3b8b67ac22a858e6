"""Numbers on a device, made once: for calls, and for the CUDA graphs that go on reading them."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_MOST = 1024
_kept: dict[Hashable, Tensor] = {}
_read_by_graphs: dict[Hashable, Tensor] = {}
"""What a CUDA graph has been captured with: it reads that memory at every replay, so it is never dropped."""


def constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers ``[len(values)]``: copied to the device once, not at every step. Not to be written to."""
    return _once(
        (values, dtype, device), device, lambda: torch.tensor(values, dtype=dtype, device=device)
    )


def filled(value: float, size: int, device: torch.device) -> Tensor:
    """One number ``size`` times, in fp32. Not to be written to."""
    return _once(
        (value, size, device), device,
        lambda: torch.full((size,), value, dtype=torch.float32, device=device),
    )  # fmt: skip


def _once(key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` gave for the key before.

    What is made during a capture belongs to that graph, which fills it at each replay: nobody else may
    have it.
    """
    if torch.compiler.is_compiling():
        return make()
    found = _read_by_graphs.get(key)
    if found is not None:
        return found
    found, capturing = _kept.get(key), _is_capturing(device)
    if found is None:
        with torch.inference_mode(False):  # an inference tensor could not be saved for a backward
            found = make()
        if capturing:
            return found
        if len(_kept) >= _MOST:
            _kept.clear()
        _kept[key] = found
    if capturing:
        _read_by_graphs[key] = found
    return found


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
