"""Launching: a shape's plan is made once, a kernel is compiled once for what it is specialised on.

`kernel[grid](...)` analyses every argument at every call, which costs more host time than a small layer
has GPU time. Here an op keeps a `Launch` for each shape, in a cached function of shapes, strides and
dtypes, and a call of it goes straight to the compiled kernel (`fastlora.kernels.direct`).
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from . import native
from .direct import DirectLaunch, direct_launch

F = TypeVar("F", bound=Callable[..., Any])

_MAX_PLANS = 4096  # of an op: training on many lengths makes one for each
_plans: list[Any] = []
_compiled: dict[tuple[Any, ...], Any] = {}
_interpreter = threading.Lock()  # it keeps the program index, and patches triton.language, globally
_MAX_COMPILED = 4096
_runtime = knobs.runtime
_tickets = itertools.count(random.SystemRandom().randrange(1 << 40, 1 << 61, 2), 2)


class _Recording(threading.local):
    """Who takes down this thread's launches instead of making them: a `fastlora.kernels.tape.Recorder`."""

    tape: Any = None


recording = _Recording()


def new_ticket() -> int:
    """A number that marks something as made: used once, so that memory need not be cleared before.

    Even here, odd in `replay.cpp`.
    """
    return next(_tickets) if recording.tape is None else int(recording.tape.ticket())


def current_device() -> int:
    """The index of the current GPU."""
    return torch._C._cuda_getDevice()


def current_stream(index: int) -> int:
    """The handle of a GPU's current stream."""
    return torch._C._cuda_getCurrentRawStream(index)


def descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    """`TensorDescriptor.from_tensor` without its checks, which `fits_tma` and the configs stand for.

    Fields with a default (padding, and what newer Tritons add) are left to the class.
    """
    d = TensorDescriptor.__new__(TensorDescriptor)
    d.base, d.shape, d.strides, d.block_shape = t, t.shape, t.stride(), block
    return d


def cached_plan(make: F) -> F:
    """Keep what a function of shapes, strides and dtypes makes: a configuration, a `Launch`."""
    cached = functools.lru_cache(_MAX_PLANS)(make)
    _plans.append(cached)
    return cached  # type: ignore[return-value]


def clear_plans() -> None:
    """Forget the plans, for when something that they were made from is replaced, as tests do."""
    for cached in _plans:
        cached.cache_clear()
    native.clear()


