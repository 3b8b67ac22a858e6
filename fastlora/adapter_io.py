"""Save and load adapters in PEFT's file format."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlora.adapter_config import PARTS, alpha_of, parse_config
from fastlora.functional import is_dtensor
from fastlora.merging import LoRALayer, merge_anew
from fastlora.modules import lora_scaling

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_LISTED = 10
_WRAPPER_LEVELS = ("_orig_mod", "_checkpoint_wrapped_module")


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters of ``model`` as PEFT does, to ``folder``.

    The folder gets ``adapter_config.json`` and ``adapter_model.safetensors`` with a tensor
    ``base_model.model.<module>.lora_A.weight`` ``(r, in_features)`` and ``.lora_B.weight``
    ``(out_features, r)`` for each LoRA linear, in the dtype it has. PEFT, and what reads PEFT's
    files, can load it onto the same base model. Layers whose rank or scaling differ from the
    most common one are listed in ``rank_pattern`` and ``alpha_pattern``.

    Where parameters are DTensors (FSDP2, tensor parallel) every rank must call: shards are gathered,
    rank 0 writes, and all ranks return once the files are there. Otherwise the caller writes; under
    DDP let one rank call.

    Args:
        model: A model with at least one ``LoRALinear``; the names are taken relative to it, or
            to the module inside ``DistributedDataParallel``.
        folder: Where to write; made when it is not there. Files of the same name are replaced.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: The model has no ``LoRALinear``, or one on the meta device.

    Example:
        >>> import tempfile, torch
        >>> from fastlora import inject, load_adapter, save_adapter
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = inject(model, ("0",), r=2, lora_alpha=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     load_adapter(model, folder)
    """
    model = _unwrap(model)
    layers = _lora_layers(model)
    for name, layer in layers.items():
        for part in PARTS:
            if getattr(layer, part).is_meta:
                raise ValueError(f"{name}.{part} is on the meta device, there is nothing to save")
    aliases = _aliases(model, layers)
    if aliases:
        warnings.warn(
            f"{_listing(aliases)} share the adapter of another name; it is saved once, and PEFT "
            "attaches it to the first name only",
            stacklevel=2,
        )
    parameters: dict[str, Tensor] = {
        key: parameter.detach() for key, parameter in _peft_tensors(layers).items()
    }
    sharded = any(is_dtensor(parameter) for parameter in parameters.values())
    if sharded:
        from fastlora.distributed import full_value

        parameters = {key: full_value(parameter) for key, parameter in parameters.items()}
    config = json.dumps(_config(model, layers), indent=2, sort_keys=True) + "\n"

    try:
        if not sharded or torch.distributed.get_rank() == 0:
            _write(Path(folder), parameters, config)
    finally:
        if sharded:  # in a finally: an error on rank 0 must not leave the others waiting
            torch.distributed.barrier()


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load adapters that ``save_adapter`` or PEFT wrote into the LoRA linears of ``model``.

    Inject the model first, with the rank and alpha of the adapter. File and model must hold the
    same layers, shapes and scalings. Everything is checked before the first value is copied, so
    that a failed call leaves the model as it was. Values are cast to the dtype of the layer. Where
    parameters are DTensors every rank must call and be able to read the files; rank 0's values are used.

    Args:
        model: A model with LoRA linears, as ``inject`` makes it.
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        FileNotFoundError: One of the two files is not there.
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: A file cannot be read, the adapter uses a variant other than plain LoRA, or
            it does not fit the model; the message names the tensor or the setting.
    """
    layers = _lora_layers(_unwrap(model))
    config, tensors = read_adapter(folder)
    wanted = _peft_tensors(layers)
    where = str(Path(folder) / WEIGHTS_NAME)
    tensors = _without_frozen(tensors, layers, where)
    check_keys(tensors, wanted, where)
    for key, parameter in wanted.items():
        check_tensor(key, tensors[key], parameter, tuple(parameter.shape))
    for name, layer in layers.items():
        _check_scaling(name, layer, config)
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(laid_out(tensors[key], parameter))
    merge_anew(layers.values())


def _without_frozen(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LoRALayer], where: str
) -> dict[str, Tensor]:
    """What is left without the frozen weights that PEFT saves beside adapters of embeddings and ``lm_head``.

    Raises:
        ValueError: one is not the model's own, in the less exact of both dtypes.
    """
    rest = dict(tensors)
    for name, layer in layers.items():
        for part in ("weight", "bias"):
            value = rest.pop(key := f"{PREFIX}{name}.base_layer.{part}", None)
            if value is None:
                continue
            own = layer.state_dict().get(part)  # of a merged layer the frozen values
            if own is not None and is_dtensor(own):
                own = own.full_tensor()
            if own is None or own.shape != value.shape or not _same(own.cpu(), value):
                raise ValueError(
                    f"{where}: {key} differs from the model's, which the adapter is not for"
                )
    return rest


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a)


def _write(folder: Path, parameters: Mapping[str, Tensor], config: str) -> None:
    # A clone each: safetensors refuses tensors that share memory.
    tensors = {key: value.cpu().clone().contiguous() for key, value in parameters.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(tensors, path, {"format": "pt"}))
    _replace(folder / CONFIG_NAME, lambda path: path.write_text(config, encoding="utf-8"))


def _unwrap(model: nn.Module) -> nn.Module:
    """Take the module out of DistributedDataParallel, which puts a level into every name."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return cast(nn.Module, model.module)
    return model


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the two files of an adapter in PEFT's format, and check that it is plain LoRA.

    Args:
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        tuple: The configuration, and the tensors on the CPU by their names in the file.

    Raises:
        FileNotFoundError: One of the two files is not there.
        ValueError: A file cannot be read, or the adapter uses another variant.
    """
    config = _read_config(Path(folder) / CONFIG_NAME)
    weights = Path(folder) / WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {folder}; only safetensors can be loaded")
    try:
        return config, load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is no readable safetensors file: {error}") from error


def _lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return each LoRA layer once, by its first name as PEFT counts names; all must fit its format."""
    layers = named_lora_layers(model)
    for name, layer in layers.items():
        if not layer.peft_names:
            raise ValueError(
                f"{name} is a {type(layer).__name__}, which PEFT's files have no place for; "
                "use fastlora.lora_state_dict and fastlora.load_lora_state_dict"
            )
    return layers


