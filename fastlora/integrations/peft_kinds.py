"""The kinds of PEFT's layers that have a class of ours, and which layers may get it.

Importing this file imports PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from fastlora.integrations import peft_embedding, peft_layers
from fastlora.integrations.peft_layers import name_of, variant_name


class Kind(NamedTuple):
    """A class of PEFT and ours for it."""

    theirs: type[nn.Module]
    ours: type[nn.Module]
    adapters: str
    """Attribute that holds the adapters by name."""
    variants: tuple[type, ...]
    """The variants of LoRA that ours computes, beside LoRA itself."""
    kind_problem: Callable[[nn.Module], str | None]
    """Why a base layer is not of a kind whose arithmetic we know."""
    operands: Callable[[Any], object]
    """What a call would work on now, or as a str why PEFT's own forward would run."""


KINDS = (
    Kind(
        PeftLinear,
        peft_layers.AcceleratedLinear,
        "lora_A",
        (DoraLinearVariant,),
        peft_layers.kind_problem,
        peft_layers.operands,
    ),
    Kind(
        PeftEmbedding,
        peft_embedding.AcceleratedEmbedding,
        "lora_embedding_A",
        (),
        peft_embedding.kind_problem,
        peft_embedding.operands,
    ),
)


def kind_of(layer: Any) -> Kind | str:
    """Which kind a LoRA layer is, or why it cannot get a class of ours at all, whatever its state.

    What may change while the model lives is no matter of this: ``operands`` decides it at each call.
    """
    for kind in KINDS:
        if isinstance(layer, kind.ours):  # or what FSDP2 derives from it
            return kind
        if type(layer) is kind.theirs:
            return _state_problem(layer, kind) or kind
    known = " or ".join(name_of(kind.theirs) for kind in KINDS)
    return f"it is a {name_of(type(layer))}, not exactly {known}"


def _state_problem(layer: Any, kind: Kind) -> str | None:
    if "_hf_hook" in layer.__dict__ or "forward" in layer.__dict__:
        return "its forward was replaced on the instance (accelerate's hooks do so)"
    variants = {k: v for k, v in layer.lora_variant.items() if type(v) not in kind.variants}
    if variants and all(name in variants for name in getattr(layer, kind.adapters)):
        names = sorted({variant_name(variant) for variant in variants.values()})
        return f"each of its adapters is a variant of LoRA: {', '.join(names)}"
    return kind.kind_problem(layer.base_layer)
