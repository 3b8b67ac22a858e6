"""Calls of a `KernelFunction` without Python: recorded at one call, made by `kernels/replay.cpp` at the next.

A small layer is over on the GPU before Python has launched it. What Python decides for a call depends on
shapes, strides, dtypes and settings alone, so its launches are taken down once for each of those
(`fastlora.kernels.tape`) and made again from C++ by autograd itself. The kernels are the same, in the same
order, and so are their results. Where anything is different, Python runs as before: the first calls, while
kernels and this are still being compiled; CUDA graph capture; modes, transforms and subclasses that want to
see operations; a backward that asks for other gradients.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels import native
from fastlora.kernels.launch import current_device, current_stream, profiled
from fastlora.kernels.tape import CannotRecordError, NotCompiledError, Recorder

_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)

refusals: dict[str, int] = {}
"""Why calls could not be recorded, and how many of them."""


def saving_is_watched() -> bool:
    """Whether saved tensors go through hooks, such as those of activation checkpointing."""
    return _saving_hooks(False) is not None


def replayed(
    function: Any, args: tuple[Any, ...], learn: bool = True
) -> tuple[Tensor | None, ...] | None:
    """The outputs of ``function.apply(*args)``, ``None`` in place of those that have no gradient.

    Args:
        function: a `KernelFunction`; its ``NUMBER`` is the position of an argument that is a new number at
            each call, or -1.
        args (tuple): its arguments.
        learn (bool): record the call where that is due; they must have been checked then. Default: ``True``.

    Returns:
        tuple | None: the outputs, or ``None`` where Python has to make them.
    """
    module = native.module
    if module is None:
        if args[0].is_cuda:
            native.start()
        return None
    index = args[0].get_device()
    if index != current_device() or profiled():
        return None
    stream = current_stream(index)
    found = module.replay(id(function), args, function.NUMBER, stream, learn, saving_is_watched())
    if type(found) is bytes:
        _learn(module, found, function, args)
        return None
    return found  # type: ignore[no-any-return]


def _learn(module: Any, key: bytes, function: Any, args: tuple[Any, ...]) -> None:
    """Record a call, if it can be; otherwise remember that it cannot, or try again later."""
    try:
        made, again = (record(function, args) for _ in range(2))
        # With other numbers in place of those that change: what follows from them would differ.
        if any(made[name] != again[name] for name in made if name not in ("held", "python")):
            raise CannotRecordError("something else depends on what changes from call to call")
    except (NotCompiledError, torch.OutOfMemoryError):
        return
    except Exception as error:  # what Python can do must not fail because it cannot be recorded
        reason = str(error) if isinstance(error, CannotRecordError) else repr(error)
        refusals[reason] = refusals.get(reason, 0) + 1
        module.refuse(key)
        return
    module.keep(key, made)


class _Context:
    """Stands for the ``ctx`` that autograd would give."""

    def __init__(
        self, needs_input_grad: tuple[bool, ...], saved: Sequence[Tensor | None] = ()
    ) -> None:
        self.needs_input_grad, self.saved_tensors = needs_input_grad, tuple(saved)
        self.without_gradient: set[int] = set()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep them."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Remember which."""
        self.without_gradient = {id(t) for t in tensors}

    def set_materialize_grads(self, value: bool) -> None:
        """Replayed gradients are never materialised."""


def record(function: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """What ``function.apply(*args)`` and its backward would do, as `replay.cpp` takes it.

    Raises:
        NotCompiledError: one of its kernels has not run yet.
        CannotRecordError: it does something that a tape has no step for.
    """
    number = random.uniform(2.0, 3.0)
    with_grad = torch.is_grad_enabled()
    needs = tuple(with_grad and isinstance(a, Tensor) and a.requires_grad for a in args)
    with torch.inference_mode(False), torch.no_grad():
        stand_ins = _stand_ins(args)
        inputs = [a for a in stand_ins if isinstance(a, Tensor)]
        given = tuple(number if i == function.NUMBER else a for i, a in enumerate(stand_ins))
        with Recorder(inputs, [number]) as forward:
            outputs = function.forward(*given)
            forward.function_ends_here()
            ctx = _Context(needs)
            function.setup_context(ctx, given, outputs)
            has_grad = [t is not None and id(t) not in ctx.without_gradient for t in outputs]
            made = [
                forward.value(t) if has else -1 for t, has in zip(outputs, has_grad, strict=True)
            ]
            saved = [-1 if t is None else forward.value(t) for t in ctx.saved_tensors]
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        grads, backward, held = [-1] * len(tensors), None, forward.held
        dys = [torch.empty_like(t) for t, has in zip(outputs, has_grad, strict=True) if has]
        if any(needs):
            with Recorder([*dys, *ctx.saved_tensors], [number]) as taken:
                found = function.backward(ctx, *_spread(dys, made))
                for k, i in enumerate(tensors):
                    if found[i] is not None:
                        grads[k] = taken.value(found[i])
            backward, held = tuple(taken.tape()), held + taken.held
    state = {k: v for k, v in vars(ctx).items() if k not in vars(_Context(()))}
    if any(isinstance(value, Tensor) for value in state.values()):
        raise CannotRecordError("a tensor among what backward needs, and not saved for it")
    return {
        "forward": tuple(forward.tape()),
        "backward": backward,
        "outputs": made,
        "saved": saved if backward is not None else [],
        "needs": [needs[i] for i in tensors],
        "grads": grads,
        "dys": [_layout(t) for t in dys],
        "kept": [_layout(t) for t in ctx.saved_tensors if t is not None],
        "held": held,
        "python": _Backward(function, state, number, len(args), tensors, made),
    }


class _Backward:
    """A backward that is not as it was recorded: Python's, with what C++ kept."""

    def __init__(
        self, function: Any, state: dict[str, Any], number: float, arguments: int, tensors: list[int],
        outputs: list[int],
    ) -> None:  # fmt: skip
        self._function, self._state, self._number = function, state, number
        self._arguments, self._tensors, self._outputs = arguments, tensors, outputs

    def __call__(
        self,
        saved: list[Tensor | None],
        dys: list[Tensor | None],
        needs: list[bool],
        numbers: list[float],
    ) -> list[Tensor | None]:
        """The gradients of the tensors among the arguments."""
        of_tensors = dict(zip(self._tensors, needs, strict=True))
        ctx = _Context(tuple(of_tensors.get(i, False) for i in range(self._arguments)), saved)
        for name, value in self._state.items():
            setattr(ctx, name, numbers[0] if value == self._number else value)
        grads = self._function.backward(ctx, *_spread(dys, self._outputs))
        return [grads[i] for i in self._tensors]


def _stand_ins(args: tuple[Any, ...]) -> list[Any]:
    """The arguments without their gradients; empty tensors in place of those that share memory.

    In place of inference tensors too, whose operations a mode sees before they are taken apart.
    """
    storages: set[int] = set()
    found: list[Any] = []
    for a in args:
        if isinstance(a, Tensor):
            storage = a.untyped_storage()._cdata
            if storage in storages or a.is_inference():
                a = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
            storages.add(storage)
            a = a.detach()
        found.append(a)
    return found


def _layout(t: Tensor) -> tuple[list[int], list[int], torch.dtype]:
    return list(t.shape), list(t.stride()), t.dtype


def _spread(dys: Sequence[Tensor | None], outputs: list[int]) -> list[Tensor | None]:
    """Gradients of the outputs that have one, ``None`` for all others."""
    each = iter(dys)
    return [next(each) if value >= 0 else None for value in outputs]
