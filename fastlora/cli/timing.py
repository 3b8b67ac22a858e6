"""Timing: callables taken in turn, each sample a few calls as an eager program makes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[int], object]
"""A warmed callable; its argument says which set of inputs to use."""


@dataclass
class Samples:
    """In ms a call: between CUDA events, on the wall with a sync, and on the host to enqueue."""

    device_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def spread(samples: list[float]) -> Spread:
    """Median, p20 and p80, each by linear interpolation."""
    values = torch.tensor(samples, dtype=torch.float64)
    quantiles = torch.quantile(values, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return Spread(*(float(q) for q in quantiles))


def time_interleaved(calls: Mapping[str, Call], *, repeats: int, inner: int) -> dict[str, Samples]:
    """Time every callable ``repeats`` times, one sample of each in turn, on the current device.

    The device is idle when a sample starts, and the host launches all of its ``inner`` calls
    without a sync between them: host time counts wherever it is not hidden behind the device. Every
    call gets the next set of inputs. Rounds start at another callable each.

    Args:
        calls (Mapping[str, Call]): name to callable.
        repeats (int): samples of each.
        inner (int): calls a sample.

    Returns:
        dict[str, Samples]: name to samples.
    """
    names = list(calls)
    samples = {name: Samples() for name in names}
    for call in calls.values():
        for i in range(3):
            call(i)
    torch.cuda.synchronize()
    event: Any = torch.cuda.Event  # its constructor has no annotations in some versions of torch
    start, end = event(enable_timing=True), event(enable_timing=True)
    turn = 0
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            call = calls[name]
            torch.cuda.synchronize()
            began = time.perf_counter()
            start.record()
            for i in range(inner):
                call(turn + i)
            end.record()
            enqueued = time.perf_counter()
            torch.cuda.synchronize()
            ended = time.perf_counter()
            turn += inner
            sample = samples[name]
            sample.device_ms.append(start.elapsed_time(end) / inner)
            sample.wall_ms.append((ended - began) * 1e3 / inner)
            sample.host_ms.append((enqueued - began) * 1e3 / inner)
    return samples


def peak_bytes(call: Call) -> int:
    """Peak memory that one call allocates on the current CUDA device, beyond what was there."""
    call(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
