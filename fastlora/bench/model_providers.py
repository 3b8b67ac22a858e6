"""Whole models: fastlora, PEFT in its modes, PEFT compiled, PEFT accelerated; and mixed generation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora.bench.cases import ALPHA
from fastlora.bench.llama import Llama
from fastlora.bench.models import generation
from fastlora.bench.registry import (
    LoraModel,
    ModelProvider,
    accelerate,
    missing,
    no_accelerate,
    register,
)
from fastlora.bench.shapes import LLAMA_LINEARS

_TRAINED: tuple[str, ...] = ("layer", "finetune")


class _ModelProvider(ModelProvider):
    def unavailable(self) -> str:
        """Every model is one of transformers."""
        return missing("transformers")


@register
class FastloraModel(_ModelProvider):
    """`fastlora.inject`."""

    name, label, kinds = "fastlora", "fastlora", _TRAINED
    adapter_dtype: torch.dtype | None = None

    def make(self, llama: Llama, p: float) -> LoraModel:
        """A `fastlora.LoRALinear` for every linear."""
        model = llama.shared()
        fastlora.inject(
            model, LLAMA_LINEARS, r=llama.case.R, lora_alpha=llama.scaling * llama.case.R,
            lora_dropout=p, adapter_dtype=self.adapter_dtype,
        )  # fmt: skip
        adapters = {}
        for name in llama.linears():
            layer = model.get_submodule(name)
            adapters[name] = (layer.lora_A, layer.lora_B)
        _fill(llama, adapters)
        return LoraModel(model, adapters)


@register
class FastloraFp32Model(FastloraModel):
    """The same with fp32 adapters, which is PEFT's default."""

    name, label, adapter_dtype = "fastlora-fp32", "fastlora, fp32 adapters", torch.float32
    kinds = ("layer",)