def named_lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return each LoRA layer of ``model`` once, by its first name without torch.compile's level.

    Args:
        model: The model.

    Returns:
        dict: The layers by name.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: It has no LoRA layer, or is one itself.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {_clean(n): m for n, m in model.named_modules() if isinstance(m, LoRALayer)}
    if not layers:
        raise ValueError("model has no LoRALinear; call fastlora.inject(model, ...) first")
    if "" in layers:
        raise ValueError(f"model is itself a {type(model).__name__}; pass the module that holds it")
    return layers


def peft_keys(name: str, layer: LoRALayer) -> dict[str, str]:
    """Return the names that the parts of a layer's adapter have in PEFT's files.

    Args:
        name: The layer's name.
        layer: The layer.

    Returns:
        dict: The key of each of ``lora_A`` and ``lora_B``.
    """
    return {part: f"{PREFIX}{name}.{layer.peft_names[part]}" for part in PARTS}


def _peft_tensors(layers: Mapping[str, LoRALayer]) -> dict[str, nn.Parameter]:
    return {
        key: getattr(layer, part)
        for name, layer in layers.items()
        for part, key in peft_keys(name, layer).items()
    }


def _aliases(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str]:
    every = model.named_modules(remove_duplicate=False)
    return [
        name
        for name, module in ((_clean(n), m) for n, m in every)
        if isinstance(module, LoRALayer) and name not in layers
    ]


def _clean(name: str) -> str:
    """Drop the levels that torch.compile and checkpoint_wrapper put into module names."""
    for level in _WRAPPER_LEVELS:
        if level in name:
            return ".".join(part for part in name.split(".") if part not in _WRAPPER_LEVELS)
    return name


