"""Adapters that nobody vouches for: read from files or tensors, checked in full, kept in host memory."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fastlora.adapter_config import PARTS, alpha_of, check_config, parse_config, pattern_value
from fastlora.adapter_io import CONFIG_NAME, WEIGHTS_NAME
from fastlora.modules import FLOAT_DTYPES, lora_scaling

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.(?P<part>lora_[AB])(?:\.weight)?")
_MAX_CONFIG = 1 << 20
_MAX_HEADER = 100_000_000  # what safetensors itself takes
_MAX_PATTERNS = 4096
_MAX_REGEXES = 64
_PLAIN = re.compile(r"[\w.^$\\]*")  # names, which match at once
_VARIANTS = {
    ".base_layer.": "the frozen model, as PEFT saves it without save_embedding_layers=False",
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "an adapter of an embedding",
    "lora_B.bias": "lora_bias",
    "modules_to_save": "a module saved in full",
    "lora_": "a variant of LoRA",
}


@dataclass(frozen=True)
class LayerSlice:
    """One layer of a `HostAdapter`: ``lora_A [r, K]`` and ``lora_B [N, r]`` within its buffer."""

    index: int
    """Position of the layer in the bank."""
    r: int
    in_features: int
    out_features: int
    start: int

    def views(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """The two matrices in ``buffer``, or in a copy of it on another device."""
        middle = self.start + self.r * self.in_features
        end = middle + self.out_features * self.r
        lora_a = buffer[self.start : middle].view(self.r, self.in_features)
        return lora_a, buffer[middle:end].view(self.out_features, self.r)


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """A checked adapter in host memory: all its matrices in one buffer, so that one copy moves it."""

    buffer: Tensor
    slices: tuple[LayerSlice, ...]
    scaling: Tensor
    """fp32, one a layer of the bank; 0 where the adapter has none."""
    ranks: Tensor
    """int32, likewise."""

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        return self.buffer.numel() * self.buffer.element_size()


@dataclass(frozen=True)
class Requirements:
    """What a bank asks of an adapter."""

    layers: Mapping[str, tuple[int, int]]
    """``(out_features, in_features)`` by the layer's name."""
    max_rank: int
    dtype: torch.dtype
    pin_memory: bool

    @property
    def max_bytes(self) -> int:
        """The largest file that could fit: fp64 matrices of ``max_rank`` for every layer."""
        return _MAX_HEADER + sum(8 * self.max_rank * (n + k) for n, k in self.layers.values())


def read_folder(folder: str | os.PathLike[str], needs: Requirements) -> HostAdapter:
    """Read an adapter that PEFT or `fastlora.save_adapter` wrote; safetensors only, never pickle.

    The files are read as bytes and not mapped, so that one that shrinks meanwhile cannot crash the
    process. Nothing that the configuration names is opened.

    Args:
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        needs: What the bank asks.

    Returns:
        HostAdapter: The adapter in the bank's dtype, pinned where the bank asks that.

    Raises:
        FileNotFoundError: One of the two files is not there.
        ValueError: A file cannot be read or asks for what the bank cannot serve; the message names the
            file, and the tensor or setting.
    """
    config_path, weights = Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME
    pickled = weights.with_suffix(".bin")
    if not weights.exists() and pickled.exists():
        raise ValueError(
            f"{pickled} is a pickle, which can run code when it is read; only {WEIGHTS_NAME} is "
            "loaded: save the adapter again with safe_serialization=True"
        )
    config = parse_config(_read_regular(config_path, _MAX_CONFIG), str(config_path))
    config.setdefault("r", 8)  # PEFT's default
    data = _read_regular(weights, needs.max_bytes)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{weights} is no readable safetensors file: {error}") from error
    except KeyError as error:
        raise ValueError(f"{weights} holds a tensor of the unknown dtype {error}") from error
    return from_tensors(tensors, config, needs, str(weights))


def from_tensors(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    needs: Requirements,
    where: str = "the state dict",
) -> HostAdapter:
    """Check the tensors of an adapter against a bank's layers and copy them to host memory.

    Args:
        tensors: ``<layer>.lora_A.weight`` ``(r, in_features)`` and ``<layer>.lora_B.weight``
            ``(out_features, r)``, with or without PEFT's prefix and with or without ``.weight``.
        config: Settings as in ``adapter_config.json``. Without ``r`` the ranks are those of the tensors.
        needs: What the bank asks.
        where: Where they are from, for messages.

    Returns:
        HostAdapter: The adapter.

    Raises:
        TypeError: A value of ``tensors`` is no tensor.
        ValueError: Something does not fit; the message names the tensor or the setting.
    """
    check_config(config, where)
    _check_settings(config, where)
    layers = _by_layer(tensors, needs, where)
    _check_complete(layers, config, needs, where)
    index = {name: i for i, name in enumerate(needs.layers)}
    scaling = torch.zeros(len(index), device="cpu", pin_memory=needs.pin_memory)
    ranks = torch.zeros(len(index), dtype=torch.int32, device="cpu", pin_memory=needs.pin_memory)
    slices: list[LayerSlice] = []
    size = 0
    for name in sorted(layers, key=index.__getitem__):
        N, K = needs.layers[name]
        r = _rank_of(name, layers[name], config, needs, where)
        slices.append(LayerSlice(index[name], r, K, N, size))
        scaling[index[name]] = _scaling_of(name, r, config, where)
        ranks[index[name]] = r
        size += r * (N + K)
    buffer = torch.empty(size, dtype=needs.dtype, device="cpu", pin_memory=needs.pin_memory)
    names = list(needs.layers)
    with torch.no_grad():
        for piece in slices:
            for part, view in zip(PARTS, piece.views(buffer), strict=True):
                view.copy_(layers[names[piece.index]][part][1])
    # Both carry a NaN along, and take a fraction of the time of isfinite.
    if not all(map(math.isfinite, (t.item() for t in torch.aminmax(buffer)))):
        for piece in slices:
            for part, view in zip(PARTS, piece.views(buffer), strict=True):
                if not torch.isfinite(view).all():
                    key = layers[names[piece.index]][part][0]
                    raise ValueError(f"{where}: {key} holds NaN or Inf in {needs.dtype}")
    return HostAdapter(buffer, tuple(slices), scaling, ranks)