def _fill(llama: Llama, adapters: dict[str, tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for name, pair in adapters.items():
            for mine, value in zip(pair, llama.adapter(name), strict=True):
                mine.copy_(value)


class _Peft(_ModelProvider):
    kinds = _TRAINED
    fp32_adapters = False

    def unavailable(self) -> str:
        """PEFT is needed."""
        return missing("peft") or super().unavailable()

    def make(self, llama: Llama, p: float) -> LoraModel:
        """``get_peft_model``, under autocast where its adapters are fp32."""
        import peft

        config_class: Any = peft.LoraConfig
        config = config_class(
            r=llama.case.R, lora_alpha=llama.scaling * llama.case.R, lora_dropout=p,
            target_modules=list(LLAMA_LINEARS), task_type="CAUSAL_LM",
        )  # fmt: skip
        model: Any = peft.get_peft_model(
            llama.shared(), config, autocast_adapter_dtype=self.fp32_adapters
        )
        adapters = {}
        for name in llama.linears():
            layer = model.base_model.model.get_submodule(name)
            adapters[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        _fill(llama, adapters)
        self._adapt(model.train())
        if not self.fp32_adapters or llama.dtype == torch.float32:
            return LoraModel(model, adapters)
        kind, dtype = llama.device.type, llama.dtype
        return LoraModel(model, adapters, lambda: torch.autocast(kind, dtype=dtype))

    def _adapt(self, model: nn.Module) -> None:
        """What is done to the model before it is used."""


@register
class PeftModel(_Peft):
    """PEFT with ``autocast_adapter_dtype=False``."""

    name, label = "peft", "PEFT, adapters in bf16"
    kinds = ("layer",)


@register
class PeftDefaultModel(_Peft):
    """PEFT as it comes."""

    name, label, fp32_adapters = "peft-default", "PEFT default: fp32, autocast", True


def _compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer: a whole model compiles for minutes."""
    # Should a layer's own numbers be compiled in, each needs an entry: past the limit it runs eagerly.
    dynamo: Any = importlib.import_module("torch._dynamo")
    name = "recompile_limit" if hasattr(dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(dynamo.config, name, 64)
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            module.compile(dynamic=False)


@register
class PeftCompiledModel(_Peft):
    """PEFT with bf16 adapters, each decoder layer compiled."""

    name, label = "peft-compile", "PEFT, bf16, torch.compile"

    def _adapt(self, model: nn.Module) -> None:
        _compile_layers(model)


class _Accelerated(_Peft):
    def unavailable(self) -> str:
        """A fastlora with its integration is needed."""
        return no_accelerate() or super().unavailable()

    def _adapt(self, model: nn.Module) -> None:
        accelerate(model, next(model.parameters()).device)


@register
class PeftAcceleratedModel(_Accelerated):
    """PEFT with bf16 adapters after ``fastlora.accelerate``."""

    name, label = "peft-fastlora", "PEFT, bf16 + fastlora.accelerate"
    kinds = ("layer",)


@register
class PeftDefaultAcceleratedModel(_Accelerated):
    """PEFT's default mode after ``fastlora.accelerate``."""

    name, label = "peft-default-fastlora", "PEFT default + fastlora.accelerate"
    fp32_adapters = True


@register
class PeftAcceleratedCompiledModel(PeftDefaultAcceleratedModel):
    """PEFT's default mode after ``fastlora.accelerate``, each decoder layer compiled."""

    name = "peft-default-fastlora-compile"
    label = "PEFT default + fastlora.accelerate, torch.compile"

    def _adapt(self, model: nn.Module) -> None:
        super()._adapt(model)
        _compile_layers(model)


class _MultiLinear(nn.Module):
    """A linear with the adapters of all prompts, and the routing that the model's layers share."""

    def __init__(
        self, base: nn.Linear, stack: fastlora.AdapterStack, shared: dict[str, Any]
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.stack, self.shared = base.weight, base.bias, stack, shared

    def forward(self, x: Tensor) -> Tensor:
        return fastlora.lora_linear_multi(
            x, self.weight, self.stack, self.shared["routing"], bias=self.bias
        )


def _stack(llama: Llama, name: str) -> fastlora.AdapterStack:
    pairs = [llama.adapter(name, index) for index in range(llama.case.adapters)]
    lora_A, lora_B = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return fastlora.AdapterStack(lora_A, lora_B, scaling=llama.scaling)


@register
class FastloraGeneration(_ModelProvider):
    """`fastlora.lora_linear_multi` in every linear, rows routed once for each length of step."""

    name, label, kinds = "fastlora-multi", "fastlora, lora_linear_multi", ("generate",)

    def make(self, llama: Llama, p: float) -> Callable[..., Any]:
        """A model whose prompts use ``llama.adapter_ids``."""
        model = llama.shared()
        shared: dict[str, Any] = {}
        for name, base in llama.linears().items():
            parent, _, last = name.rpartition(".")
            layer = _MultiLinear(base, _stack(llama, name), shared)
            setattr(model.get_submodule(parent), last, layer)
        prompts = torch.tensor(llama.adapter_ids, device=llama.device)
        routings: dict[int, fastlora.Routing] = {}

        def route(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            length = kwargs["input_ids"].shape[1]
            if length not in routings:
                ids = prompts.repeat_interleave(length)
                routings[length] = fastlora.route(ids, llama.case.adapters)
            shared["routing"] = routings[length]

        model.model.register_forward_pre_hook(route, with_kwargs=True)
        return generation(llama, model)


@register
class FastloraServe(_ModelProvider):
    """`fastlora.serve` with a bank of slots."""

    name, label, kinds = "fastlora-serve", "fastlora.serve", ("generate",)

    def unavailable(self) -> str:
        """A fastlora with a bank is needed."""
        if not hasattr(fastlora, "serve") or not hasattr(fastlora, "AdapterBank"):
            return "this fastlora has no serve"
        return super().unavailable()

    def make(self, llama: Llama, p: float) -> Callable[..., Any]:
        """Adapters from state dicts, by name for each prompt."""
        library: Any = fastlora
        model = llama.shared()
        bank = library.AdapterBank(
            model, slots=llama.case.adapters, max_rank=llama.case.R,
            target_modules=LLAMA_LINEARS,
        )  # fmt: skip
        for index in range(llama.case.adapters):
            tensors = {}
            for name in llama.linears():
                pair = llama.adapter(name, index)
                for part, t in zip(("lora_A", "lora_B"), pair, strict=True):
                    tensors[f"{name}.{part}"] = t.cpu()
            bank.add(str(index), tensors, config={"lora_alpha": ALPHA, "r": llama.case.R})
        names = [None if index < 0 else str(index) for index in llama.adapter_ids]
        return generation(llama, library.serve(model, bank), adapter_ids=names)


@register
class PeftGeneration(_ModelProvider):
    """PEFT's ``adapter_names``."""

    name, label, kinds = "peft-mixed", "PEFT, adapter_names", ("generate",)

    def unavailable(self) -> str:
        """PEFT is needed."""
        return missing("peft") or super().unavailable()

    def make(self, llama: Llama, p: float) -> Callable[..., Any]:
        """Every adapter added by its name."""
        import peft

        config_class: Any = peft.LoraConfig
        config = config_class(
            r=llama.case.R, lora_alpha=llama.scaling * llama.case.R,
            target_modules=list(LLAMA_LINEARS), task_type="CAUSAL_LM",
        )  # fmt: skip
        model: Any = peft.get_peft_model(
            llama.shared(), config, adapter_name="a0", autocast_adapter_dtype=False
        )
        for index in range(1, llama.case.adapters):
            model.add_adapter(f"a{index}", config, autocast_adapter_dtype=False)
        for index in range(llama.case.adapters):
            adapters = {}
            for name in llama.linears():
                layer = model.base_model.model.get_submodule(name)
                parts = (layer.lora_A[f"a{index}"], layer.lora_B[f"a{index}"])
                adapters[name] = tuple(part.weight for part in parts)
                with torch.no_grad():
                    for mine, value in zip(adapters[name], llama.adapter(name, index), strict=True):
                        mine.copy_(value)
        self._adapt(model.eval())
        names = ["__base__" if index < 0 else f"a{index}" for index in llama.adapter_ids]
        return generation(llama, model, adapter_names=names)

    def _adapt(self, model: nn.Module) -> None:
        """What is done to the model before it is used."""


@register
class PeftAcceleratedGeneration(PeftGeneration):
    """The same after ``fastlora.accelerate``."""

    name, label = "peft-mixed-fastlora", "PEFT, adapter_names + fastlora.accelerate"

    def unavailable(self) -> str:
        """A fastlora with its integration is needed."""
        return no_accelerate() or super().unavailable()

    def _adapt(self, model: nn.Module) -> None:
        accelerate(model, next(model.parameters()).device)
