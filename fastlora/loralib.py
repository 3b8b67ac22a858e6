"""loralib's functions: what is trained, what is saved, and loading it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapter_io import laid_out
from fastlora.functional import is_dtensor
from fastlora.merging import LoRALayer, merge_anew

BIASES = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze every parameter but the adapters, and thaw biases as ``bias`` says.

    An adapter's parameter is one whose name has a part that begins with ``lora_``, as loralib's,
    PEFT's and fastlora's have; its ``requires_grad`` stays as it is.

    Args:
        model: The model, changed in place.
        bias: ``"none"``: no bias is trained. ``"all"``: every bias of the model is.
            ``"lora_only"``: those of the LoRA layers are, where the layer itself holds a
            ``bias``; as in loralib that leaves out a convolution, whose bias is its child's.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: ``bias`` is none of the three.

    Example:
        >>> import torch, fastlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> report = fastlora.inject(model, ("0",), r=2, lora_alpha=4)
        >>> fastlora.mark_only_lora_as_trainable(model, bias="lora_only")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.bias', '0.lora_A', '0.lora_B']
    """
    _check(model, bias)
    for name, parameter in model.named_parameters():
        if not _is_lora(name):
            parameter.requires_grad_(bias == "all" and _is_bias(name))
    if bias == "lora_only":
        for layer in _lora_layers(model):
            own = layer._parameters.get("bias")
            if own is not None:
                own.requires_grad_(True)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Any]:
    """Return the adapters' part of ``model.state_dict()``, and biases as ``bias`` says.

    Args:
        model: The model, merged or not.
        bias: ``"none"``: the adapters alone. ``"all"``: every bias too. ``"lora_only"``: the
            biases beside an adapter.

    Returns:
        dict: Tensors by name, in the order of the state dict; they share the model's memory.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: ``bias`` is none of the three.

    Example:
        >>> import torch, fastlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = fastlora.inject(model, ("0",), r=2, lora_alpha=4)
        >>> list(fastlora.lora_state_dict(model, bias="lora_only"))
        ['0.bias', '0.lora_A', '0.lora_B']
    """
    _check(model, bias)
    state = model.state_dict()
    beside = {_prefix(key) + "bias" for key in state if _is_lora(key)}
    return {
        key: value
        for key, value in state.items()
        if _is_lora(key)
        or (bias == "all" and _is_bias(key))
        or (bias == "lora_only" and key in beside)
    }


def load_lora_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load what `lora_state_dict` or loralib's own gave, with its biases; all of it, or nothing.

    ``model.load_state_dict(state_dict, strict=False)`` loads the same and passes over every name
    that does not fit. Here the adapters of file and model must be the same, and a bias of the
    file must be the model's. A merged model is merged anew. loralib's files hold no
    ``lora_alpha``: the model must have been built with the same.

    Args:
        model: A model with the same LoRA layers, ranks included.
        state_dict: Tensors by name.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``state_dict`` no mapping.
        ValueError: Names or shapes do not fit, or a value is no float tensor.

    Example:
        >>> import torch, fastlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = fastlora.inject(model, ("0",), r=2, lora_alpha=4)
        >>> fastlora.load_lora_state_dict(model, {
        ...     "0.lora_A": torch.ones(2, 8), "0.lora_B": torch.ones(8, 2),
        ... })
    """
    _check(model, "none")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    own = model.state_dict()
    missing = [key for key in own if _is_lora(key) and key not in state_dict]
    if missing:
        raise ValueError(f"state_dict lacks adapters of the model: {', '.join(missing)}")
    for key, value in state_dict.items():
        if not (_is_lora(key) or _is_bias(key)):
            raise ValueError(f"state_dict must hold adapters and biases alone, got {key}")
        if key not in own:
            raise ValueError(f"state_dict holds {key}, which the model does not have")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key} must be a float tensor, got {kind}")
        if value.shape != own[key].shape:
            raise ValueError(
                f"{key} must be {tuple(own[key].shape)}, as in the model, got {tuple(value.shape)}"
            )
        if own[key].is_meta:
            raise ValueError(
                f"{key} cannot be loaded: the layer of the model is on the meta device"
            )
        if value.is_meta or value.layout is not torch.strided:
            raise ValueError(
                f"{key} must be a dense tensor with values, got {value.layout} on {value.device}"
            )
        if is_dtensor(value) and not is_dtensor(own[key]):
            raise ValueError(f"{key} is a DTensor, but a plain tensor in the model")
    # All laid out before the first changes.
    values = {key: laid_out(value, own[key]) for key, value in state_dict.items()}
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(value)
    merge_anew(_lora_layers(model))


def _check(model: object, bias: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(map(repr, BIASES))}, got {bias!r}")


def _lora_layers(model: nn.Module) -> Iterator[LoRALayer]:
    return (module for module in model.modules() if isinstance(module, LoRALayer))


def _is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


def _prefix(name: str) -> str:
    """Return what stands before the first part of a name that begins with ``lora_``."""
    parts = name.split(".")
    first = next(i for i, part in enumerate(parts) if part.startswith("lora_"))
    return ".".join([*parts[:first], ""]) if first else ""
