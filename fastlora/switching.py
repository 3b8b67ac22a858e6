"""Changing the task of a model: another adapter in place of the one it has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapter_config import alpha_of, check_config, pattern_value
from fastlora.adapter_io import (
    PARTS,
    PREFIX,
    WEIGHTS_NAME,
    check_keys,
    check_tensor,
    named_lora_layers,
    peft_keys,
    read_adapter,
)
from fastlora.merging import LoRALayer
from fastlora.modules import MAX_RANK, lora_scaling


@dataclass(frozen=True)
class _Adapter:
    """What a layer computes with, beside its frozen weight."""

    layer: LoRALayer
    tensors: dict[str, Tensor]
    r: int
    lora_alpha: float
    use_rslora: bool
    scaling: float


def switch_adapter(
    model: nn.Module,
    adapter: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    safe: bool = False,
) -> None:
    """Give ``model`` another adapter; a merged model is merged with it, from the frozen weights.

    Afterwards the model is bit-identical to one that was loaded fresh with that adapter, however
    many adapters it had before. Everything is checked before the first value changes, and where
    something fails later the old adapter is put back: a failed call leaves the model as it was.

    The adapter must hold every LoRA layer of the model and no other. Its rank and ``lora_alpha``
    may differ from the model's when its configuration is there. Values are cast to the dtype of
    the layers. ``lora_A`` and ``lora_B`` stay the same Parameters, unless their rank changes:
    then they are new ones, which an optimizer made before does not know.

    Args:
        model: A model with LoRA layers, merged or not.
        adapter: A folder as `save_adapter` and PEFT write it, or a state dict: with PEFT's names
            (``base_model.model.<layer>.lora_A.weight``), or with the model's own
            (``<layer>.lora_A``), as `lora_state_dict` gives them.
        config: What ``adapter_config.json`` holds, for a state dict. Without it the ranks and
            the scalings of the model stay, and the tensors must fit them.
        safe: Refuse an adapter that gives merged weights which are not finite.

    Raises:
        FileNotFoundError: The folder lacks one of the two files.
        TypeError: ``model``, ``adapter`` or ``config`` is of another type.
        ValueError: The adapter cannot be read, is no plain LoRA or does not fit the model; the
            message names the tensor or the setting.

    Example:
        >>> import torch, fastlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> report = fastlora.inject(model, ("0",), r=2, lora_alpha=4)
        >>> tasks = [
        ...     {"0.lora_A": torch.randn(2, 8), "0.lora_B": torch.randn(8, 2)} for _ in range(2)
        ... ]
        >>> fastlora.merge(model)
        >>> for task in tasks:
        ...     fastlora.switch_adapter(model, task)
    """
    layers = named_lora_layers(model)
    if isinstance(adapter, (str, os.PathLike)):
        if config is not None:
            raise TypeError("config must be None for a folder, which holds its own")
        config, tensors = read_adapter(adapter)
        where = str(Path(adapter) / WEIGHTS_NAME)
    elif isinstance(adapter, Mapping):
        where, tensors = "adapter", dict(adapter)
        if config is not None:
            if not isinstance(config, Mapping):
                raise TypeError(f"config must be a mapping, got {type(config).__name__}")
            check_config(config, "config")
    else:
        raise TypeError(f"adapter must be a folder or a state dict, got {type(adapter).__name__}")
    keys = _keys(layers, tensors)
    check_keys(tensors, [key for parts in keys.values() for key in parts.values()], where)
    new = [
        _new_adapter(
            name, layer, {p: (keys[name][p], tensors[keys[name][p]]) for p in PARTS}, config
        )
        for name, layer in layers.items()
    ]
    given = [tensor for a in new for tensor in a.tensors.values()]
    held = {
        getattr(layer, part).untyped_storage().data_ptr()
        for layer in layers.values()
        for part in PARTS
    }
    if any(t.untyped_storage().data_ptr() in held for t in given):
        # The adapter is made of this model's own tensors, which change while they are copied.
        new = [replace(a, tensors={p: t.clone() for p, t in a.tensors.items()}) for a in new]
    _apply(new, safe)


def _keys(
    layers: Mapping[str, LoRALayer], found: Mapping[str, Tensor]
) -> dict[str, dict[str, str]]:
    """Return the keys wanted of ``found``: PEFT's names if it has any of them, else the model's own."""
    if not any(isinstance(key, str) and key.startswith(PREFIX) for key in found):
        return {name: {part: f"{name}.{part}" for part in PARTS} for name in layers}
    for name, layer in layers.items():
        if not layer.peft_names:
            raise ValueError(
                f"{name} is a {type(layer).__name__}, which PEFT's format has no place for"
            )
    return {name: peft_keys(name, layer) for name, layer in layers.items()}


def _new_adapter(
    name: str,
    layer: LoRALayer,
    found: Mapping[str, tuple[str, Tensor]],
    config: Mapping[str, Any] | None,
) -> _Adapter:
    r, alpha, rslora, scaling = layer.r, layer.lora_alpha, layer.use_rslora, layer.scaling
    shapes = {part: tuple(getattr(layer, part).shape) for part in PARTS}
    if config is not None:
        alpha, rslora = alpha_of(name, config)
        r = pattern_value(config, "rank_pattern", name, config.get("r", 8))
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= MAX_RANK:
            raise ValueError(f"r of {name} must be an int from 1 to {MAX_RANK}, got {r!r}")
        scaling = lora_scaling(r, alpha, rslora)
        if layer.peft_names:  # the other layers stack their ranks
            shapes = {"lora_A": (r, shapes["lora_A"][1]), "lora_B": (shapes["lora_B"][0], r)}
        elif r != layer.r:
            raise ValueError(f"r of {name} must be {layer.r}, as in the model, got {r}")
    tensors = {}
    for part, (key, tensor) in found.items():
        parameter = getattr(layer, part)
        check_tensor(key, tensor, parameter, shapes[part])
        # Where it becomes the Parameter, a copy; else it is copied into the one that is there.
        own = tensor.shape != parameter.shape
        tensors[part] = tensor.detach().to(parameter.device, parameter.dtype, copy=own)
    return _Adapter(layer, tensors, r, alpha, rslora, scaling)


@torch.inference_mode(False)
@torch.no_grad()
def _apply(new: Sequence[_Adapter], safe: bool) -> None:
    old = [
        _Adapter(
            a.layer,
            {part: getattr(a.layer, part) for part in PARTS},
            a.layer.r, a.layer.lora_alpha, a.layer.use_rslora, a.layer.scaling,
        )
        for a in new
    ]  # fmt: skip
    parameters = [parameter for a in old for parameter in a.tensors.values()]
    values = _copies(parameters)
    try:
        _put(new)
        if safe:  # all, before the first weight changes
            for adapter in new:
                adapter.layer._merged_values(safe)
        for adapter in new:
            if adapter.layer.merged:
                adapter.layer.merge()
    except BaseException:
        torch._foreach_copy_(parameters, values)
        _put(old)
        for adapter in old:
            if adapter.layer.merged:
                adapter.layer.merge()
        raise


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors in a few launches: a launch each would cost more than the copying."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, parameter in enumerate(parameters):
        groups.setdefault((parameter.device, parameter.dtype), []).append(i)
    copies = list(parameters)
    for members in groups.values():
        flat = torch.cat([parameters[i].detach().reshape(-1) for i in members])
        parts = flat.split([parameters[i].numel() for i in members])  # type: ignore[no-untyped-call]
        for i, part in zip(members, parts, strict=True):
            copies[i] = part.view(parameters[i].shape)
    return copies


def _put(adapters: Sequence[_Adapter]) -> None:
    """Give layers their adapters: values in place where the shape stays, else another Parameter."""
    targets, values = [], []
    for adapter in adapters:
        layer = adapter.layer
        for part, tensor in adapter.tensors.items():
            parameter = getattr(layer, part)
            if tensor is parameter:
                continue
            if isinstance(tensor, nn.Parameter):
                setattr(layer, part, tensor)
            elif parameter.shape == tensor.shape:
                targets.append(parameter)
                values.append(tensor)
            else:
                made = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                setattr(layer, part, made)
        for name in ("r", "lora_alpha", "use_rslora", "scaling"):
            if getattr(layer, name) != getattr(adapter, name):
                setattr(layer, name, getattr(adapter, name))
    if targets:
        torch._foreach_copy_(targets, values)
