"""`replay.cpp` under test; without a GPU, by a driver that runs the kernels in Triton's interpreter."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import replay
from fastlora.kernels import launch as launching
from fastlora.kernels import native
from fastlora.kernels.direct import Packed

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)
_CAPTURING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
_INVALID_CONTEXT = 201


class _Prepared:
    """Stands for a `DirectLaunch`: every argument is a parameter of eight bytes."""

    def __init__(self, number: int, args: tuple[Any, ...]) -> None:
        self.number, self.args = number, args

    def packed(self) -> Packed:
        kinds = [(i, _kind(a)) for i, a in enumerate(self.args) if a is not None]
        return Packed(
            self.number, (1, 1, 1), 32, 0, False, bytes(8 * len(self.args)),
            [8 * i for i in range(len(self.args))], [(i, 8 * i, kind) for i, kind in kinds], [],
        )  # fmt: skip


def _kind(a: Any) -> str:
    return "Q" if isinstance(a, Tensor) else "f" if isinstance(a, float) else "q"


def _tensor_at(pointer: int, like: Tensor) -> Tensor:
    extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    buffer = (ctypes.c_char * (extent * like.element_size())).from_address(pointer)
    return torch.frombuffer(buffer, dtype=like.dtype).as_strided(like.shape, like.stride())


class InterpretedDriver:
    """What `replay.cpp` calls, and `Launch.prepared` for what it launches.

    As the real one's, its functions want a context in every thread.
    """

    def __init__(self) -> None:
        self.launches = 0
        self.is_capturing = False
        self.error = 0
        self._contexts = threading.local()
        self._known: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._functions = (
            _LAUNCH(self._launch), _CAPTURING(self._capturing), _CONTEXT(self._context)
        )  # fmt: skip

    def configure(self, module: Any) -> None:
        """Let the module call this; there are no tensor maps to encode."""
        launch, *others = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in self._functions)
        module.configure(launch, 0, *others, self._make_context, "cpu")

    def prepared(self, launch: launching.Launch, args: tuple[Any, ...]) -> _Prepared:
        """In place of `Launch.prepared`."""
        looks = [(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else type(a) for a in args]
        number = self._numbers.setdefault((id(launch), *looks), len(self._numbers) + 1)
        self._known[number] = launch, args
        return _Prepared(number, args)

    def _launch(self, config: int, function: int, parameters: Any, extra: int) -> int:
        if self.error or not self._has_context():
            return self.error or _INVALID_CONTEXT
        launch, recorded = self._known[function]
        args: list[Any] = []
        for i, like in enumerate(recorded):
            if like is None:
                args.append(None)
                continue
            raw = ctypes.string_at(parameters[i], 8)
            (value,) = struct.unpack_from(f"<{_kind(like)}", raw)
            args.append(_tensor_at(value, like) if isinstance(like, Tensor) else value)
        self.launches += 1
        with launching._interpreter:
            launch._run_anew(tuple(args))
        return 0

    def _capturing(self, stream: int, status: Any) -> int:
        status[0] = int(self.is_capturing)
        return 0 if self._has_context() else _INVALID_CONTEXT

    def _context(self, context: Any) -> int:
        context[0] = int(self._has_context())
        return 0

    def _has_context(self) -> bool:
        return hasattr(self._contexts, "made")

    def _make_context(self) -> None:
        self._contexts.made = True


@contextlib.contextmanager
def replaying(module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[InterpretedDriver | None]:
    """The compiled module in use, with no program in it; on a GPU there is no driver to give."""
    found = None
    if not torch.cuda.is_available():
        found = InterpretedDriver()
        found.configure(module)
        monkeypatch.setattr(native, "module", module)
        monkeypatch.setattr(
            launching.Launch, "prepared", lambda self, args: found.prepared(self, args)
        )
        monkeypatch.setattr(replay, "current_device", lambda: -1)
        monkeypatch.setattr(replay, "current_stream", lambda index: 0)
    module.clear()
    replay.refusals.clear()
    yield found
    module.clear()


@contextlib.contextmanager
def by_python() -> Iterator[None]:
    """Calls of the block are Python's."""
    module, native.module = native.module, None
    try:
        yield
    finally:
        native.module = module


def is_replayed(y: Tensor) -> bool:
    node: Any = y.grad_fn
    while type(node).__name__ in ("ViewBackward0", "UnsafeViewBackward0"):
        node = node.next_functions[0][0]
    return type(node).__name__ == "CppFunction"


def assert_identical(found: list[Tensor], expected: list[Tensor]) -> None:
    for t, e in zip(found, expected, strict=True):
        assert t.dtype == e.dtype and t.shape == e.shape
        assert torch.equal(t, e)
