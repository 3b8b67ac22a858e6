"""What is timed beside fastlora: the frozen floor, plain PyTorch, torch.compile and PEFT."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora
from fastlora.cli.cases import Problem

FLOOR = "floor"


@dataclass(frozen=True)
class Layer:
    """A LoRA linear that is ready to be called: its function of x, and its own A and B."""

    forward: Callable[[Tensor], Tensor]
    lora_A: Tensor
    lora_B: Tensor


@dataclass(frozen=True)
class Provider:
    """One way to compute a LoRA linear."""

    name: str
    label: str
    make: Callable[[Problem, float], Layer]
    same_mask: bool = False
    """Whether its dropout mask is that of `fastlora.reference`."""


def eager_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
) -> Tensor:
    """LoRA as people write it in PyTorch, in the dtype of x."""
    dropped = F.dropout(x, p) if p > 0 else x
    update = F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight, bias) + update * scaling


def _make_fastlora(problem: Problem, p: float) -> Layer:
    weight, lora_A, lora_B = problem.weight, problem.lora_A, problem.lora_B
    scaling = problem.scaling

    def forward(x: Tensor) -> Tensor:
        return fastlora.lora_linear(x, weight, lora_A, lora_B, scaling=scaling, dropout_p=p)

    return Layer(forward, lora_A, lora_B)


def _make_eager(problem: Problem, p: float) -> Layer:
    weight, lora_A, lora_B = problem.weight, problem.lora_A, problem.lora_B
    scaling = problem.scaling

    def forward(x: Tensor) -> Tensor:
        return eager_lora_linear(x, weight, lora_A, lora_B, None, scaling, p)

    return Layer(forward, lora_A, lora_B)


def _make_compile(problem: Problem, p: float) -> Layer:
    torch._dynamo.reset()  # each case is compiled for its own shape, as a training job would be
    layer = _make_eager(problem, p)
    return Layer(torch.compile(layer.forward, dynamic=False), layer.lora_A, layer.lora_B)


def _peft_module(problem: Problem, p: float, adapter_dtype: torch.dtype) -> Any:
    """PEFT's own layer around the problem's weight, with the problem's A and B in it."""
    import peft

    config_class: Any = peft.LoraConfig  # annotates lora_alpha as int and takes a float
    N, K = problem.weight.shape
    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    model = nn.Sequential()
    model.add_module("proj", linear)
    R = problem.lora_A.shape[0]
    config = config_class(
        r=R, lora_alpha=problem.scaling * R, lora_dropout=p, target_modules=["proj"]
    )
    wrapped: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    layer = wrapped.base_model.model.proj
    for name, value in (("lora_A", problem.lora_A), ("lora_B", problem.lora_B)):
        part = getattr(layer, name)["default"]
        part.weight = nn.Parameter(value.detach().to(adapter_dtype, copy=True))
    return layer.train()


def _make_peft(problem: Problem, p: float) -> Layer:
    layer = _peft_module(problem, p, problem.case.dtype)
    return Layer(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)


def _make_peft_default(problem: Problem, p: float) -> Layer:
    layer = _peft_module(problem, p, torch.float32)
    device_type, dtype = problem.device.type, problem.case.dtype

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32):
            y: Tensor = layer(x)
        return y

    return Layer(forward, layer.lora_A["default"].weight, layer.lora_B["default"].weight)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("fastlora", "fastlora", _make_fastlora, same_mask=True),
        Provider("eager", "eager PyTorch", _make_eager),
        Provider("compile", "torch.compile", _make_compile),
        Provider("peft", "PEFT, adapters in x's dtype", _make_peft),
        Provider("peft-default", "PEFT default: fp32, autocast", _make_peft_default),
    )
}


def available(names: tuple[str, ...] | None) -> tuple[list[Provider], list[str]]:
    """The providers of these names (all for None) that can run here, and why others cannot.

    Raises:
        SystemExit: a name is unknown.
    """
    chosen, left_out = [], []
    for name in names or tuple(PROVIDERS):
        if name not in PROVIDERS:
            raise SystemExit(f"unknown provider {name!r}; there are {', '.join(PROVIDERS)}")
        if name.startswith("peft") and importlib.util.find_spec("peft") is None:
            left_out.append(f"{PROVIDERS[name].label}: peft is not installed")
        else:
            chosen.append(PROVIDERS[name])
    return chosen, left_out
