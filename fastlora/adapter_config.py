"""The settings of an adapter in PEFT's file format: read, checked to say plain LoRA, looked up by layer."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

PARTS = ("lora_A", "lora_B")
"""An adapter's two factors, as our layers and PEFT's name them."""

# A true value in one of these changes what the adapter computes, or adds tensors beside A and B.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# The other initialisations rewrite the base weight, which the adapter then needs to be right.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def parse_config(data: bytes, path: str) -> dict[str, Any]:
    """Return the configuration that ``adapter_config.json`` holds, if it says plain LoRA.

    Args:
        data: The bytes of the file.
        path: Where they are from, for the message.

    Returns:
        dict: The settings.

    Raises:
        ValueError: It is no JSON object, or asks for something else than plain LoRA.
    """
    try:
        config = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    check_config(config, path)
    return config


def check_config(config: Mapping[str, Any], path: str) -> None:
    """Raise unless a configuration of PEFT's says plain LoRA.

    Args:
        config: What ``adapter_config.json`` holds.
        path: Where it is from, for the message.

    Raises:
        ValueError: It asks for something else; the message names the setting.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be 'LORA', got {config.get('peft_type')!r}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported, only plain LoRA is")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias must be 'none', got {config['bias']!r}")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise ValueError(
            f"{path}: init_lora_weights={init!r} changes the base weights and is not supported"
        )


def alpha_of(name: str, config: Mapping[str, Any]) -> tuple[float, bool]:
    """Return ``lora_alpha`` and ``use_rslora`` of a layer; PEFT's defaults where a file has none.

    Args:
        name: The layer's name.
        config: What ``adapter_config.json`` holds.

    Returns:
        tuple: ``lora_alpha`` and ``use_rslora``.

    Raises:
        ValueError: ``lora_alpha`` is no number, or not finite.
    """
    alpha = pattern_value(config, "alpha_pattern", name, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"lora_alpha of {name} must be a number, got {alpha!r}")
    if isinstance(alpha, float) and not math.isfinite(alpha):
        raise ValueError(f"lora_alpha of {name} gives the scaling {alpha}")
    return alpha, bool(config.get("use_rslora"))


def pattern_value(config: Mapping[str, Any], field: str, name: str, default: Any) -> Any:
    """Look a module up as PEFT does: the first pattern that matches the end of its name wins.

    Args:
        config: What ``adapter_config.json`` holds.
        field: ``"rank_pattern"`` or ``"alpha_pattern"``.
        name: The module's name.
        default: What a module without a pattern has.

    Returns:
        The value for the module.

    Raises:
        ValueError: The field is no object of patterns.
    """
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{field} must be an object of patterns, got {patterns!r}")
    for pattern, value in patterns.items():
        try:
            if _end_pattern(pattern).match(name):
                return value
        except re.error as error:
            raise ValueError(f"{field} holds a bad pattern {pattern!r}: {error}") from error
    return default


@functools.lru_cache(maxsize=8192)  # re's own cache is smaller than a large model's patterns
def _end_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
