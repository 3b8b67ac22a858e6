"""What a Function does, taken down while it does it: the launches, and torch's operations between them.

Nothing is computed meanwhile: a launch is only noted, so is a copy or a product of torch. Memory is
allocated, for its addresses say which tensor an argument is. `replay.cpp` does what a tape says.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .direct import MAP_BYTES, map_of
from .launch import Launch, recording

_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default,
    _aten.new_empty.default, _aten.new_empty_strided.default,
}  # fmt: skip
_VIEWS = {
    _aten.alias.default, _aten.as_strided.default, _aten.detach.default, _aten.expand.default,
    _aten.select.int, _aten.slice.Tensor, _aten.split.Tensor, _aten.split_with_sizes.default,
    _aten.t.default, _aten.transpose.int, _aten.unbind.int, _aten.unsqueeze.default, _aten.view.default,
    _aten._unsafe_view.default,
}  # fmt: skip
_PRODUCTS = {_aten.mm.default: "mm", _aten.addmm.default: "linear"}
_COPIES = {_aten._to_copy.default, _aten.clone.default}
_TICKETS = 1 << 62  # above every number that an argument could be


class CannotRecordError(Exception):
    """Why there is no tape."""


class NotCompiledError(CannotRecordError):
    """A kernel has not run yet; the next attempt may find it compiled."""


class Tape(NamedTuple):
    """What `replay.cpp` takes for a tape: the number of values, inputs first, and steps over them."""

    size: int
    tickets: int
    steps: list[tuple[Any, ...]]
    saved_after: int
    """Steps after which all is there that backward needs, and the others may wait until it is saved."""


class Recorder(TorchDispatchMode):
    """Takes down what its block does with ``inputs`` and with ``numbers``, which differ from call to call.

    Args:
        inputs (Sequence[Tensor | None]): the first values of the tape; none may be another's view.
        numbers (Sequence[float]): values that occur nowhere else, each to be replaced by a call's own.
    """

    def __init__(self, inputs: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
        super().__init__()
        self._numbers = {number: index for index, number in enumerate(numbers)}
        self._steps: list[tuple[Any, ...]] = []
        self._size = self._tickets = 0
        self._saving = self._end = -1
        self._base: dict[int, tuple[int, Tensor]] = {}  # of a storage
        self._held: list[Any] = []
        for t in inputs:
            if t is not None:
                self._add(t)
            else:
                self._size += 1

    def tape(self) -> Tape:
        """What the block did."""
        steps, saving, end = self._steps, self._saving, self._end
        if saving < 0:
            return Tape(self._size, self._tickets, steps, len(steps))
        views = steps[end:]  # of the outputs and of what is saved
        first = steps[:saving] + views
        return Tape(self._size, self._tickets, first + steps[saving:end], len(first))

    def saving_comes_here(self) -> None:
        """What is done from here on may wait until autograd has saved its tensors."""
        self._saving = len(self._steps)

    def function_ends_here(self) -> None:
        """What follows are views of what there is."""
        self._end = len(self._steps)

    def value(self, t: Tensor) -> int:
        """The number of a value that is ``t``: of a tensor that the tape knows, or a view of one."""
        value, bytes_behind = self._place(t)
        base = self._base[t.untyped_storage()._cdata][1]
        if bytes_behind == 0 and (t.shape, t.stride(), t.dtype) == (
            base.shape,
            base.stride(),
            base.dtype,
        ):
            return value
        if t.dtype != base.dtype:
            raise CannotRecordError(f"a view of {base.dtype} as {t.dtype}")
        self._steps.append(
            (
                "view",
                self._size,
                value,
                list(t.shape),
                list(t.stride()),
                bytes_behind // t.element_size(),
            )
        )
        self._size += 1
        return self._size - 1

    def launch(self, launch: Launch, args: tuple[Any, ...]) -> None:
        """Note a launch."""
        direct = launch.prepared(args)
        if direct is None:
            raise NotCompiledError("a kernel has not been launched directly yet")
        packed = direct.packed()
        parameters = bytearray(packed.parameters)
        pointers: list[tuple[int, int, int]] = []
        operands: list[tuple[Any, ...]] = []
        numbers: list[tuple[int, str, int]] = []
        for position, offset, swizzle, box in packed.maps:
            dtype, sizes, strides, behind = map_of(args[position])
            parameters[offset + MAP_BYTES : offset + MAP_BYTES + len(behind)] = behind
            place = (*self._place(args[position]), offset)
            operands.append((*place, dtype, swizzle, sizes, strides, [*reversed(box)]))
        for position, offset, kind in packed.scalars:
            argument = args[position]
            if any(argument is constant for constant in launch.constants):
                struct.pack_into("<Q", parameters, offset, argument.data_ptr())
            elif kind == "Q":
                pointers.append((*self._place(argument), offset))
            elif kind == "f" and argument in self._numbers:
                numbers.append((offset, kind, self._numbers[argument]))
            elif kind == "q" and argument >= _TICKETS:
                numbers.append((offset, kind, _TICKETS - 1 - argument))
            else:
                struct.pack_into(f"<{kind}", parameters, offset, argument)
        self._held += direct, launch
        self._steps.append(
            ("launch", packed.function, packed.grid, packed.threads, packed.shared, packed.early,
             bytes(parameters), packed.offsets, pointers, operands, numbers)
        )  # fmt: skip

    def ticket(self) -> int:
        """A number that stands for one that nobody has used."""
        self._tickets += 1
        return _TICKETS + self._tickets - 1

    @property
    def held(self) -> list[Any]:
        """What the tape's addresses point into."""
        return [each for each in self._held if not isinstance(each, Tensor)]

    def __enter__(self) -> Recorder:
        """Begin."""
        recording.tape = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        recording.tape = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note one of torch's operations."""
        kwargs = kwargs or {}
        if func in _VIEWS or func is _aten.promote_types.default:
            return func(*args, **kwargs)
        if func in _EMPTY:
            return self._allocated(func(*args, **kwargs))
        if func in _COPIES:
            made = self._allocated(torch.empty_like(args[0], **_like(kwargs)))
            self._steps.append(("copy", self.value(made), self.value(args[0])))
            return made
        if func is _aten.cat.default:
            return self._stacked(*args)
        if func is _aten.sort.stable and (args[1:], kwargs) == ((), {"stable": True}):
            values, indices = (
                torch.empty_like(args[0]),
                torch.empty_like(args[0], dtype=torch.int64),
            )
            source = self.value(args[0])
            self._add(values)
            self._add(indices)
            self._steps.append(("sort", self._size - 2, self._size - 1, source))
            return values, indices
        if func is _aten.zeros.default:
            made = self._allocated(
                torch.empty(args[0], dtype=kwargs["dtype"], device=kwargs["device"])
            )
            self._steps.append(("zero", self.value(made)))
            return made
        if func is _aten.copy_.default:
            self._steps.append(("copy", self.value(args[0]), self.value(args[1])))
            return args[0]
        if func is _aten.randint.default:
            made = self._allocated(torch.empty(args[1], dtype=torch.int64, device=kwargs["device"]))
            self._steps.append(("randint", self.value(made), args[0]))
            return made
        if func is _aten.zero_.default:
            self._steps.append(("zero", self.value(args[0])))
            return args[0]
        if func in _PRODUCTS and not kwargs:
            operands = [self.value(t) for t in args]
            *_, a, b = args
            made = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
            self._add(made)
            self._steps.append((_PRODUCTS[func], self.value(made), *operands))
            return made
        if func is _aten.addmm_.default and not kwargs:
            to, a, b = (self.value(t) for t in args)
            self._steps.append(("addmm", to, a, b))
            return args[0]
        raise CannotRecordError(f"{func} among what it does")

    def _stacked(self, tensors: list[Tensor], dim: int = 0) -> Tensor:
        """`torch.cat`, as copies."""
        sizes = [t.shape[dim] for t in tensors]
        shape = list(tensors[0].shape)
        shape[dim] = sum(sizes)
        made = self._allocated(torch.empty(shape, dtype=tensors[0].dtype, device=tensors[0].device))
        if any(t.dtype != made.dtype for t in tensors):
            raise CannotRecordError("tensors of several dtypes in one")
        start = 0
        for t, size in zip(tensors, sizes, strict=True):
            self._steps.append(("copy", self.value(made.narrow(dim, start, size)), self.value(t)))
            start += size
        return made

    def _allocated(self, t: Tensor) -> Tensor:
        self._steps.append(("empty", self._size, list(t.shape), list(t.stride()), t.dtype))
        self._add(t)
        return t

    def _add(self, t: Tensor) -> None:
        storage = t.untyped_storage()._cdata
        if storage in self._base:
            raise CannotRecordError("two tensors share memory")
        self._base[storage] = (self._size, t)
        self._held.append(t)
        self._size += 1

    def _place(self, t: Tensor) -> tuple[int, int]:
        """The value whose memory t lies in, and the bytes before t there."""
        found = self._base.get(t.untyped_storage()._cdata)
        if found is None:
            raise CannotRecordError("a tensor of unknown origin")
        value, base = found
        return value, t.data_ptr() - base.data_ptr()


def _like(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of a copy those that say what it looks like."""
    return {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format") and v is not None}
