"""PEFT's linear with our forward, and the one decision of each call: fused, or PEFT's own code.

Importing this file imports PEFT. Nothing is copied from a layer: PEFT changes its adapters, scalings and
flags at any time, so every call reads them anew, and what is not exactly known goes to PEFT's forward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from fastlora.dispatch import problem_for
from fastlora.dora import dora_linear
from fastlora.functional import autocast_dtype, lora_linear
from fastlora.integrations.peft_adapters import Adapter, add_bias, concatenate, routing_for, stack
from fastlora.multi import lora_linear_multi

PLAIN = (Tensor, nn.Parameter)


class Operands(NamedTuple):
    """What the fused forward of a layer works on: weight ``[N, K]``, bias ``[N]``, adapters by name."""

    weight: Tensor
    bias: Tensor | None
    adapters: dict[str, Adapter]
    mixed: bool
    """Whether rows differ in their adapter; else all rows have the sum of the adapters."""


class AcceleratedLinear(PeftLinear):  # type: ignore[misc]
    """`peft.tuners.lora.layer.Linear` whose forward is one fused pass wherever that is exact.

    `fastlora.accelerate` gives this class to existing layers; it is never constructed. It has no state of
    its own: attributes, parameters, keys and every other method are PEFT's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What PEFT's forward computes, in the same dtype."""
        if not isinstance(self, AcceleratedLinear):  # a forward that was bound before `restore`
            return PeftLinear.forward(self, x, *args, **kwargs)
        names = None
        if args or kwargs:
            names = kwargs.get("adapter_names")
            if args or names is None or len(kwargs) > 1:
                return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        found = operands(self, x, names)
        if isinstance(found, str):
            return super().forward(x, **kwargs)  # type: ignore[no-any-return]
        weight, bias, by_name, mixed = found
        adapters = list(by_name.values())
        if mixed:
            routing = routing_for(names, tuple(by_name), x.shape[:-1], x.device)  # type: ignore[arg-type]
            p = adapters[0].dropout_p
            return lora_linear_multi(x, weight, stack(adapters), routing, bias=bias, dropout_p=p)
        adapter = adapters[0] if len(adapters) == 1 else concatenate(adapters)
        if adapter.magnitude is not None:
            return dora_linear(
                x,
                weight,
                adapter.lora_A,
                adapter.lora_B,
                adapter.magnitude,
                bias=bias,
                scaling=adapter.scaling,
                dropout_p=adapter.dropout_p,
            )
        return lora_linear(
            x,
            weight,
            adapter.lora_A,
            adapter.lora_B,
            bias=add_bias(bias, adapter),
            scaling=adapter.scaling,
            dropout_p=adapter.dropout_p,
        )


def operands(
    layer: PeftLinear, x: Tensor | None = None, names: Sequence[str] | None = None
) -> Operands | str:
    """What a call of ``layer`` on x would be computed from, or why PEFT's own forward must run.

    The only place that decides. It reads attributes and no data, so it never waits for the device.

    Args:
        layer (PeftLinear): a `peft.tuners.lora.layer.Linear`.
        x (Tensor | None): ``(..., K)``; ``None`` asks about the layer alone, for an x like its weight.
        names (Sequence[str] | None): the adapter of each row of the batch, PEFT's ``adapter_names``;
            ``None`` for the active ones.

    Returns:
        Operands | str: the tensors of the fused forward, or the reason against it.
    """
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged into the base weight"
    if not layer.cast_input_dtype_enabled:
        return "PEFT's cast of the input is switched off"
    base = layer._modules["base_layer"]
    problem = _base_problem(base) or caller_problem()
    if problem is not None:
        return problem
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if type(base) is Conv1D:
        weight = weight.t()

    active = layer.active_adapters if names is None else tuple(dict.fromkeys(names))
    adapters: dict[str, Adapter] = {}
    for name in active:
        if name in adapters:
            return f"adapter {name!r} is active twice"
        found = _read_adapter(layer, name)
        if isinstance(found, str):
            return found
        if found is not None:
            adapters[name] = found
    mixed = names is not None and len(active) > 1
    if names is not None and any(a.magnitude is not None for a in adapters.values()):
        return "an adapter of adapter_names is DoRA, which PEFT refuses"
    problem = _combination_problem(adapters, mixed)
    if problem is not None:
        return problem

    if x is None:
        x = weight
    elif not isinstance(x, Tensor):
        return f"x is a {type(x).__name__}"
    elif x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return f"x of shape {tuple(x.shape)} does not fit {weight.shape[1]} in_features"
    if x.dim() == 1 and any(a.magnitude is not None for a in adapters.values()):
        return "x is one row, of which PEFT's DoRA makes a batch"
    if names is not None and (x.dim() < 2 or x.shape[0] != len(names)):
        return f"x of shape {tuple(x.shape)} does not fit {len(names)} adapter_names"
    dtype, index = autocast_dtype(x), x.get_device()
    ranks = [adapter.lora_A.shape[0] for adapter in adapters.values()]
    rank = max(ranks) if mixed else sum(ranks)
    checked: torch.dtype | None = None  # all else that is asked of an adapter is the same for each
    for adapter in adapters.values():
        # Indices compare in a tenth of the time of devices; problem_for looks at the kind of device.
        if weight.get_device() != index or adapter.lora_A.get_device() != index:
            return f"x is on {x.device}, the layer on {weight.device} and {adapter.lora_A.device}"
        if adapter.lora_A.dtype is not checked:
            problem = problem_for(x, weight, adapter.lora_A, adapter.lora_B, dtype=dtype, rank=rank)
            if problem:
                return problem
            checked = adapter.lora_A.dtype
    return Operands(weight, bias, adapters, mixed)


def _combination_problem(adapters: dict[str, Adapter], mixed: bool) -> str | None:
    """Why these adapters cannot be applied together in one pass; None if they can."""
    if not adapters:
        return "no adapter in use is in this layer"
    for name, adapter in adapters.items():
        if adapter.magnitude is None:
            continue
        if mixed or len(adapters) > 1:
            return f"adapter {name!r} is DoRA, and not the only one in use"
        if adapter.bias is not None:
            return f"adapter {name!r} is DoRA with a bias on lora_B"
    if mixed:
        p = next(iter(adapters.values())).dropout_p
        for adapter in adapters.values():
            if adapter.dropout_p != p:
                return "the adapters of a mixed batch differ in dropout"
            if adapter.bias is not None:
                return "an adapter of a mixed batch has a bias on lora_B"
        if torch.compiler.is_compiling():
            return "a mixed batch is not traced by torch.compile"
    elif len(adapters) > 1:
        for adapter in adapters.values():
            if adapter.dropout_p > 0:
                return "several adapters are active with dropout, each with a mask of its own"
    return None


def kind_problem(base: nn.Module) -> str | None:
    """Why a base layer is not of a kind whose arithmetic we know; None if it is."""
    kind = type(base)
    if kind is not nn.Linear and kind is not Conv1D:
        return f"the base layer is {name_of(kind)}, not exactly torch.nn.Linear or Conv1D"
    weight = base._parameters.get("weight")
    if weight is not None and type(weight) not in PLAIN:
        return f"the base weight is {name_of(type(weight))}, a subclass of Tensor"
    return None


def _base_problem(base: nn.Module) -> str | None:
    """Why the weight of a base layer cannot be read past the layer's forward now; None if it can."""
    problem = kind_problem(base)
    if problem is not None:
        return problem
    weight: Any = base._parameters.get("weight")
    bias: Any = base._parameters.get("bias", base)
    if weight is None or bias is base:  # a DataParallel replica, or FSDP's flat parameters
        return "the base weight or bias is not a parameter of the base layer"
    if weight.dim() != 2 or hasattr(weight, "ds_id"):
        return "the base weight is not whole here (partitioned by ZeRO-3 or FSDP)"
    if weight.requires_grad:
        return "the base weight is trained as well (requires_grad=True)"
    if bias is not None and (type(bias) not in PLAIN or bias.dtype != weight.dtype):
        return "the base bias is no plain parameter in the dtype of the base weight"
    return interception(base, "the base layer")


