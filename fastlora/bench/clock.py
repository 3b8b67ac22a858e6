"""The timing core: callables taken in turns, eagerly with host time or inside a CUDA graph.

Everything that touches the device goes through a `Clock`, so that the rest of the suite, and its tests, do
not care what the device is.
"""

from __future__ import annotations

import gc
import math
import random
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastlora.bench.stats import spread
from fastlora.kernels import native

Call = Callable[[int], object]
"""What is timed; its argument says which set of inputs to use."""

EAGER, GRAPH = "eager", "graph"

WARM_UP = 3
LEAD_IN = 2
"""Untimed calls at the start of an eager sample. On an idle GPU the first backward of a process that has
waited costs the host 0.7 ms more than those that follow, which a program that goes on never sees."""
EAGER_SAMPLE_MS, GRAPH_SAMPLE_MS = 16.0, 4.0
"""A sample holds as many calls as fill about this time: an event resolves half a microsecond."""
MAX_EAGER_CALLS, MAX_GRAPH_CALLS = 50, 128

# The GPU spins this many cycles before a replay is timed, while the host launches the graph: some 0.3 ms.
_HEAD_START_CYCLES = 500_000


class CaptureError(RuntimeError):
    """A callable could not be captured in a CUDA graph; what the process does next is unsafe."""


@dataclass
class Samples:
    """In ms a call: between events, on the wall from idle to idle, and on the host until all is enqueued.

    A replay of a graph has no host time of its own: its last two lists stay empty.
    """

    device_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    calls: int = 1
    """Calls a sample."""


@dataclass(frozen=True)
class Captured:
    """A graph of ``calls`` calls, and what the one on the first set of inputs returned."""

    replay: Callable[[], object]
    calls: int
    output: object = None


class Clock(ABC):
    """A device that can be timed."""

    device: torch.device

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device is idle."""

    @abstractmethod
    def eager_sample(self, call: Call, first: int, calls: int) -> tuple[float, float, float]:
        """Device, wall and host ms a call, of ``calls`` calls from set ``first`` on."""

    @abstractmethod
    def capture(self, call: Call, calls: int) -> Captured:
        """Capture ``calls`` calls in a graph and replay it once.

        Raises:
            CaptureError: the calls do what a graph cannot hold, such as a sync.
        """

    @abstractmethod
    def graph_sample(self, captured: Captured) -> float:
        """Device ms a call, of one replay."""

    @abstractmethod
    def peak_bytes(self, call: Call) -> int:
        """What one call allocates at its peak, beyond what was there before; 0 where nobody counts."""

    @abstractmethod
    def healthy(self) -> bool:
        """Whether the device still works: an illegal access ends a CUDA context for good."""

    def forget(self) -> None:
        """Give unused memory back."""
        gc.collect()


class CudaClock(Clock):
    """CUDA events on the current stream of one GPU."""

    def __init__(self, device: torch.device) -> None:
        """Make ``device`` the current one; eager calls are as they are once `replay.cpp` is compiled."""
        native.wait()
        self.device = device
        torch.cuda.set_device(device)
        event: Any = torch.cuda.Event  # its constructor has no annotations in some versions
        self._start, self._end = event(enable_timing=True), event(enable_timing=True)

    def synchronize(self) -> None:
        """Wait for every stream of the GPU."""
        torch.cuda.synchronize(self.device)

    def eager_sample(self, call: Call, first: int, calls: int) -> tuple[float, float, float]:
        """In the middle of a program: host time counts wherever it is not hidden behind the GPU."""
        lead_in = LEAD_IN if calls > 1 else 0  # a single call is long: its start is its own
        self.synchronize()
        idle = time.perf_counter()
        for i in range(first, first + lead_in):
            call(i)
        began = time.perf_counter()
        self._start.record()
        for i in range(first + lead_in, first + lead_in + calls):
            call(i)
        self._end.record()
        enqueued = time.perf_counter()
        self.synchronize()
        ended = time.perf_counter()
        return (
            self._start.elapsed_time(self._end) / calls,
            (ended - idle) * 1e3 / (lead_in + calls),
            (enqueued - began) * 1e3 / calls,
        )

    def capture(self, call: Call, calls: int) -> Captured:
        """After all of its calls on a side stream, as each set may load or cache something of its own.

        The inputs of set 0 come last.
        """
        gc.collect()  # a dead cycle that holds an autograd graph would tie the capture to its stream
        current = torch.cuda.current_stream()
        stream: Any = torch.cuda.Stream  # without annotations in some versions
        side = stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for i in range(calls):
                call(i)
        current.wait_stream(side)
        self.synchronize()
        graph: Any = torch.cuda.CUDAGraph()
        output: object = None
        reason = ""
        try:
            with torch.cuda.graph(graph):
                try:
                    for i in reversed(range(calls)):
                        output = None  # its memory serves the next call
                        output = call(i)
                except Exception as error:
                    # To end the capture will fail too, with an error that only says that one came before.
                    reason = f"{first_line(error)}, in {place(error)}"
                    raise
        except Exception as error:
            # torch.cuda.graph does not restore the stream when its capture fails.
            torch.cuda.set_stream(current)
            raise CaptureError(f"no CUDA graph: {reason or first_line(error)}") from error
        graph.replay()
        self.synchronize()
        return Captured(graph.replay, calls, output)

    def graph_sample(self, captured: Captured) -> float:
        """The host launches the graph while the GPU spins, so that only GPU time is between the events.

        A replay before it leaves L2 as the calls themselves leave it, whoever's turn it was before.
        """
        self.synchronize()
        captured.replay()
        torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        self._start.record()
        captured.replay()
        self._end.record()
        self.synchronize()
        return float(self._start.elapsed_time(self._end)) / captured.calls

    def peak_bytes(self, call: Call) -> int:
        """Of torch's allocator, on the second of two calls."""
        call(0)
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call(0)
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def healthy(self) -> bool:
        """Try a small allocation, a kernel, and a sync."""
        try:
            self.synchronize()
            return bool(torch.ones(8, device=self.device).sum().item() == 8)
        except Exception:
            return False

    def forget(self) -> None:
        """Collect garbage and empty torch's cache."""
        super().forget()
        with suppress(RuntimeError):  # a lost context cannot even do this
            torch.cuda.empty_cache()


