"""PEFT's embedding with our forward, decided at each call as `peft_layers` does for its linear.

Importing this file imports PEFT.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from torch import Tensor, nn

from fastlora.dispatch import embedding_problem_for
from fastlora.embedding import lora_embedding
from fastlora.integrations.peft_layers import (
    PLAIN,
    caller_problem,
    interception,
    name_of,
    scaling_problem,
    variant_name,
)

_IDS = (torch.int32, torch.int64)


class EmbeddingOperands(NamedTuple):
    """What the fused forward of an embedding works on: the table ``[V, N]`` and one adapter."""

    base: nn.Embedding
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor


class AcceleratedEmbedding(PeftEmbedding):  # type: ignore[misc]
    """`peft.tuners.lora.layer.Embedding` whose forward is one fused gather wherever that is exact.

    `fastlora.accelerate` gives this class to existing layers; it is never constructed. It has no state of
    its own: attributes, parameters, keys and every other method are PEFT's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What PEFT's forward computes, in the same dtype."""
        if not isinstance(self, AcceleratedEmbedding):  # a forward that was bound before `restore`
            return PeftEmbedding.forward(self, x, *args, **kwargs)
        if args or kwargs:  # adapter_names of a mixed batch among them
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        found = operands(self, x)
        if isinstance(found, str):
            return super().forward(x)  # type: ignore[no-any-return]
        base = found.base
        return lora_embedding(
            x,
            found.weight,
            found.lora_A,
            found.lora_B,
            scaling=found.scaling,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )


def operands(layer: PeftEmbedding, x: Tensor | None = None) -> EmbeddingOperands | str:
    """What a call of ``layer`` on x would be computed from, or why PEFT's own forward must run.

    It reads attributes and no data, so it never waits for the device. PEFT's embedding has no dropout,
    whatever ``lora_dropout`` says, and casts nothing but its result.

    Args:
        layer (PeftEmbedding): a `peft.tuners.lora.layer.Embedding`.
        x (Tensor | None): ids of any shape; ``None`` asks about the layer alone.

    Returns:
        EmbeddingOperands | str: the tensors of the fused forward, or the reason against it.
    """
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged into the base weight"
    base = layer._modules["base_layer"]
    problem = _base_problem(base) or caller_problem()
    if problem is not None:
        return problem
    if torch.compiler.is_compiling():
        return "an embedding is not traced by torch.compile"

    names = [name for name in layer.active_adapters if name in layer.lora_embedding_A]
    if not names:
        return "no adapter in use is in this layer"
    if len(names) > 1:
        return "several adapters of an embedding are active"
    found = _read_adapter(layer, base, names[0])
    if isinstance(found, str):
        return found
    index = found.weight.get_device()
    if found.lora_A.get_device() != index or found.lora_B.get_device() != index:
        return f"the base weight is on {found.weight.device}, lora_A on {found.lora_A.device}"
    if x is not None:
        if not isinstance(x, Tensor) or x.dtype not in _IDS:
            return "the ids are no int32 or int64 tensor"
        if x.get_device() != index or x.is_meta != found.weight.is_meta:
            return f"the ids are on {x.device}, the layer on {found.weight.device}"
    return embedding_problem_for(x, found.weight, found.lora_A, found.lora_B) or found


def kind_problem(base: nn.Module) -> str | None:
    """Why a base layer is not of a kind whose arithmetic we know; None if it is."""
    if type(base) is not nn.Embedding:
        return f"the base layer is {name_of(type(base))}, not exactly torch.nn.Embedding"
    weight = base._parameters.get("weight")
    if weight is not None and type(weight) not in PLAIN:
        return f"the base weight is {name_of(type(weight))}, a subclass of Tensor"
    return None


def _base_problem(base: Any) -> str | None:
    """Why the table of a base layer cannot be read past the layer's forward now; None if it can."""
    problem = kind_problem(base)
    if problem is not None:
        return problem
    weight = base._parameters.get("weight")
    if weight is None:
        return "the base weight is not a parameter of the base layer"
    if weight.dim() != 2 or hasattr(weight, "ds_id"):
        return "the base weight is not whole here (partitioned by ZeRO-3 or FSDP)"
    if weight.requires_grad:
        return "the base weight is trained as well (requires_grad=True)"
    if hasattr(base, "embed_scale"):
        return "the base layer has an embed_scale, which PEFT applies to the adapter"
    if base.sparse:
        return "the base layer is sparse, with which PEFT's forward has no backward"
    return interception(base, "the base layer")


def _read_adapter(layer: PeftEmbedding, base: Any, name: str) -> EmbeddingOperands | str:
    """The adapter of that name beside the table of base, or why only PEFT can apply it."""
    variant = layer.lora_variant.get(name)
    if variant is not None:
        return f"adapter {name!r} is a variant of LoRA, {variant_name(variant)}"
    for functions in ("input_fns", "output_fns"):  # PEFT 0.18 has none
        if layer.__dict__.get(functions, {}).get(name) is not None:
            return f"adapter {name!r} is split by tensor parallelism"
    a: Any = layer._modules["lora_embedding_A"]._parameters.get(name)
    b: Any = layer._modules["lora_embedding_B"]._parameters.get(name)
    if type(a) not in PLAIN or type(b) not in PLAIN:
        return f"the weights of {name!r} are no plain parameters"
    weight = base._parameters["weight"]
    (V, N), R = weight.shape, a.shape[0] if a.dim() else 0
    if a.shape != (R, V) or b.shape != (N, R) or hasattr(a, "ds_id"):
        return f"the weights of {name!r} do not fit the base weight (resized, or partitioned)"
    if a.dtype != b.dtype:
        return f"lora_A of {name!r} is {a.dtype} and lora_B {b.dtype}"
    scaling = layer.scaling[name]
    return scaling_problem(scaling, name) or EmbeddingOperands(base, weight, a, b, scaling)
