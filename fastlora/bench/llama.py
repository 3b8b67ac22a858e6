"""A transformers Llama with the layer sizes of a real one, random weights, and adapters for its linears."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.bench.cases import ModelCase
from fastlora.bench.shapes import LLAMA_LINEARS, MODELS

_SPARE = 0.8  # of the free memory, for weights and the neediest provider's activations


@dataclass(frozen=True)
class Llama:
    """A frozen model, and what is put on it."""

    model: Any
    case: ModelCase
    dtype: torch.dtype
    device: torch.device
    scaling: float
    adapter_ids: tuple[int, ...] = ()
    """For generation: the adapter of each prompt."""

    def shared(self) -> Any:
        """A copy of the modules around the very same weights."""
        kept = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(t): t for t in kept})

    def linears(self) -> dict[str, nn.Linear]:
        """The linears that get adapters, by name."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if name.rpartition(".")[2] in LLAMA_LINEARS and isinstance(module, nn.Linear)
        }

    def adapter(self, name: str, index: int = 0) -> tuple[Tensor, Tensor]:
        """lora_A ``[R, K]`` and lora_B ``[N, R]`` of adapter ``index`` on a linear, the same for everyone."""
        (N, K), R = self.linears()[name].weight.shape, self.case.R
        seed = index * 1009 + sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
        draw = torch.Generator(self.device).manual_seed(seed)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            t = torch.empty(rows, columns, dtype=torch.float32, device=self.device)
            return t.normal_(0.0, scale, generator=draw).to(self.dtype)

        # An update somewhat smaller than the layer itself: one that is left out shows in every result.
        return normal(R, K, K**-0.5), normal(N, R, 0.3 * R**-0.5)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_llama(case: ModelCase, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A ``LlamaForCausalLM`` with random weights, frozen.

    The vocabulary is cut in proportion to the layers, so that the output layer keeps its share of the time.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    shape = MODELS[case.model]
    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": max(256, shape.vocab * layers // shape.layers // 128 * 128),
    }
    if case.tiny:
        sizes = {
            "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 128,
        }  # fmt: skip
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, max_position_embeddings=case.length + case.new_tokens,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
        use_cache=case.kind == "generate",
    )  # fmt: skip
    with _default_dtype(dtype), torch.device(device):
        model: Any = LlamaForCausalLM(config)
    model = model.to(device=device, dtype=dtype)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False).train(case.kind != "generate")


def layers_that_fit(case: ModelCase, free_bytes: int) -> int:
    """How many decoder layers fit with the activations of PEFT's default mode; at least 1.

    Per token and layer that mode keeps, beside the frozen model's bf16 activations, the input of each adapter
    and its dropped copy in fp32 and the mask.
    """
    shape = MODELS[case.model]
    weights = 2 * sum(K * N for K, N in shape.linears().values())
    weights += (
        2 * 2 * shape.vocab // shape.layers * shape.hidden
    )  # the embedding's share, and the output's
    inputs = sum(K for K, _ in shape.linears().values())
    outputs = sum(N for _, N in shape.linears().values())
    per_token = inputs * (4 + (4 + 1 if case.p > 0 else 0)) + 2 * (outputs + 4 * shape.hidden)
    logits = 3 * 4 * shape.vocab // shape.layers
    per_layer = weights + case.batch * case.length * (per_token + logits)
    return max(1, min(shape.layers, int(_SPARE * free_bytes) // per_layer))