def _read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes."""

    def opener(name: str, flags: int) -> int:
        # A FIFO in the file's place must not block.
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        with open(path, "rb", opener=opener) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path} is no regular file")
            if status.st_size > limit:
                raise ValueError(
                    f"{path} has {status.st_size} bytes, more than the {limit} that could fit"
                )
            return file.read(status.st_size + 1)  # one more shows that it has grown since
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path.name} in {path.parent}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check_settings(config: Mapping[str, Any], where: str) -> None:
    for field in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(field) or False, bool):
            raise ValueError(f"{where}: {field} must be true or false, got {config[field]!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{where}: {field} must be an object of patterns, got {patterns!r}")
        if len(patterns) > _MAX_PATTERNS:
            raise ValueError(f"{where}: {field} has {len(patterns)} patterns, {_MAX_PATTERNS} fit")
        if sum(_PLAIN.fullmatch(str(pattern)) is None for pattern in patterns) > _MAX_REGEXES:
            raise ValueError(
                f"{where}: {field} has more than {_MAX_REGEXES} patterns that are more than names"
            )
        for pattern in patterns:
            if not _cheap(pattern):
                raise ValueError(
                    f"{where}: {field} holds the pattern {pattern!r}; a bank takes names, anchors, "
                    "character classes, at most two repetitions, and two groups, none repeated"
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{where}: {field} holds the bad pattern {pattern!r}: {error}"
                ) from error


def _cheap(pattern: object) -> bool:
    """Whether matching cannot take long: a file's regular expression must not hang its reader."""
    if not isinstance(pattern, str) or len(pattern) > 512:
        return False
    bare = re.sub(r"\\.", "_", pattern)  # what is escaped is a literal or a class
    if re.search(r"\)[*+?{]", bare) or "(?" in bare.replace("(?:", "("):
        return False
    return sum(map(bare.count, "*+?{")) - bare.count("(?:") <= 2 and bare.count("(") <= 2


def _by_layer(
    tensors: Mapping[str, Tensor], needs: Requirements, where: str
) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """``(key, tensor)`` by layer and part; both parts are there."""
    layers: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            what = next((v for k, v in _VARIANTS.items() if k in str(key)), None)
            reason = f"belongs to {what}" if what else "is neither a lora_A nor a lora_B"
            raise ValueError(f"{where}: {key!r} {reason}; a bank serves plain LoRA of linears")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: {key} must be a Tensor, got {type(tensor).__name__}")
        if match["layer"] not in needs.layers:
            raise ValueError(f"{where}: {key} is for a layer that the bank was made without")
        parts = layers.setdefault(match["layer"], {})
        if match["part"] in parts:
            raise ValueError(f"{where}: {key} and {parts[match['part']][0]} are the same matrix")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{where}: {key} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
        parts[match["part"]] = (key, tensor)
    for parts in layers.values():
        for part, other in (PARTS, PARTS[::-1]):
            if part not in parts:
                key = parts[other][0]
                raise ValueError(
                    f"{where} lacks {key.replace(other, part)}, the counterpart of {key}"
                )
    if not layers:
        raise ValueError(f"{where} holds no lora_A and lora_B")
    return layers


def _check_complete(
    layers: Iterable[str], config: Mapping[str, Any], needs: Requirements, where: str
) -> None:
    """Raise if a layer that ``target_modules`` lists has no tensors; PEFT writes those of all."""
    targets = config.get("target_modules")
    if not isinstance(targets, (list, tuple, set, frozenset)):
        return  # a regular expression of the file's, or a word such as all-linear
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    ends = tuple(f".{target}" for target in targets)
    names = frozenset(str(target) for target in targets)
    found = set(layers)
    for name in needs.layers:
        if name not in found and (name in names or name.endswith(ends)):
            raise ValueError(
                f"{where} lacks {name}.lora_A.weight: target_modules of its configuration lists it"
            )


def _rank_of(
    name: str,
    parts: Mapping[str, tuple[str, Tensor]],
    config: Mapping[str, Any],
    needs: Requirements,
    where: str,
) -> int:
    """The rank of a layer, after a check of both shapes."""
    (key_a, lora_a), (key_b, lora_b) = parts["lora_A"], parts["lora_B"]
    given = lora_a.shape[0] if lora_a.dim() == 2 else 0
    r = pattern_value(config, "rank_pattern", name, config.get("r", given))
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"{where}: the rank of {name} must be a positive int, got {r!r}")
    N, K = needs.layers[name]
    for key, tensor, shape in ((key_a, lora_a, (r, K)), (key_b, lora_b, (N, r))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{where}: {key} must be {shape}, got {tuple(tensor.shape)}")
    if r > needs.max_rank:
        raise ValueError(f"{where}: {key_a} has rank {r}, the bank holds up to {needs.max_rank}")
    return r


def _scaling_of(name: str, r: int, config: Mapping[str, Any], where: str) -> float:
    try:
        scaling = float(lora_scaling(r, *alpha_of(name, config)))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not math.isfinite(torch.tensor(scaling, device="cpu").item()):  # as the fp32 that it becomes
        raise ValueError(f"{where}: lora_alpha of {name} gives the scaling {scaling}")
    return scaling
