"""One linear whose rows use different adapters: fastlora, a loop, a gather with bmm, and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora
from fastlora.bench.problems import ServeProblem, ServeSet
from fastlora.bench.registry import ServeProvider, accelerate, missing, no_accelerate, register


def _stack(problem: ServeProblem, inputs: ServeSet) -> fastlora.AdapterStack:
    return fastlora.AdapterStack(
        inputs.lora_A, inputs.lora_B, scaling=problem.scaling, ranks=problem.ranks
    )


@register
class FastloraMulti(ServeProvider):
    """`fastlora.lora_linear_multi` with the routing that the layers of a step share."""

    name, label, same_mask = "fastlora", "fastlora", True

    def make(self, problem: ServeProblem) -> Callable[[ServeSet], Tensor]:
        """Rows are routed here, once."""
        routing, p = problem.routing, problem.case.p

        def forward(inputs: ServeSet) -> Tensor:
            return fastlora.lora_linear_multi(
                inputs.x, inputs.weight, _stack(problem, inputs), routing, dropout_p=p
            )

        return forward


@register
class FastloraRouted(ServeProvider):
    """The same with the rows routed at every call: what the first layer of a step costs."""

    name, label, same_mask = "fastlora-routed", "fastlora, routing included", True

    def make(self, problem: ServeProblem) -> Callable[[ServeSet], Tensor]:
        """Ids as they are."""
        ids, p = problem.ids, problem.case.p

        def forward(inputs: ServeSet) -> Tensor:
            return fastlora.lora_linear_multi(
                inputs.x, inputs.weight, _stack(problem, inputs), ids, dropout_p=p
            )

        return forward


@register
class Loop(ServeProvider):
    """One adapter after the other on its rows, which is PEFT's way, with indices kept on the device."""

    name, label = "loop", "eager loop over adapters"

    def make(self, problem: ServeProblem) -> Callable[[ServeSet], Tensor]:
        """Base once, then two small products an adapter."""
        rows_of, scaling, p = problem.rows_of, problem.scaling, problem.case.p

        def forward(inputs: ServeSet) -> Tensor:
            y = F.linear(inputs.x, inputs.weight)
            dropped = F.dropout(inputs.x, p) if p > 0 else inputs.x
            lora_A: Any = inputs.lora_A
            lora_B: Any = inputs.lora_B
            if problem.case.train:  # one gradient for the stack, not one as large for every slice
                lora_A, lora_B = lora_A.unbind(0), lora_B.unbind(0)
            for slot, rows in rows_of.items():
                s = F.linear(dropped[rows], lora_A[slot])
                y.index_add_(0, rows, F.linear(s, lora_B[slot]), alpha=scaling)
            return y

        return forward


@register
class BmmGather(ServeProvider):
    """Every row's own A and B copied together, then batched products: Punica's baseline."""

    name, label, trains = "bmm", "gather + bmm", False

    def make(self, problem: ServeProblem) -> Callable[[ServeSet], Tensor]:
        """Rows without an adapter take slot 0 with a factor of 0."""
        ids, scaling = problem.ids.clamp_min(0), problem.scaling
        factor = (problem.ids >= 0).to(problem.dtype)[:, None] * scaling

        def forward(inputs: ServeSet) -> Tensor:
            s = torch.bmm(inputs.lora_A[ids], inputs.x[:, :, None])  # [M, R, 1]
            update = torch.bmm(inputs.lora_B[ids], s).squeeze(2)  # [M, N]
            return F.linear(inputs.x, inputs.weight) + update * factor

        return forward


@register
class PeftMixed(ServeProvider):
    """PEFT's layer with ``adapter_names``, adapters in x's dtype."""

    name, label, trains = "peft-mixed", "PEFT, adapter_names", False
    graphable = False  # it copies lists of rows to the device at every call

    def unavailable(self) -> str:
        """PEFT is needed."""
        return missing("peft")

    def make(self, problem: ServeProblem) -> Callable[[ServeSet], Tensor]:
        """A layer of PEFT for every set, with the live adapters in it."""
        layers = {id(inputs): self._layer(problem, inputs) for inputs in problem.sets}
        names = [f"a{slot}" if slot >= 0 else "__base__" for slot in problem.ids_list]

        def forward(inputs: ServeSet) -> Tensor:
            y: Tensor = layers[id(inputs)](inputs.x, adapter_names=names)
            return y

        return forward

    def _layer(self, problem: ServeProblem, inputs: ServeSet) -> Any:
        import peft

        config_class: Any = peft.LoraConfig
        N, K = inputs.weight.shape
        R = inputs.lora_A.shape[1]
        linear = nn.Linear(K, N, bias=False, device="meta")
        linear.weight = nn.Parameter(inputs.weight, requires_grad=False)
        model = nn.Sequential()
        model.add_module("proj", linear)
        live = sorted({slot for slot in problem.ids_list if slot >= 0}) or [0]
        config = config_class(r=R, lora_alpha=problem.scaling * R, target_modules=["proj"])
        wrapped: Any = peft.get_peft_model(
            model, config, adapter_name=f"a{live[0]}", autocast_adapter_dtype=False
        )
        for slot in live[1:]:
            wrapped.add_adapter(f"a{slot}", config, autocast_adapter_dtype=False)
        layer = wrapped.base_model.model.proj
        for slot in live:
            for part, stack in ((layer.lora_A, inputs.lora_A), (layer.lora_B, inputs.lora_B)):
                part[f"a{slot}"].weight = nn.Parameter(stack[slot].detach(), requires_grad=False)
        self._adapt(wrapped)
        return layer.eval()

    def _adapt(self, model: nn.Module) -> None:
        """What is done to the model before it is used."""


@register
class PeftMixedAccelerated(PeftMixed):
    """The same after ``fastlora.accelerate``."""

    name, label = "peft-mixed-fastlora", "PEFT, adapter_names + fastlora.accelerate"

    def unavailable(self) -> str:
        """PEFT and a fastlora with its integration are needed."""
        return no_accelerate()

    def _adapt(self, model: nn.Module) -> None:
        accelerate(model, next(model.parameters()).device)