def _config(model: nn.Module, layers: Mapping[str, LoRALayer]) -> dict[str, Any]:
    # One flag for all: where layers differ, rsLoRA is written out as a plain alpha.
    rslora = all(layer.use_rslora for layer in layers.values())
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: _alpha(layer, rslora) for name, layer in layers.items()}
    # An embedding has no dropout, in PEFT either.
    dropouts = [
        float(cast(float, layer.lora_dropout))
        for layer in layers.values()
        if hasattr(layer, "lora_dropout")
    ] or [0.0]
    r, alpha, dropout = (
        _most_common(list(values)) for values in (ranks.values(), alphas.values(), dropouts)
    )
    if len(set(dropouts)) > 1:
        warnings.warn(
            f"the layers differ in lora_dropout and the format holds one value: {dropout} is saved",
            stacklevel=3,
        )
    hub_name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "alpha_pattern": {_exactly(n): a for n, a in alphas.items() if a != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": hub_name if isinstance(hub_name, str) and hub_name else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {_exactly(n): rank for n, rank in ranks.items() if rank != r},
        "revision": None,
        "target_modules": _targets(model, list(layers)),
        "task_type": None,
        "use_dora": False,
        "use_rslora": rslora,
    }


def _alpha(layer: LoRALayer, rslora: bool) -> float:
    """Return the alpha that gives the layer's scaling, its own lora_alpha where that does."""
    scaling = float(layer.scaling)
    if math.isclose(scaling, lora_scaling(layer.r, layer.lora_alpha, rslora), rel_tol=1e-12):
        return layer.lora_alpha
    return scaling * (math.sqrt(layer.r) if rslora else layer.r)


def _most_common(values: list[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _exactly(name: str) -> str:
    """Return the key of rank_pattern and alpha_pattern, a regular expression, for one module."""
    return f"^{re.escape(name)}"


def _targets(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """Return the shortest target_modules that name these modules of the model and no other."""
    every = [_clean(name) for name, _ in model.named_modules() if name]
    for targets in ({name.rpartition(".")[2] for name in names}, set(names)):
        ends = tuple(f".{target}" for target in targets)
        if {n for n in every if n in targets or n.endswith(ends)} == set(names):
            return sorted(targets)
    return "|".join(re.escape(name) for name in names)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path`` and rename, so that a reader never meets half a file."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {path.parent}")
    return parse_config(path.read_bytes(), str(path))


def laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard ``value`` where the parameter is a DTensor."""
    if not is_dtensor(parameter) or is_dtensor(value):
        return value
    from fastlora.distributed import as_sharded

    return as_sharded(value, parameter)


def check_keys(found: Mapping[str, Tensor], wanted: Iterable[str], where: str) -> None:
    """Raise unless ``found`` holds the tensors that the layers want and no other.

    Args:
        found: The tensors of an adapter.
        wanted: The keys that the layers of a model want.
        where: Where the adapter is from, for the message.

    Raises:
        ValueError: A key is missing, or one is too many.
    """
    wanted = list(wanted)
    if found.keys() == set(wanted):
        return
    missing = [key for key in wanted if key not in found]
    if missing:
        raise ValueError(f"{where} lacks tensors that the model needs: {_listing(missing)}")
    surplus = sorted(set(found) - set(wanted))
    if surplus:
        raise ValueError(
            f"{where} holds tensors that no LoRA layer of the model takes: {_listing(surplus)}"
        )


def check_tensor(key: str, tensor: Tensor, parameter: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` can be copied into ``parameter``, made ``shape`` if it is not.

    Args:
        key: The name of the tensor, for the message.
        tensor: What is to be loaded.
        parameter: Where to.
        shape: The shape that the tensor must have.

    Raises:
        ValueError: The shape is another, the dtype is no float, or the parameter is on ``meta``.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{key} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{key} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{key} must have a floating point dtype, got {tensor.dtype}")
    if parameter.is_meta:
        raise ValueError(f"{key} cannot be loaded: the layer of the model is on the meta device")


def _check_scaling(name: str, layer: LoRALayer, config: Mapping[str, Any]) -> None:
    alpha, rslora = alpha_of(name, config)
    scaling = lora_scaling(layer.r, alpha, rslora)
    if not math.isclose(scaling, float(layer.scaling), rel_tol=1e-6):
        raise ValueError(
            f"{name} has scaling {float(layer.scaling):g} in the model, but the adapter was made "
            f"with {scaling:g} (r={layer.r}, lora_alpha={alpha}, "
            f"use_rslora={rslora}); inject with the same settings"
        )


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