class HostClock(Clock):
    """The CPU with the host's own clock: for tests, and to see that a provider runs at all."""

    def __init__(self) -> None:
        """Time the CPU."""
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """A CPU is never behind."""

    def eager_sample(self, call: Call, first: int, calls: int) -> tuple[float, float, float]:
        """Device, wall and host time are the same here."""
        began = time.perf_counter()
        for i in range(first, first + calls):
            call(i)
        ms = (time.perf_counter() - began) * 1e3 / calls
        return ms, ms, ms

    def capture(self, call: Call, calls: int) -> Captured:
        """No graph: the calls themselves."""
        output = call(0)
        return Captured(lambda: [call(i) for i in range(calls)], calls, output)

    def graph_sample(self, captured: Captured) -> float:
        """As an eager sample."""
        return self.eager_sample(lambda _: captured.replay(), 0, 1)[0] / captured.calls

    def peak_bytes(self, call: Call) -> int:
        """Not counted."""
        return 0

    def healthy(self) -> bool:
        """Always."""
        return True

    def forget(self) -> None:
        """Nothing to give back."""


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]


def place(error: BaseException) -> str:
    """The file, line and function that raised an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


def calls_for(ms: float, most: int, multiple: int = 1, sample_ms: float = GRAPH_SAMPLE_MS) -> int:
    """How many calls of ``ms`` make a sample: a multiple of ``multiple``, at most about ``most``."""
    wanted = math.ceil(sample_ms / ms) if ms > 0 else most
    groups = max(1, min(math.ceil(wanted / multiple), most // multiple))
    return groups * multiple


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def estimate_ms(clock: Clock, call: Call) -> float:
    """Time of a call after a warm-up, which compiles what is still to be compiled."""
    for i in range(WARM_UP):
        call(i)
    return clock.eager_sample(call, 0, 2)[0]


def in_turns(names: list[str], repeats: int) -> Iterator[str]:
    """Every name once a round, in an order drawn for the round.

    What comes before a sample decides how hot the GPU is: the same kernels took 10 % longer behind the frozen
    products than behind PEFT.
    """
    rng = random.Random(0)
    for _ in range(repeats):
        yield from rng.sample(names, len(names))


def time_eager(
    clock: Clock, calls: Mapping[str, Call], counts: Mapping[str, int], repeats: int
) -> dict[str, Samples]:
    """Time warm callables ``repeats`` times, a sample of each in turn, as an eager program calls them.

    The host launches all calls of a sample without a sync between them. Every call gets the next set of
    inputs.

    Args:
        clock (Clock): the device.
        calls (Mapping[str, Call]): name to callable.
        counts (Mapping[str, int]): name to calls a sample.
        repeats (int): samples of each.

    Returns:
        dict[str, Samples]: samples of one turn have the same index in every list.
    """
    samples = {name: Samples(calls=counts[name]) for name in calls}
    turn = 0
    with _no_garbage_collection():
        for name in in_turns(list(calls), repeats):
            mine = samples[name]
            device, wall, host = clock.eager_sample(calls[name], turn, mine.calls)
            turn += mine.calls
            mine.device_ms.append(device)
            mine.wall_ms.append(wall)
            mine.host_ms.append(host)
    return samples


def time_graphs(clock: Clock, captured: Mapping[str, Captured], repeats: int) -> dict[str, Samples]:
    """Time replays of every graph ``repeats`` times, one of each in turn.

    Args:
        clock (Clock): the device.
        captured (Mapping[str, Captured]): name to graph.
        repeats (int): samples of each.

    Returns:
        dict[str, Samples]: with device time only.
    """
    samples = {name: Samples(calls=graph.calls) for name, graph in captured.items()}
    for graph in captured.values():
        clock.graph_sample(graph)
    with _no_garbage_collection():
        for name in in_turns(list(captured), repeats):
            samples[name].device_ms.append(clock.graph_sample(captured[name]))
    return samples


def timing_lines(
    samples: Mapping[str, Samples], graphs: Mapping[str, Samples], floor: str
) -> list[str]:
    """A line for each callable, with its ratios to the one that is called ``floor``.

    Args:
        samples (Mapping[str, Samples]): of `time_eager`.
        graphs (Mapping[str, Samples]): of `time_graphs` on the same callables, or nothing.
        floor (str): a name of both.

    Returns:
        list[str]: time as an eager program sees it, on the host, and of the GPU alone where there are graphs.
    """
    lines = []
    least = spread(samples[floor].device_ms).median
    for name, sample in samples.items():
        eager, host = spread(sample.device_ms), spread(sample.host_ms)
        line = (
            f"{name:10} {eager.median:8.3f} ms [{eager.p20:.3f}, {eager.p80:.3f}]"
            f"  x {eager.median / least:.3f}  host {host.median:.3f} ms"
        )
        if graphs:
            alone = spread(graphs[name].device_ms).median
            ratio = alone / spread(graphs[floor].device_ms).median
            line += f"  graph {alone:.3f} ms  x {ratio:.3f}"
        lines.append(line)
    return lines
