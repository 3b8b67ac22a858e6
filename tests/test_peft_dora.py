"""PEFT's DoRA layers, accelerated: outputs and all gradients are those of PEFT's forward, as in test_peft."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastlora

pytest.importorskip("peft")

import peft_cases as cases
from peft.tuners.lora.layer import Linear as PeftLinear

from fastlora.integrations import peft_layers

pytestmark = pytest.mark.usefixtures("same_masks")

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no base bias": {"base_bias": False},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True, "lora_dropout": 0.1, "base_bias": False},
    "bias=all": {"bias": "all"},
    "conv1d": {"conv1d": True, "lora_dropout": 0.2},
}


def make(**config: Any) -> nn.Module:
    model = cases.make_model(use_dora=True, **config)
    magnitude = cases.lin(model).lora_magnitude_vector["default"].weight
    with torch.no_grad():  # as trained: the norms of the rows, each off by another factor
        magnitude.copy_(torch.rand_like(magnitude) + 0.5)
    return model


@pytest.mark.parametrize("precision", cases.PRECISIONS.values(), ids=cases.PRECISIONS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_grid(config: dict[str, Any], precision: cases.Precision, oracle: ModuleType, device: str):
    model = make(precision=precision, device=device, **config)
    got = cases.compare(model, oracle, precision, device)
    names = {"y", "x", *(f"lora_{k}.default.weight" for k in ("A", "B", "magnitude_vector"))}
    assert got.keys() == names | ({"base_layer.bias"} if "bias" in config else set())
    assert got["lora_magnitude_vector.default.weight"].abs().min() > 0


def test_dropout_is_off_in_eval(oracle: ModuleType, device: str):
    model = make(device=device, lora_dropout=0.5).eval()
    cases.compare(model, oracle, cases.PRECISIONS["fp32"], device)


def test_magnitude_and_adapters_are_read_at_each_call(oracle: ModuleType, device: str):
    model = make(device=device)
    layer, x = cases.lin(model), cases.make_x(cases.PRECISIONS["fp32"], device)
    fastlora.accelerate(model)
    for change in ("lora_magnitude_vector", "lora_A", "lora_B"):
        with torch.no_grad():
            getattr(layer, change)["default"].weight.mul_(1.5)
        with cases.only("fused"):
            got = layer(x)
        torch.testing.assert_close(got, PeftLinear.forward(layer, x), rtol=1e-4, atol=1e-4)


def test_merge_and_unmerge_go_on_working(device: str):
    model = make(device=device).eval()
    layer, x = cases.lin(model), cases.make_x(cases.PRECISIONS["fp32"], device)
    fastlora.accelerate(model)
    expected = layer(x)
    model.merge_adapter()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def offloaded(model: nn.Module) -> None:
    cases.lin(model).ephemeral_gpu_offload = True


def hooked(model: nn.Module) -> None:
    module = cases.lin(model).lora_magnitude_vector["default"]
    module.register_forward_hook(lambda *_: None)


def subclassed(model: nn.Module) -> None:
    vectors = cases.lin(model).lora_magnitude_vector
    kind = type(vectors["default"])
    vectors["default"].__class__ = type("MyDora", (kind,), {})


def with_a_bias(model: nn.Module) -> None:
    b = cases.lin(model).lora_B["default"]
    b.bias = nn.Parameter(torch.rand_like(b.weight[:, 0]))


def beside_another(model: nn.Module) -> None:
    cases.add_adapter(model, "second", r=3)
    model.base_model.set_adapter(["default", "second"])


HANDED_BACK = {
    "offload": (offloaded, "is DoRA with ephemeral_gpu_offload"),
    "hook": (hooked, "the magnitude has hooks"),
    "subclass": (subclassed, "not exactly PEFT's DoraLinearLayer"),
    "bias on lora_B": (with_a_bias, "is DoRA with a bias on lora_B"),
    "beside another": (beside_another, "is DoRA, and not the only one in use"),
}


@pytest.mark.parametrize("case", HANDED_BACK.values(), ids=HANDED_BACK)
def test_handed_back(case: tuple[Any, str], device: str):
    change, reason = case
    model = make(device=device)
    fastlora.accelerate(model)
    change(model)
    layer, x = cases.lin(model), cases.make_x(cases.PRECISIONS["fp32"], device)
    report = fastlora.accelerate(model)
    assert reason in str([m.now for m in report.modules]), str(report)
    with cases.only("PEFT"):
        assert torch.equal(layer(x), PeftLinear.forward(layer, x))
    assert type(layer) is peft_layers.AcceleratedLinear
