"""What is timed of a transformers Llama: a training step, or generation with mixed adapters.

Every provider gets a copy of the model that shares the frozen weights, so that all of them fit beside each
other and take turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora.bench.cases import ALPHA, ModelCase
from fastlora.bench.clock import Call
from fastlora.bench.llama import Llama, build_llama, layers_that_fit
from fastlora.bench.registry import FLOOR, LoraModel, ModelProvider, Provider
from fastlora.bench.workloads import FORWARD, GENERATE, STEP, Contender, Workload, relative_errors

CHECKED_LAYERS = 2
"""Layers of the twin on which providers are checked, against fp32 with the adapters merged."""


class ModelWorkload(Workload):
    """A decoder layer or a model: forward and a training step; or generation with mixed adapters."""

    def __init__(self, case: ModelCase, device: torch.device, seed: int = 0) -> None:
        """Build the frozen model."""
        self.case, self.device, self.seed = case, device, seed
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(seed)
        layers = case.layers
        if not layers:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            layers = layers_that_fit(case, free)
        self.layers = layers
        self.llama = self._llama(case, layers)
        generator = torch.Generator(device).manual_seed(seed)
        vocab = self.llama.model.config.vocab_size
        shape = (2, case.batch, case.length)
        self.ids = torch.randint(1, vocab, shape, generator=generator, device=device)
        self.sets = 2
        # bf16 rounds after every operation, the reference after none; an adapter left out is an error of 1.
        self.tolerance = 1e-3 if self.dtype == torch.float32 else 1e-1
        self._twin: Llama | None = None
        self._wanted: dict[str, Tensor] | None = None

    def _llama(self, case: ModelCase, layers: int) -> Llama:
        rows = tuple(i % case.adapters for i in range(case.batch))
        if case.kind == "generate" and case.adapters > 1:
            rows = (*rows[:-1], -1)  # the last prompt uses the frozen model
        model = build_llama(case, layers, self.device, self.dtype)
        return Llama(model, case, self.dtype, self.device, ALPHA / case.R, rows)

    def facts(self) -> dict[str, Any]:
        """What the machine decided."""
        return {"layers": self.layers, "vocab": self.llama.model.config.vocab_size}

    def floors(self) -> list[Contender]:
        """The frozen model: its loss, and the gradient of its input; or its generation."""
        model, ids = self.llama.model, self.ids
        if self.case.kind == "generate":
            run = generation(self.llama, model)
            return [Contender(FLOOR, "frozen model alone", {GENERATE: lambda i: run(ids[i % 2])})]

        def loss(i: int) -> tuple[Tensor, Tensor]:
            embedded = model.get_input_embeddings()(ids[i % 2]).requires_grad_()
            return model(inputs_embeds=embedded, labels=ids[i % 2], use_cache=False).loss, embedded

        def step(i: int) -> object:
            value, embedded = loss(i)
            return torch.autograd.grad(value, embedded)

        calls: dict[str, Call] = {FORWARD: lambda i: loss(i)[0], STEP: step}
        return [Contender(FLOOR, "frozen model alone", calls)]

    def contender(self, provider: Provider) -> Contender:
        """Checked on a twin of two layers of the same sizes."""
        assert isinstance(provider, ModelProvider)
        if self._twin is None:
            torch.manual_seed(self.seed + 1)
            layers = min(CHECKED_LAYERS, self.layers)
            self._twin = self._llama(replace(self.case, p=0.0), layers)
        twin, ids = self._twin, self.ids[0] % self._twin.model.config.vocab_size
        if self._wanted is None:
            reference = _merged_generation if self.case.kind == "generate" else _merged_training
            self._wanted = reference(twin, ids)
        made = provider.make(twin, 0.0)
        if self.case.kind == "generate":
            errors = relative_errors({"logits": made(ids, logits=True)}, self._wanted)
        else:
            errors = _training_errors(twin, made, ids, self._wanted)
        self.check(errors)
        del made
        calls = self._calls(provider.make(self.llama, self.case.p))
        return Contender(provider.name, provider.label, calls, False, errors)

    def _calls(self, made: Any) -> dict[str, Call]:
        ids = self.ids
        if self.case.kind == "generate":
            return {GENERATE: lambda i: made(ids[i % 2])}
        lora: LoraModel = made
        parameters = [t for pair in lora.adapters.values() for t in pair]
        options: dict[str, Any] = {"fused": True} if self.device.type == "cuda" else {}
        optimizer: Any = torch.optim.AdamW(parameters, lr=1e-5, **options)

        def loss(i: int) -> Tensor:
            with lora.context():
                value: Tensor = lora.model(input_ids=ids[i % 2], labels=ids[i % 2]).loss
            return value

        def step(i: int) -> None:
            loss(i).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        return {FORWARD: loss, STEP: step}


def generation(llama: Llama, model: Any, **extra: Any) -> Callable[..., Any]:
    """A function of prompts: greedy generation, or with ``logits=True`` those after the prompt."""
    new = llama.case.new_tokens

    def run(ids: Tensor, logits: bool = False) -> Any:
        with torch.inference_mode():
            if logits:
                return model(input_ids=ids, use_cache=False, **extra).logits[:, -1]
            return model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                min_new_tokens=new, max_new_tokens=new, **extra,
            )  # fmt: skip

    return run


def _merged(llama: Llama, index: int) -> Any:
    """The model in fp32 with adapter ``index`` added to its weights."""
    model = copy.deepcopy(llama.model).float()
    for name in llama.linears() if index >= 0 else ():
        lora_A, lora_B = llama.adapter(name, index)
        delta = lora_B.float() @ lora_A.float() * llama.scaling
        model.get_submodule(name).weight.data += delta
    return model


def _merged_training(llama: Llama, ids: Tensor) -> dict[str, Tensor]:
    """Loss and gradients from a merged weight's: ``dA = scaling B^T dW``, ``dB = scaling dW A^T``."""
    model = _merged(llama, 0)
    for name in llama.linears():
        model.get_submodule(name).weight.requires_grad_()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    wanted = {"loss": loss.detach().float().reshape(1)}
    for name in llama.linears():
        lora_A, lora_B = (t.float() for t in llama.adapter(name))
        grad = model.get_submodule(name).weight.grad
        wanted[f"{name}.dA"] = llama.scaling * lora_B.t() @ grad
        wanted[f"{name}.dB"] = llama.scaling * grad @ lora_A.t()
    return wanted


