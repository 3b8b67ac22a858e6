"""PEFT's LoRA model with mixed batches in training, which PEFT refuses.

Importing this file imports PEFT.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.model import LoraModel as PeftLoraModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from fastlora.replay import saving_is_watched

_TAKES_NAMES = (LoraLayer, AuxiliaryTrainingWrapper)
_NAMED = "function_with_names"


class AcceleratedLoraModel(PeftLoraModel):  # type: ignore[misc]
    """`peft.tuners.lora.model.LoraModel` that takes ``adapter_names`` in training mode too.

    `fastlora.accelerate` gives this class to an existing model; it is never constructed. Which adapters
    learn is up to their ``requires_grad``, as always: ``model.base_model.set_adapter([...])`` sets it.
    """

    training: bool

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        peft_hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        if names is None or not self.training:
            with peft_hooks:
                yield
            return
        with contextlib.ExitStack() as stack:
            # PEFT checks the names, hands them to the layers, and refuses by this flag of the model alone.
            self.training = False
            try:
                stack.enter_context(peft_hooks)
            finally:
                self.training = True
            stack.enter_context(_names_in_recomputation(self, names))
            stack.enter_context(_no_other_checkpoint(self))
            yield


_CHECKPOINT = CheckpointFunction.forward.__code__.co_filename


@contextlib.contextmanager
def _no_other_checkpoint(model: nn.Module) -> Iterator[None]:
    """Raise where a layer runs in a checkpoint of torch's whose recomputation would not know the names."""
    recorded, outside = torch.is_grad_enabled(), _caller()

    def check(_: nn.Module, args: Any) -> None:
        # A checkpoint watches what is saved, or runs its function without autograd.
        watched = saving_is_watched() or (recorded and not torch.is_grad_enabled())
        if watched and _is_forgetful(outside):
            raise RuntimeError(
                "adapter_names in training do not go with this use of torch.utils.checkpoint, which would "
                "run the layers again without them; use model.gradient_checkpointing_enable() of transformers"
            )

    layers = [m for m in model.modules() if isinstance(m, _TAKES_NAMES)]
    handles = [m.register_forward_pre_hook(check) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _caller() -> FrameType | None:
    """Who entered the context managers, this file's and PEFT's around them, and stays while they are open."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        frame.f_code.co_flags & inspect.CO_GENERATOR
        or frame.f_code.co_filename == contextlib.__file__
    ):
        frame = frame.f_back
    return frame


def _is_forgetful(outside: FrameType | None) -> bool:
    """Whether the innermost checkpoint up to the frame ``outside`` has none of `_with_names`."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame is not outside:
        if frame.f_code.co_name == _NAMED and frame.f_code.co_filename == __file__:
            return False
        if frame.f_code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _names_in_recomputation(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let a checkpointed layer see the names of its forward when backward runs it again.

    By then PEFT's hooks are gone, or another batch's are there, so the names travel with the function
    that is checkpointed.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None:
            replaced.append((module, checkpoint))
            module.__dict__["_gradient_checkpointing_func"] = _with_names(module, checkpoint, names)
    try:
        yield
    finally:
        for module, checkpoint in replaced:
            module.__dict__["_gradient_checkpointing_func"] = checkpoint


def _with_names(
    module: nn.Module, checkpoint: Callable[..., Any], names: Sequence[str]
) -> Callable[..., Any]:
    layers = [m for m in module.modules() if isinstance(m, _TAKES_NAMES)]

    def set_names(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    def checkpoint_with_names(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def function_with_names(*args: Any, **kwargs: Any) -> Any:
            hooks = [m.register_forward_pre_hook(set_names, with_kwargs=True) for m in layers]
            try:
                return function(*args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()

        return checkpoint(function_with_names, *args, **kwargs)

    return checkpoint_with_names
