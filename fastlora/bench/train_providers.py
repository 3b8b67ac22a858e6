"""One LoRA linear with gradients: fastlora, PyTorch, torch.compile, PEFT and loralib."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora
from fastlora.bench.problems import TrainProblem
from fastlora.bench.registry import (
    Layer,
    TrainProvider,
    accelerate,
    missing,
    no_accelerate,
    register,
)


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


@register
class Fastlora(TrainProvider):
    """The library itself."""

    name, label, same_mask = "fastlora", "fastlora", True

    def make(self, problem: TrainProblem, p: float) -> Layer:
        """`fastlora.lora_linear` as a user calls it."""
        weight, lora_A, lora_B = problem.weight, problem.lora_A, problem.lora_B
        scaling = problem.scaling

        def forward(x: Tensor) -> Tensor:
            return fastlora.lora_linear(x, weight, lora_A, lora_B, scaling=scaling, dropout_p=p)

        return Layer(forward, lora_A, lora_B)


@register
class Eager(TrainProvider):
    """Plain PyTorch."""

    name, label = "eager", "eager PyTorch"

    def make(self, problem: TrainProblem, p: float) -> Layer:
        """The formula in a function."""
        weight, lora_A, lora_B = problem.weight, problem.lora_A, problem.lora_B
        scaling = problem.scaling

        def forward(x: Tensor) -> Tensor:
            return eager_lora_linear(x, weight, lora_A, lora_B, None, scaling, p)

        return Layer(forward, lora_A, lora_B)


class _Compiled(Eager):
    mode: str | None = None
    tags = ("table",)  # compiling takes longer than everything else of a case

    def make(self, problem: TrainProblem, p: float) -> Layer:
        """The eager formula, compiled for this shape alone, as a training job would have it."""
        layer = super().make(problem, p)
        compiled: Any = torch.compile(layer.forward, dynamic=False, mode=self.mode)
        return Layer(compiled, layer.lora_A, layer.lora_B)


@register
class Compile(_Compiled):
    """torch.compile in its default mode."""

    name, label = "compile", "torch.compile"


@register
class CompileMaxAutotune(_Compiled):
    """torch.compile with every matrix product tuned; graphs are what the graph schedule is for."""

    name, label, slow = "compile-max", "torch.compile max-autotune", True
    mode = "max-autotune-no-cudagraphs"


def peft_layer(problem: TrainProblem, p: float, adapter_dtype: torch.dtype) -> Any:
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


@register
class Peft(TrainProvider):
    """PEFT with ``autocast_adapter_dtype=False``."""

    name, label = "peft", "PEFT, adapters in x's dtype"

    def unavailable(self) -> str:
        """PEFT is needed."""
        return missing("peft")

    def make(self, problem: TrainProblem, p: float) -> Layer:
        """PEFT's layer, called as it is."""
        layer = peft_layer(problem, p, problem.dtype)
        return Layer(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)


@register
class PeftDefault(Peft):
    """PEFT as it comes: fp32 adapters, and the autocast that a trainer puts around the model."""

    name, label = "peft-default", "PEFT default: fp32, autocast"
    tags: ClassVar[tuple[str, ...]] = ("table", "fp32-adapters")  # by far the slowest

    def make(self, problem: TrainProblem, p: float) -> Layer:
        """PEFT's layer under autocast."""
        return self._under_autocast(problem, peft_layer(problem, p, torch.float32))

    def _under_autocast(self, problem: TrainProblem, layer: Any) -> Layer:
        device_type, dtype = problem.device.type, problem.dtype

        def forward(x: Tensor) -> Tensor:
            with torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32):
                y: Tensor = layer(x)
            return y

        return Layer(forward, layer.lora_A["default"].weight, layer.lora_B["default"].weight)


@register
class PeftAccelerated(PeftDefault):
    """PEFT's default layer after ``fastlora.accelerate``."""

    name, label = "peft-fastlora", "PEFT default + fastlora.accelerate"
    tags = ()

    def unavailable(self) -> str:
        """PEFT and a fastlora with its integration are needed."""
        return no_accelerate()

    def make(self, problem: TrainProblem, p: float) -> Layer:
        """PEFT's layer with its forward replaced."""
        layer = peft_layer(problem, p, torch.float32)
        accelerate(nn.Sequential(layer), problem.device)
        return self._under_autocast(problem, layer)


@register
class Loralib(TrainProvider):
    """The layer of LoRA's authors."""

    name, label = "loralib", "loralib"
    tags = ("table",)  # its layer is the formula of eager PyTorch

    def unavailable(self) -> str:
        """The package is needed."""
        return missing("loralib")

    def make(self, problem: TrainProblem, p: float) -> Layer:
        """``loralib.Linear``, adapters in the dtype of x."""
        loralib: Any = importlib.import_module("loralib")  # it has no annotations
        (N, K), R = problem.weight.shape, problem.lora_A.shape[0]
        with torch.device("meta"):
            layer: Any = loralib.Linear(
                K, N, r=R, lora_alpha=problem.scaling * R, lora_dropout=p,
                merge_weights=False, bias=False,
            )  # fmt: skip
        layer.weight = nn.Parameter(problem.weight, requires_grad=False)
        for name, value in (("lora_A", problem.lora_A), ("lora_B", problem.lora_B)):
            setattr(layer, name, nn.Parameter(value.detach().to(problem.dtype, copy=True)))
        layer.train()  # which returns nothing there
        return Layer(layer, layer.lora_A, layer.lora_B)