def _merged_generation(llama: Llama, ids: Tensor) -> dict[str, Tensor]:
    """Logits after each prompt, from a merged model for each adapter that occurs."""
    rows: dict[int, Tensor] = {}
    with torch.inference_mode():
        for index in sorted(set(llama.adapter_ids)):
            mine = [row for row, found in enumerate(llama.adapter_ids) if found == index]
            model = _merged(llama, index)
            logits = model(input_ids=ids[mine], use_cache=False).logits[:, -1]
            rows.update(zip(mine, logits, strict=True))
    return {"logits": torch.stack([rows[row] for row in range(len(ids))])}


def _training_errors(
    llama: Llama, made: LoraModel, ids: Tensor, wanted: dict[str, Tensor]
) -> dict[str, float]:
    """Errors of the loss and of the worst adapter gradient of each kind."""
    with made.context():
        loss = made.model(input_ids=ids, labels=ids).loss
    tensors = [t for name in llama.linears() for t in made.adapters[name]]
    grads = torch.autograd.grad(loss, tensors)
    got = {"loss": loss.detach().reshape(1)}
    for i, name in enumerate(llama.linears()):
        got[f"{name}.dA"], got[f"{name}.dB"] = grads[2 * i], grads[2 * i + 1]
    errors = relative_errors(got, wanted)
    worst = {"loss": errors["loss"]}
    for kind in ("dA", "dB"):
        found = [error for name, error in errors.items() if name.endswith(f".{kind}")]
        worst[kind] = float("nan") if any(e != e for e in found) else max(found)
    return worst