def caller_problem() -> str | None:
    """Why the fused op cannot stand for several modules and ops here; None if it can."""
    if (  # torch's own _has_any_global_hook is newer than torch 2.6
        torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
    ):
        return "hooks on all modules are registered, and inner modules would miss them"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode AD is active"
    return None


def _read_adapter(layer: PeftLinear, name: str) -> Adapter | str | None:
    """The adapter of that name, why only PEFT can apply it, or None where the layer has none."""
    modules = layer._modules
    lora_a = modules["lora_A"]._modules.get(name)
    if lora_a is None:
        return None
    magnitude = _read_magnitude(layer, name)
    if isinstance(magnitude, str):
        return magnitude
    lora_b = modules["lora_B"]._modules[name]
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return f"lora_A or lora_B of {name!r} is not exactly torch.nn.Linear"
    dropout = modules["lora_dropout"]._modules[name]
    if type(dropout) is nn.Dropout:
        # PEFT's DoRA looks at the layer alone first.
        p = dropout.p if dropout.training and (magnitude is None or layer.training) else 0.0
        if dropout.inplace:
            return f"the dropout of {name!r} writes into its input"
    elif type(dropout) is nn.Identity:
        p = 0.0
    else:
        return f"lora_dropout of {name!r} is a {name_of(type(dropout))}"

    a: Any = lora_a._parameters.get("weight")
    b: Any = lora_b._parameters.get("weight")
    bias: Any = lora_b._parameters.get("bias")
    if type(a) not in PLAIN or type(b) not in PLAIN:
        return f"the weights of {name!r} are no plain parameters"
    if a.dim() != 2 or b.dim() != 2 or hasattr(a, "ds_id"):
        return f"the weights of {name!r} are not whole here (partitioned by ZeRO-3 or FSDP)"
    if a.dtype != b.dtype:
        return f"lora_A of {name!r} is {a.dtype} and lora_B {b.dtype}"
    if lora_a._parameters.get("bias") is not None:
        return f"lora_A of {name!r} has a bias"
    if bias is not None and (type(bias) not in PLAIN or bias.dtype != b.dtype):
        return f"the bias of lora_B of {name!r} is no plain parameter in the dtype of its weight"
    scaling = layer.scaling[name]
    problem = (
        scaling_problem(scaling, name)
        or interception(lora_a, "lora_A")
        or interception(lora_b, "lora_B")
        or interception(dropout, "lora_dropout")
    )
    return problem or Adapter(a, b, bias, scaling, p, magnitude)


