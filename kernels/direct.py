"""A compiled kernel launched through the CUDA driver, its parameters packed in place.

Triton's launcher asks the driver about every pointer and encodes every tensor map again at each call: half
of the host time of a small layer. Here what a shape fixes is packed once, tensor maps are kept by address,
and a launch writes its pointers and calls the driver. What is not exactly as expected goes through Triton.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

_INVALID_CONTEXT = 201
_PDL = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_L2_PROMOTION_128B = 2
MAP_BYTES, _MAX_MAPS = 128, 4096
_SCALARS = {"fp32": ("f", 4), "i32": ("i", 4), "i64": ("q", 8)}
_TMA_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, with the one value that is used."""

    _fields_ = (
        ("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )  # fmt: skip


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


@functools.cache
def _driver() -> Any:
    """The CUDA driver, or ``None`` where it is older than what this needs (12.4)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        cuda.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
        cuda.cuFuncGetParamInfo.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            *[ctypes.c_void_p] * 2,
        ]
        cuda.cuTensorMapEncodeTiled.argtypes = [
            ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, *[ctypes.c_void_p] * 5, *[ctypes.c_int] * 4
        ]  # fmt: skip
    except (OSError, AttributeError):
        return None
    return cuda


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: CUDA error {code}: {(text.value or b'?').decode()}")


def make_context() -> None:
    """Give this thread, which has not used the GPU yet, the context that the driver asks for."""
    torch._C._cuda_setDevice(torch._C._cuda_getDevice())


def _parameters(function: int) -> list[tuple[int, int]]:
    """Offset and size of each parameter of a kernel, as the driver knows them."""
    found: list[tuple[int, int]] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while not _driver().cuFuncGetParamInfo(
        function, len(found), ctypes.byref(offset), ctypes.byref(size)
    ):
        found.append((offset.value, size.value))
    return found


def _expected(types: list[str], arguments: int) -> list[tuple[int, str, int]] | None:
    """Position, kind and size of each parameter that a signature has; ``None``: one is unknown.

    Kinds are formats of `struct`, ``map`` for a tensor map, and ``in map`` for the shape and strides
    that follow it.
    """
    expected: list[tuple[int, str, int]] = []
    for position, kind in enumerate(types):
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc") and position < arguments:
            block = re.fullmatch(r"tensordesc<\w+\[(\d+(?:, ?\d+){1,2})\]?.*>", kind)
            if block is None:
                return None
            rank = block[1].count(",") + 1
            expected.append((position, "map", MAP_BYTES))
            expected += [(position, "in map", size) for size in (4,) * rank + (8,) * rank]
        elif kind.startswith("*") and position < arguments:
            expected.append((position, "Q", 8))
        elif kind in _SCALARS:
            expected.append((position, *_SCALARS[kind]))
        else:
            return None
    return expected


class Packed(NamedTuple):
    """What all launches of a kernel share, and where each argument goes: by position and offset."""

    function: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    early: bool
    """Whether it may begin beside the kernel before it."""
    parameters: bytes
    offsets: list[int]
    """Of every parameter."""
    scalars: list[tuple[int, int, str]]
    """Pointers and numbers, with their format of `struct`."""
    maps: list[tuple[int, int, int, tuple[int, ...]]]
    """Tensor maps, with swizzle and block."""


class DirectLaunch:
    """One compiled kernel with a grid and sizes; use `direct_launch` to make it."""

    __slots__ = (
        "_blobs", "_buffer", "_config", "_config_address", "_function", "_held", "_lock", "_maps", "_meta",
        "_numbers", "_offset", "_offsets", "_pack", "_parameters", "_pointers", "_scalars", "_shared",
    )  # fmt: skip

    def __init__(
        self,
        made: Any,
        grid: tuple[int, ...],
        sizes: tuple[int, ...],
        arguments: int,
        expected: list[tuple[int, str, int]],
        layout: list[tuple[int, int]],
    ) -> None:
        """Pack what all launches share."""
        end = sum(layout[-1])
        raw = ctypes.create_string_buffer(end + MAP_BYTES)
        start = -ctypes.addressof(raw) % MAP_BYTES  # a tensor map is aligned
        self._buffer = memoryview(raw).cast("B")[start : start + end]
        base = ctypes.addressof(raw) + start
        pointers = (ctypes.c_void_p * len(layout))(*(base + offset for offset, _ in layout))
        scalars: list[tuple[int, str, int]] = []  # offset, format, position
        self._maps: list[tuple[int, int]] = []  # position, offset
        self._blobs: dict[tuple[int, ...], bytes] = {}
        for (position, kind, _), (offset, _) in zip(expected, layout, strict=False):
            if kind == "map":
                self._maps.append((position, offset))
            elif kind != "in map" and position < arguments:
                scalars.append((offset, kind, position))
            elif kind != "in map":
                struct.pack_into(f"<{kind}", self._buffer, offset, sizes[position - arguments])
        self._shared = bytes(self._buffer)  # before a launch writes its own
        self._scalars, self._offsets = scalars, [offset for offset, _ in layout]
        # One run of bytes, pointers before numbers, which the padding between them may overwrite.
        self._offset, text, at = (scalars[0][0] if scalars else 0), "<", None
        for offset, kind, _ in scalars:
            text += f"{offset - at}x" if at is not None and offset > at else ""
            text, at = text + kind, offset + struct.calcsize(f"<{kind}")
        self._pack = struct.Struct(text).pack_into
        self._pointers = tuple(position for _, kind, position in scalars if kind == "Q")
        self._numbers = tuple(position for _, kind, position in scalars if kind != "Q")
        self._meta = [(m["swizzle"], tuple(m["block_size"])) for m in _descriptors(made)]
        metadata = made.metadata
        attribute = _Attribute(_PDL, 0, 1)
        config = _Config(
            grid, (32 * metadata.num_warps, 1, 1), metadata.shared, None,
            ctypes.addressof(attribute), 1 if metadata.launch_pdl else 0,
        )  # fmt: skip
        self._config, self._config_address = config, ctypes.addressof(config)
        self._function, self._parameters = made.function, ctypes.addressof(pointers)
        self._held = (raw, pointers, attribute, made)  # what the addresses above point into
        self._lock = threading.Lock()

    def packed(self) -> Packed:
        """What a launch is made of, for who makes it elsewhere."""
        config = self._config
        return Packed(
            self._function, tuple(config.grid), config.block[0], config.shared, config.count > 0,
            self._shared, self._offsets, [(p, o, kind) for o, kind, p in self._scalars],
            [(*at, *meta) for at, meta in zip(self._maps, self._meta, strict=True)],
        )  # fmt: skip

    def __call__(self, stream: int, args: tuple[Any, ...]) -> None:
        """Launch.

        Args:
            stream (int): the stream's handle.
            args (tuple): the leading arguments; tensors stand for their descriptors.
        """
        self.launch(stream, args, [args[i].data_ptr() for i in self._pointers])

    def launch_aligned(self, stream: int, args: tuple[Any, ...]) -> bool:
        """Launch if every pointer is a multiple of 16, as the kernel was compiled for; say whether."""
        pointers = [args[i].data_ptr() for i in self._pointers]
        together = 0
        for pointer in pointers:
            together |= pointer
        if together & 15:
            return False
        self.launch(stream, args, pointers)
        return True

    def launch(self, stream: int, args: tuple[Any, ...], pointers: list[int]) -> None:
        """Write what this launch's own parameters are, and call the driver."""
        with self._lock:  # a second thread would overwrite the parameters before they are read
            if (
                self._maps
            ):  # they come first, and the arguments of a kernel that has some are their tensors
                key = tuple([t.data_ptr() for t in args[: len(self._maps)]])
                blob = self._blobs.get(key)
                if blob is None:
                    blob = self._remember_maps(key, args)
                self._buffer[: len(blob)] = blob
            self._pack(self._buffer, self._offset, *pointers, *[args[i] for i in self._numbers])
            self._config.stream = stream
            code = _launch_kernel(self._config_address, self._function, self._parameters, None)
            if code == _INVALID_CONTEXT:
                make_context()
                code = _launch_kernel(self._config_address, self._function, self._parameters, None)
        if code:
            _check(code, "launching a kernel")

    def _remember_maps(self, key: tuple[int, ...], args: tuple[Any, ...]) -> bytes:
        blob = b""
        for index, (position, offset) in enumerate(self._maps):
            blob = blob.ljust(offset, b"\0") + self._encode(args[position], index)
        if len(self._blobs) >= _MAX_MAPS:
            self._blobs.clear()
        self._blobs[key] = blob
        return blob

    def _encode(self, t: Tensor, index: int) -> bytes:
        """The tensor map of a tensor, and the shape and strides that Triton puts behind it."""
        swizzle, block = self._meta[index]
        kind, shape, strides, behind = map_of(t)
        rank = len(shape)
        raw = ctypes.create_string_buffer(2 * MAP_BYTES)
        start = -ctypes.addressof(raw) % MAP_BYTES
        sizes, boxes = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank  # the last dimension first
        code = _driver().cuTensorMapEncodeTiled(
            ctypes.addressof(raw) + start, kind, rank, t.data_ptr(),
            sizes(*shape),
            sizes(*strides),
            boxes(*reversed(block)),
            boxes(*[1] * rank),
            0, swizzle, _L2_PROMOTION_128B, 0,
        )  # fmt: skip
        _check(code, f"a tensor map of {tuple(t.shape)}, strides {t.stride()}, tile {block},")
        tensor_map = raw.raw[start : start + MAP_BYTES]
        return tensor_map + behind


def map_of(t: Tensor) -> tuple[int, list[int], list[int], bytes]:
    """What a tensor map says of t, and what Triton puts behind the map.

    Returns:
        tuple: the driver's name of the dtype; the sizes, and the strides in bytes but for the last, 1, both
        with the last dimension first; and shape and strides as bytes, in their order and aligned.
    """
    shape, strides, rank = t.shape, t.stride()[:-1], t.dim()
    behind = struct.pack(f"<{rank}i{4 * (rank % 2)}x{rank}q", *shape, *strides, 1)
    in_bytes = [t.element_size() * stride for stride in reversed(strides)]
    return _TMA_TYPES[t.dtype], [*reversed(shape)], in_bytes, behind


def _descriptors(made: Any) -> list[dict[str, Any]]:
    return getattr(made.metadata, "tensordesc_meta", None) or []


def _launch_kernel(config: int, function: int, parameters: int, extra: None) -> int:
    code: int = _driver().cuLaunchKernelEx(config, function, parameters, extra)
    return code


def direct_launch(
    made: Any, grid: tuple[int, ...], sizes: tuple[int, ...], arguments: int
) -> DirectLaunch | None:
    """A direct launch of a compiled kernel, or ``None`` where anything about it is not as expected.

    Args:
        made: Triton's compiled kernel.
        grid (tuple[int, ...]): programs in each of three dimensions.
        sizes (tuple[int, ...]): the kernel's integers that every launch shares.
        arguments (int): how many arguments come before them.

    Returns:
        DirectLaunch | None: to be called with a stream and the leading arguments.
    """
    metadata: Any = getattr(made, "metadata", None)
    source: Any = getattr(made, "src", None)
    if metadata is None or not hasattr(source, "signature") or _driver() is None:
        return None
    if (
        getattr(metadata, "num_ctas", 1) != 1
        or getattr(metadata, "launch_cooperative_grid", False)
        or getattr(metadata, "global_scratch_size", 0)
        or getattr(metadata, "profile_scratch_size", 0)
    ):
        return None
    types = list(source.signature.values())
    if not all(isinstance(kind, str) for kind in types):
        return None
    expected = _expected(types, arguments)
    layout = _parameters(made.function)
    if not expected or not 0 <= len(layout) - len(expected) <= 2:
        return None  # behind a kernel's own parameters are at most two of Triton's, both null here
    if any(size != found for (_, _, size), (_, found) in zip(expected, layout, strict=False)):
        return None
    if any(found != 8 for _, found in layout[len(expected) :]):
        return None
    maps = [i for i, (_, kind, _) in enumerate(expected) if "map" in kind]
    tensor_maps = sum(kind == "map" for _, kind, _ in expected)
    leading = [i for i, (p, kind, _) in enumerate(expected) if p < arguments and "map" not in kind]
    if len(_descriptors(made)) != tensor_maps or (maps and leading and maps[-1] > leading[0]):
        return None
    if [p for p, kind, _ in expected if kind == "map"] != list(range(tensor_maps)):
        return None
    kinds = "".join(expected[i][1] for i in leading)
    if kinds.rstrip("fiq").strip("Q"):  # a number before a pointer
        return None
    for i in maps:  # shape and strides lie behind the map without a gap
        rank = sum(at == expected[i][0] for at, *_ in expected) // 2
        offsets = [o - layout[i][0] for o, _ in layout[i : i + 1 + 2 * rank]]
        first = MAP_BYTES + 4 * (rank + rank % 2)  # of the strides
        if expected[i][1] == "map" and offsets != [
            0, *range(MAP_BYTES, first - 4 * (rank % 2), 4), *range(first, first + 8 * rank, 8)
        ]:  # fmt: skip
            return None
    return DirectLaunch(made, grid, sizes, arguments, expected, layout)