def _compile_and_run(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Triton's own launch; where it stumbles over its cache on disk, the error says what to do."""
    try:
        return kernel[grid](*args, **options)
    except (OSError, json.JSONDecodeError) as error:
        raise RuntimeError(
            f"Triton failed to read or write a file while it compiled {kernel.__name__}, most likely in "
            f"its cache, {knobs.cache.dir}: {error}. Empty that folder, or let TRITON_CACHE_DIR name "
            "one that can be written"
        ) from error


def profiled() -> bool:
    """Whether a profiler wants to see launches: its hook is a function in Triton 3.4, then a chain."""
    hook = _runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def _specialised(size: int) -> tuple[bool, bool, bool, bool]:
    """What Triton compiles an integer for: being 1, a multiple of 16, and its width."""
    return size == 1, size % 16 == 0, -(2**31) <= size < 2**31, size < 2**63


class Launch:
    """A kernel with its grid, sizes and options; called with its leading arguments, it is launched.

    Args:
        kernel: a `triton.jit` function, its parameters in this order: tensors and other run-time arguments,
            sizes, constexpr.
        grid (tuple[int, ...]): programs in each dimension, one or two of them or three.
        device (torch.device): where the tensors are.
        *sizes: the kernel's integers.
        fixed (bool): the plan's key fixes which arguments are ``None`` and the types of all others, so that
            a call need not look. Default: ``False``.
        boxes (tuple[tuple[int, ...], ...]): the blocks of the first arguments, where these are descriptors
            to the kernel: their tensors must fit TMA, and the plan's key fixes shapes and strides. Default:
            ``()``.
        constants (tuple[Tensor, ...]): leading arguments that are the same at every call. Default: ``()``.
        **options: its constexpr parameters, and launch options.
    """

    __slots__ = (
        "_boxes", "_device", "_fixed", "_found", "_grid", "_kernel", "_options", "_ready", "_sizes",
        "constants",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        *sizes: int,
        fixed: bool = False,
        boxes: tuple[tuple[int, ...], ...] = (),
        constants: tuple[Tensor, ...] = (),
        **options: Any,
    ) -> None:
        """Prepare what calls have in common."""
        self.constants = constants
        self._kernel, self._device, self._sizes, self._options = kernel, device, sizes, options
        self._grid, self._boxes, self._fixed = (*grid, 1, 1)[:3], boxes, fixed
        self._ready: DirectLaunch | None = None
        self._found: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, *args: Any) -> None:
        """Launch on the current stream of the device: ``kernel[grid](*args, *sizes, **options)``."""
        if recording.tape is not None:
            recording.tape.launch(self, args)
            return
        device = self._device
        if device.type != "cuda":
            with _interpreter:
                self._run_anew(args)
            return
        if device.index != current_device():
            with torch.cuda.device(device):
                self(*args)
            return
        ready = self._ready
        if ready is not None and not profiled():  # noqa: SIM102
            if ready.launch_aligned(current_stream(device.index), args):
                return
        signature = self._signature(args)
        launch = self._found.get(signature)
        if launch is None or profiled():
            self._launch_anew(signature, args)
            return
        launch(current_stream(device.index), args)

    def prepared(self, args: tuple[Any, ...]) -> DirectLaunch | None:
        """The direct launch of arguments like these, all at multiples of 16, once there has been one."""
        found = self._ready or self._found.get(self._signature(args))
        ready = isinstance(found, DirectLaunch) and False not in self._signature(args)
        return found if ready else None  # type: ignore[return-value]

    @staticmethod
    def _signature(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a kernel is compiled for."""
        key: list[Any] = []
        pointers: list[int] = []
        for a in args:
            if a is None:
                key.append(None)
            elif type(a) is float:  # never specialised on
                key.append(float)
            elif type(a) is int:
                key.append(_specialised(a))
            else:
                key.append(a.dtype)
                pointers.append(a.data_ptr())
        alignments = [pointer & 15 == 0 for pointer in pointers]
        if not all(alignments):  # Triton compiles for each of them whether it is aligned
            key += alignments
        return tuple(key)

    def _run_anew(self, args: tuple[Any, ...]) -> Any:
        boxes = self._boxes
        described = [descriptor(t, list(box)) for t, box in zip(args, boxes, strict=False)]
        everything = (*described, *args[len(boxes) :], *self._sizes)
        return _compile_and_run(self._kernel, self._grid, everything, self._options)

    def _launch_anew(self, signature: tuple[Any, ...], args: tuple[Any, ...]) -> None:
        """Launch through Triton, which compiles, unless another shape has compiled the same already."""
        names = getattr(self._kernel, "arg_names", None)
        sizes = tuple(map(_specialised, self._sizes))
        # id(), since a JITFunction computes its hash at every call; being global, it never dies.
        everything = (
            id(self._kernel), self._device.index, signature, sizes, self._boxes, *self._options.items()
        )  # fmt: skip
        if everything in _compiled and not profiled():
            self._remember(signature, _compiled[everything], names, len(args))
            self(*args)
            return
        made = self._run_anew(args)
        if names is not None:
            if len(_compiled) >= _MAX_COMPILED:
                _compiled.clear()
            _compiled[everything] = made
            self._remember(signature, made, names, len(args))

    def _remember(self, signature: tuple[Any, ...], made: Any, names: Any, given: int) -> None:
        direct = direct_launch(made, self._grid, self._sizes, given)
        if direct is not None:
            self._found[signature] = direct
            if self._fixed and False not in signature:  # where everything is aligned
                self._ready = direct
            return
        constants = tuple(self._options[name] for name in names[given + len(self._sizes) :])
        self._found[signature] = functools.partial(self._through_triton, made, constants)

    def _through_triton(
        self,
        made: Any,
        constants: tuple[Any, ...],
        stream: int,
        args: tuple[Any, ...],
    ) -> None:
        """Launch a compiled kernel by Triton's own launcher, without its analysis of the arguments."""
        described = [descriptor(t, list(box)) for t, box in zip(args, self._boxes, strict=False)]
        made.run(
            *self._grid, stream, made.function, made.packed_metadata, None, None, None,
            *described, *args[len(described) :], *self._sizes, *constants,
        )  # fmt: skip