def _read_magnitude(layer: PeftLinear, name: str) -> Tensor | str | None:
    """The magnitude of a DoRA adapter, why only PEFT can apply this variant, or None for plain LoRA."""
    variant = layer.lora_variant.get(name)
    if variant is None:
        return None
    if type(variant) is not DoraLinearVariant:
        return f"adapter {name!r} is a variant of LoRA, {variant_name(variant)}"
    if layer.ephemeral_gpu_offload:
        return f"adapter {name!r} is DoRA with ephemeral_gpu_offload"
    module = layer._modules["lora_magnitude_vector"]._modules.get(name)
    if type(module) is not DoraLinearLayer:
        return f"the magnitude of {name!r} is not exactly PEFT's DoraLinearLayer"
    magnitude: Any = module._parameters.get("weight")
    if type(magnitude) not in PLAIN or magnitude.dim() != 1 or hasattr(magnitude, "ds_id"):
        return f"the magnitude of {name!r} is no plain, whole parameter"
    if magnitude.get_device() != layer._modules["lora_A"]._modules[name].weight.get_device():
        return f"the magnitude of {name!r} is on {magnitude.device}, lora_A is not"
    return interception(module, "the magnitude") or magnitude


def scaling_problem(scaling: object, name: str) -> str | None:
    """Why this is no constant number, as the scaling of an adapter; None if it is."""
    if isinstance(scaling, bool):
        return f"the scaling of {name!r} is a bool"
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0 or scaling.requires_grad or not scaling.is_floating_point():
            return f"the scaling of {name!r} is a tensor that is not a constant number"
    elif not isinstance(scaling, (int, float)):
        return f"the scaling of {name!r} is a {name_of(type(scaling))}"
    return None


def interception(module: nn.Module, what: str) -> str | None:
    """What a call of this inner module would run beside its own forward; None if nothing."""
    attributes = module.__dict__
    if "_hf_hook" in attributes:
        return f"{what} has a hook of accelerate (offload, or one device of several)"
    if "forward" in attributes:
        return f"the forward of {what} was replaced on the instance"
    if (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    ):
        return f"{what} has hooks"
    return None


def variant_name(variant: object) -> str:
    """``DoraLinearVariant`` and ``DoraEmbeddingVariant`` are both called Dora."""
    return re.sub("(Linear|Embedding)Variant$", "", type(variant).__name__)


def name_of(kind: type) -> str:
    """The class with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"
