"""Changing the task of a model: another adapter in place of the one it has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.adapter_config import PARTS, alpha_of, check_config, pattern_value
from fastlora.adapter_io import (
    PREFIX,
    WEIGHTS_NAME,
    check_keys,
    check_tensor,
    named_lora_layers,
    peft_keys,
    read_adapter,
)
from fastlora.functional import is_dtensor
from fastlora.merging import LoRALayer, check_finite, merge_anew, parameter_of
from fastlora.modules import MAX_RANK, lora_scaling

_SETTINGS = ("r", "lora_alpha", "use_rslora", "scaling")

_FIRST, _PART = 16, 32
"""Layers that are changed before they are merged, at first and then: the GPU begins while the host goes on.

One launch merges all layers of a shape. Parts that double leave the GPU without work before the large ones,
and the host without before the last: 9.1 ms a switch, where parts of 32 take 8.1 and one copy of all weights
7.2 (an H200, the linears of an 8B Llama).
"""


class _Adapter(NamedTuple):
    """What a layer is to compute with, beside its frozen weight: in the order of `PARTS`."""

    layer: LoRALayer
    parameters: tuple[nn.Parameter, ...]
    """Those that the layer has now."""
    tensors: tuple[Tensor, ...]
    settings: tuple[int, float, bool, float] | None
    """`_SETTINGS` in their order; ``None`` where they stay."""


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
    check_keys(tensors, [key for parts in keys for key in parts], where)
    new = [
        _new_adapter(name, layer, parts, tensors, config)
        for (name, layer), parts in zip(layers.items(), keys, strict=True)
    ]
    held = {p.untyped_storage().data_ptr() for adapter in new for p in adapter.parameters}
    given = {t.untyped_storage().data_ptr() for adapter in new for t in adapter.tensors}
    if not held.isdisjoint(given):
        # The adapter is made of this model's own tensors, which change while they are copied.
        new = [a._replace(tensors=tuple(t.clone() for t in a.tensors)) for a in new]
    _apply(new, safe)


def _keys(layers: Mapping[str, LoRALayer], found: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return the keys of each layer: PEFT's names if ``found`` has any, else the model's own."""
    if not any(isinstance(key, str) and key.startswith(PREFIX) for key in found):
        return [(f"{name}.lora_A", f"{name}.lora_B") for name in layers]
    for name, layer in layers.items():
        if not layer.peft_names:
            raise ValueError(
                f"{name} is a {type(layer).__name__}, which PEFT's format has no place for"
            )
    named = [peft_keys(name, layer) for name, layer in layers.items()]
    return [(keys["lora_A"], keys["lora_B"]) for keys in named]


def _new_adapter(
    name: str,
    layer: LoRALayer,
    keys: tuple[str, ...],
    found: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
) -> _Adapter:
    parameters = parameter_of(layer, "lora_A"), parameter_of(layer, "lora_B")
    if is_dtensor(parameters[0]) or is_dtensor(parameters[1]):
        raise TypeError(
            f"the adapter of {name} is sharded: switch_adapter takes plain parameters only; "
            "load_adapter loads into sharded ones"
        )
    if config is None:
        given = found[keys[0]], found[keys[1]]
        if _fits_as_it_is(given[0], parameters[0]) and _fits_as_it_is(given[1], parameters[1]):
            return _Adapter(layer, parameters, given, None)
    settings, shapes = None, [parameter.shape for parameter in parameters]
    if config is not None:
        alpha, rslora = alpha_of(name, config)
        r = pattern_value(config, "rank_pattern", name, config.get("r", 8))
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= MAX_RANK:
            raise ValueError(f"r of {name} must be an int from 1 to {MAX_RANK}, got {r!r}")
        settings = r, alpha, rslora, lora_scaling(r, alpha, rslora)
        if layer.peft_names:  # the other layers stack their ranks
            shapes = [torch.Size((r, shapes[0][1])), torch.Size((shapes[1][0], r))]
        elif r != layer.r:
            raise ValueError(f"r of {name} must be {layer.r}, as in the model, got {r}")
    tensors = []
    for key, parameter, shape in zip(keys, parameters, shapes, strict=True):
        tensor = found[key]
        dtype, device = parameter.dtype, parameter.device
        check_tensor(key, tensor, parameter, shape)
        if config is not None and shape != parameter.shape:
            tensor = tensor.detach().to(device, dtype, copy=True)  # it becomes the Parameter
        elif tensor.dtype is not dtype or tensor.device != device:
            tensor = tensor.detach().to(device, dtype)
        tensors.append(tensor)
    return _Adapter(layer, parameters, tuple(tensors), settings)


def _fits_as_it_is(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether there is nothing to check, cast or move, as at most switches; asked for hundreds of layers."""
    return (
        type(tensor) is Tensor
        and tensor.get_device() == parameter.get_device() >= 0  # both on the same GPU
        and tensor.dtype is parameter.dtype
        and tensor.shape == parameter.shape
    )


def _settings(layer: LoRALayer) -> tuple[int, float, bool, float]:
    return layer.r, layer.lora_alpha, layer.use_rslora, layer.scaling


@torch.inference_mode(False)
@torch.no_grad()
def _apply(new: Sequence[_Adapter], safe: bool) -> None:
    changed: list[tuple[_Adapter, tuple[int, float, bool, float] | None]] = []
    values: list[tuple[list[Tensor], Tensor]] = []
    done = 0
    try:
        while done < len(new):
            part = new[done:] if safe else new[done : done + (_PART if done else _FIRST)]
            layers = [adapter.layer for adapter in part]
            values += _copies([p for adapter in part for p in adapter.parameters])
            changed += [(a, None if a.settings is None else _settings(a.layer)) for a in part]
            _put(part)
            if safe:  # all, before the first weight changes
                check_finite(layers)
            merge_anew(layers)
            done += len(part)
    except BaseException:
        for parameters, flat in reversed(values):  # layers may share a Parameter
            parts = torch._C._nn.unflatten_dense_tensors(flat, parameters)
            torch._foreach_copy_(parameters, parts)
        for adapter, before in changed:
            adapter.layer.lora_A, adapter.layer.lora_B = adapter.parameters
            _set(adapter.layer, before)
        merge_anew(adapter.layer for adapter, _ in changed)
        raise


def _copies(parameters: Sequence[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
    """Copy tensors end to end, those of a device and dtype at once: a launch each would cost more."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return [(members, torch._C._nn.flatten_dense_tensors(members)) for members in groups.values()]


def _put(adapters: Sequence[_Adapter]) -> None:
    """Give layers their adapters: values in place where the shape stays, else another Parameter."""
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for layer, parameters, tensors, settings in adapters:
        if settings is None:  # and the shapes stay with them
            targets += parameters
            values += tensors
            continue
        for part, parameter, tensor in zip(PARTS, parameters, tensors, strict=True):
            if parameter.shape == tensor.shape:
                targets.append(parameter)
                values.append(tensor)
            else:
                made = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                setattr(layer, part, made)
        _set(layer, settings)
    if targets:
        torch._foreach_copy_(targets, values)


def _set(layer: LoRALayer, settings: tuple[int, float, bool, float] | None) -> None:
    if settings is None:
        return
    for name, value, now in zip(_SETTINGS, settings, _settings(layer), strict=True):
        if now != value:
            setattr(layer, name, value)
