"""A driver for `replay.cpp` without a GPU: it runs the kernels in Triton's interpreter."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels import launch as launching
from fastlora.kernels.direct import Packed

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)
_CAPTURING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))


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
    """The three functions that `replay.cpp` calls, and `Launch.prepared` for what they launch."""

    def __init__(self) -> None:
        self.launches = 0
        self.is_capturing = False
        self.error = 0
        self._known: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._functions = (_LAUNCH(self._launch), _CAPTURING(self._capturing))

    def functions(self) -> tuple[int, int, int]:
        """Their addresses; there are no tensor maps to encode."""
        launch, capturing = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in self._functions)
        return launch, 0, capturing

    def prepared(self, launch: launching.Launch, args: tuple[Any, ...]) -> _Prepared:
        """In place of `Launch.prepared`."""
        looks = [(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else type(a) for a in args]
        number = self._numbers.setdefault((id(launch), *looks), len(self._numbers) + 1)
        self._known[number] = launch, args
        return _Prepared(number, args)

    def _launch(self, config: int, function: int, parameters: Any, extra: int) -> int:
        if self.error:
            return self.error
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
        return 0
