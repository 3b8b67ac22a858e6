"""The adapters of a PEFT layer as the fused ops want them: one, several as one, or a stack to pick from."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.adapters import (
    AdapterStack,
    Routing,
    padded_stacks,
    route,
)
from fastlora.device_numbers import constants
from fastlora.routing_ops import NO_ADAPTER


class Adapter(NamedTuple):
    """What one adapter of a layer holds at this moment: ``scaling * (dropout(x) A^T B^T + bias)``.

    With a ``magnitude [N]`` it is DoRA, which scales the frozen product too.
    """

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    dropout_p: float
    magnitude: Tensor | None = None


def add_bias(bias: Tensor | None, adapter: Adapter) -> Tensor | None:
    """``bias + scaling * lora_B.bias`` in fp32: PEFT scales the bias of lora_B with its output."""
    if adapter.bias is None:
        return bias
    scaled = adapter.bias.float() * adapter.scaling
    return scaled if bias is None else bias.float() + scaled


def concatenate(adapters: list[Adapter]) -> Adapter:
    """One adapter for the sum of several: ranks side by side, each scaling folded into its lora_B.

    The factors are applied in fp32, so that bf16 adapters are not rounded once more.
    """
    bias: Tensor | None = None
    for adapter in adapters:
        bias = add_bias(bias, adapter)
    return Adapter(
        torch.cat([adapter.lora_A for adapter in adapters]),
        torch.cat([adapter.lora_B.float() * adapter.scaling for adapter in adapters], dim=1),
        bias,
        scaling=1.0,
        dropout_p=0.0,
    )


def stack(adapters: list[Adapter]) -> AdapterStack:
    """The adapters in slots, in their order; smaller ranks are filled up with zeros.

    Args:
        adapters (list[Adapter]): of one layer, without a bias of lora_B.

    Returns:
        AdapterStack: differentiable in every lora_A and lora_B.
    """
    ranks = tuple(adapter.lora_A.shape[0] for adapter in adapters)
    return AdapterStack(
        *padded_stacks([(adapter.lora_A, adapter.lora_B) for adapter in adapters]),
        _scalings(adapters),
        constants(ranks, torch.int32, adapters[0].lora_A.device) if len(set(ranks)) > 1 else None,
    )


def _scalings(adapters: list[Adapter]) -> Tensor:
    device = adapters[0].lora_A.device
    # A tensor on the CPU is read without a sync; one on the device stays there.
    numbers = [
        float(s) if not isinstance(s, Tensor) or s.device.type == "cpu" else s
        for s in (adapter.scaling for adapter in adapters)
    ]
    if not any(isinstance(s, Tensor) for s in numbers):
        return constants(tuple(map(float, numbers)), torch.float32, device)
    return torch.stack(
        [
            s.float() if isinstance(s, Tensor) else constants((s,), torch.float32, device)[0]
            for s in numbers
        ]
    )


def routing_for(
    names: list[str] | tuple[str, ...],
    slots: tuple[str, ...],
    shape: torch.Size,
    device: torch.device,
) -> Routing:
    """Which slot each row of x uses; made once for all layers, and all tokens that follow.

    Args:
        names (list[str] | tuple[str, ...]): the adapter of each row of the batch; one that is not among
            the slots, such as ``"__base__"``, is none.
        slots (tuple[str, ...]): the adapters of the stack.
        shape (torch.Size): leading dimensions of x, the batch first.
        device (torch.device): of x.

    Returns:
        Routing: for `fastlora.lora_linear_multi`.
    """
    return _routing(tuple(names), slots, tuple(shape), device)


@functools.lru_cache(maxsize=64)
def _routing(
    names: tuple[str, ...], slots: tuple[str, ...], shape: tuple[int, ...], device: torch.device
) -> Routing:
    with torch.inference_mode(False):
        ids = _ids(names, slots, device).view(-1, *[1] * (len(shape) - 1))
        return route(ids.expand(shape).reshape(-1), len(slots))


@functools.lru_cache(maxsize=64)
def _ids(names: tuple[str, ...], slots: tuple[str, ...], device: torch.device) -> Tensor:
    slot_of = {name: slot for slot, name in enumerate(slots)}
    with torch.inference_mode(False):
        return torch.tensor([slot_of.get(name, NO_ADAPTER) for name in names], device=device)
