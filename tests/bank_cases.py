"""Adapters on disk and in a bank, and what a slot and a row must then hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastlora
from fastlora import AdapterBank

LAYERS = {"0.q": (6, 8), "0.v": (4, 8), "1.q": (6, 8)}
MAX_RANK = 4


def tensors_of(seed, layers=("0.q", "0.v")):
    """An adapter: its tensors as PEFT names them, its configuration, and what each layer must compute."""
    generator = torch.Generator().manual_seed(seed)
    r, other = 1 + seed % MAX_RANK, 1 + seed // 3 % MAX_RANK
    tensors, truth = {}, {}
    for i, name in enumerate(layers):
        (N, K), rank = LAYERS[name], other if i else r
        lora_A = torch.randn(rank, K, generator=generator)
        lora_B = torch.randn(N, rank, generator=generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_B
        truth[name] = (6 / rank, lora_A, lora_B)
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 6,
        "target_modules": list(layers),
        "rank_pattern": dict.fromkeys(layers[1:], other),
    }
    return tensors, config, truth


def write(folder: Path, seed, **options):
    tensors, config, truth = tensors_of(seed, **options)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return truth


def bank_of(count, slots=2, layers=LAYERS, **options):
    bank = AdapterBank(layers, slots, MAX_RANK, **options)
    truths = {}
    for seed in range(count):
        tensors, config, truths[f"a{seed}"] = tensors_of(seed)
        bank.add(f"a{seed}", tensors, config=config)
    return bank, truths


def check_slot(bank, slot, truth, factor=1.0):
    """The slot holds exactly the adapter, in every layer."""
    for name in LAYERS:
        stack = bank.layer(name)
        if name not in truth:
            assert int(stack.ranks[slot]) == 0
            continue
        scaling, lora_A, lora_B = truth[name]
        r = len(lora_A)
        assert int(stack.ranks[slot]) == r
        assert torch.equal(stack.lora_A[slot, :r], lora_A)
        assert torch.equal(stack.lora_B[slot, :, :r], lora_B)
        assert float(stack.scaling[slot]) == pytest.approx(scaling * factor, rel=1e-6)


def check_rows(bank, names, ids, truths):
    """The mixed linear gives each row the product of its own adapter."""
    for layer, (N, K) in LAYERS.items():
        x, weight = torch.randn(len(names), K), torch.randn(N, K)
        with fastlora.dispatch.force("eager"):
            y = fastlora.lora_linear_multi(x, weight, bank.layer(layer), ids)
        expected = x @ weight.t()
        for row, name in enumerate(names):
            if name is not None and layer in truths[name]:
                scaling, lora_A, lora_B = truths[name][layer]
                expected[row] += scaling * (x[row] @ lora_A.t() @ lora_B.t())
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def all_free(bank, names):
    """Nothing is held or lost: every slot can be taken, and then holds what it should."""
    names = list(names)[: bank.slots]
    assert len(names) == bank.slots
    slots = bank.acquire(names)
    assert sorted(slots) == list(range(bank.slots))
    bank.release(names)
    return dict(zip(names, slots, strict=True))
