"""`fastlora.accelerate` at the level of one layer: outputs and all gradients are those of PEFT's forward.

Both sides work on the same parameters and, by the fixture `same_masks`, on the same dropout mask. Where
the fused forward should run, PEFT's is made to fail, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora

pytest.importorskip("peft")

import peft_cases as cases
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.layer import Linear as PeftLinear

from fastlora.integrations import peft_layers

pytestmark = pytest.mark.usefixtures("same_masks")

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no base bias": {"base_bias": False},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True, "lora_dropout": 0.1},
    "patterns": {"rank_pattern": {"lin": 3}, "alpha_pattern": {"lin": 7}},
    "lora_bias": {"lora_bias": True, "lora_dropout": 0.1},
    "lora_bias, no base bias": {"lora_bias": True, "base_bias": False},
    "bias=all": {"bias": "all"},
    "bias=lora_only, lora_bias": {"bias": "lora_only", "lora_bias": True},
    "conv1d": {"conv1d": True, "lora_dropout": 0.2, "bias": "all"},
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("precision", cases.PRECISIONS.values(), ids=cases.PRECISIONS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_grid(config: dict[str, Any], precision: cases.Precision, oracle: ModuleType, device: str):
    model = cases.make_model(precision, device=device, **config)
    got = cases.compare(model, oracle, precision, device)
    expected = {"y", "x", "lora_A.default.weight", "lora_B.default.weight"}
    if config.get("lora_bias"):
        expected.add("lora_B.default.bias")
    if "bias" in config:
        expected.add("base_layer.bias")
    assert got.keys() == expected


def test_fp16_base(oracle: ModuleType, device: str):
    cases.compare(
        cases.make_model(cases.Precision(fp16), device=device),
        oracle,
        cases.Precision(fp16),
        device,
    )


def test_bf16_x_under_autocast_with_a_fp32_base(oracle: ModuleType, device: str):
    precision = cases.Precision(fp32, autocast=bf16, x=bf16)
    cases.compare(cases.make_model(precision, device=device), oracle, precision, device)


@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 1, 4)])
def test_leading_shapes(rows: tuple[int, ...], oracle: ModuleType, device: str):
    precision = cases.PRECISIONS["fp32"]
    x = cases.make_x(precision, device, rows)
    cases.compare(cases.make_model(device=device, lora_dropout=0.1), oracle, precision, device, x)


def test_strided_x(oracle: ModuleType, device: str):
    x = torch.randn(cases.IN, 7, device=device).t()
    cases.compare(cases.make_model(device=device), oracle, cases.PRECISIONS["fp32"], device, x)


def test_dropout_is_off_in_eval(oracle: ModuleType, device: str):
    model = cases.make_model(device=device, lora_dropout=0.5).eval()
    cases.compare(model, oracle, cases.PRECISIONS["fp32"], device)


def test_frozen_adapter_still_passes_a_gradient_to_x(oracle: ModuleType, device: str):
    model = cases.make_model(device=device, inference_mode=True)
    assert cases.compare(model, oracle, cases.PRECISIONS["fp32"], device).keys() == {"y", "x"}


def test_dropout_differs_from_call_to_call_and_follows_the_seed(device: str):
    model = cases.make_model(device=device, lora_dropout=0.5)
    fastlora.accelerate(model)
    x = cases.make_x(cases.PRECISIONS["fp32"], device)
    torch.manual_seed(1)
    first, second = cases.lin(model)(x), cases.lin(model)(x)
    torch.manual_seed(1)
    assert torch.equal(cases.lin(model)(x), first)
    assert not torch.equal(second, first)


def saved_bytes(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> int:
    """Bytes that one forward keeps for its backward, parameters left out."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(x)
    assert y.requires_grad
    return sum(kept.values())


def test_saves_less_for_the_backward_than_peft(device: str):
    """x, s and a bit an element of x, and for that x PEFT keeps its fp32 copy after dropout and the mask."""
    precision = cases.PRECISIONS["bf16, fp32 adapters"]
    model = cases.make_model(precision, device=device, lora_dropout=0.1)
    layer, x = cases.lin(model), cases.make_x(precision, device, (256,)).requires_grad_()
    slow = saved_bytes(cases.peft_forward(layer), layer, x)
    fastlora.accelerate(model)
    fast = saved_bytes(layer, layer, x)
    s_row = 16  # r=6 in bf16, padded to 16 bytes
    assert fast == 256 * (2 * cases.IN + s_row + cases.IN // 8)
    assert slow >= 256 * (4 * cases.IN + cases.IN)


# Several adapters


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("precision", cases.PRECISIONS.values(), ids=cases.PRECISIONS)
def test_several_active_adapters_are_one_product(
    precision: cases.Precision, oracle: ModuleType, device: str
):
    model = cases.make_model(precision, device=device)
    cases.add_adapter(model, "wide", r=11, lora_alpha=3, lora_bias=True)
    cases.add_adapter(model, "rs", r=2, lora_alpha=5, use_rslora=True)
    if not precision.adapters_fp32:
        cases.lin(model).to(bf16)  # PEFT 0.19 on casts a new adapter to fp32
    model.base_model.set_adapter(["default", "wide", "rs"])
    got = cases.compare(model, oracle, precision, device)
    assert sum("lora_" in name for name in got) == 7


def test_several_active_adapters_of_two_dtypes(oracle: ModuleType, device: str):
    """PEFT 0.18 leaves an adapter that is added later in the dtype of a bf16 base."""
    precision = cases.PRECISIONS["bf16, fp32 adapters"]
    model = cases.make_model(precision, device=device)
    cases.add_adapter(model, "later", r=5)
    cases.lin(model).lora_A["later"].to(bf16)
    cases.lin(model).lora_B["later"].to(bf16)
    model.base_model.set_adapter(["later", "default"])
    cases.compare(model, oracle, precision, device)


def test_scalings_as_tensors(oracle: ModuleType, device: str):
    """What `prepare_model_for_compiled_hotswap` makes of them."""
    model = cases.make_model(device=device, lora_dropout=0.1)
    cases.lin(model).scaling["default"] = torch.tensor(1.7, device=device)
    cases.compare(model, oracle, cases.PRECISIONS["fp32"], device)
    cases.lin(model).scaling["default"] = torch.tensor(0.3)  # PEFT takes one on the CPU too
    cases.compare(model, oracle, cases.PRECISIONS["fp32"], device)
    model = cases.make_model(device=device)
    cases.add_adapter(model, "other", r=3)
    cases.lin(model).scaling["default"] = torch.tensor(1.7, device=device)
    model.base_model.set_adapter(["default", "other"])
    cases.compare(model, oracle, cases.PRECISIONS["fp32"], device)


def test_scale_is_read_at_each_call(oracle: ModuleType, device: str):
    precision = cases.PRECISIONS["fp32"]
    model = cases.make_model(device=device)
    fastlora.accelerate(model)
    for change in (
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.unscale_layer(),
    ):
        change(cases.lin(model))
        cases.compare(model, oracle, precision, device)
    x = cases.make_x(precision, device)
    whole = cases.lin(model)(x)
    with rescale_adapter_scale(model, 0.0), cases.only("fused"):
        none = cases.lin(model)(x)
    assert torch.allclose(none, cases.lin(model).base_layer(x), atol=1e-5)
    assert torch.equal(cases.lin(model)(x), whole)


# Mixed batches

NAMES = ["default", "__base__", "small", "absent", "default", "big"]


def make_mixed(precision: cases.Precision, device: str, **config: Any) -> nn.Module:
    """Three adapters of three ranks, all of them trainable."""
    model = cases.make_model(precision, device=device, **config)
    cases.add_adapter(model, "small", r=2, lora_alpha=3, **config)
    cases.add_adapter(model, "big", r=9, use_rslora=True, **config)
    cases.lin(model).to(precision.base if not precision.adapters_fp32 else None)
    model.base_model.set_adapter(["default", "small", "big"])
    return model


@pytest.mark.parametrize("precision", cases.PRECISIONS.values(), ids=cases.PRECISIONS)
def test_mixed_batch(precision: cases.Precision, oracle: ModuleType, device: str):
    """In training mode, where PEFT's layer does not refuse: its model does."""
    model = make_mixed(precision, device)
    x = cases.make_x(precision, device, (len(NAMES), 5))
    got = cases.compare(model, oracle, precision, device, x, adapter_names=NAMES)
    assert sum("lora_" in name for name in got) == 6


def test_mixed_batch_of_single_rows_and_of_one_adapter(oracle: ModuleType, device: str):
    precision = cases.PRECISIONS["fp32"]
    x = cases.make_x(precision, device, (6,))
    for names in (NAMES, ["small"] * 6, ["small"] * 5 + ["__base__"]):
        cases.compare(
            make_mixed(precision, device), oracle, precision, device, x, adapter_names=names
        )


def test_mixed_batch_with_scalings_as_tensors(oracle: ModuleType, device: str):
    precision = cases.PRECISIONS["fp32"]
    model = make_mixed(precision, device)
    cases.lin(model).scaling["default"] = torch.tensor(1.7, device=device)
    cases.lin(model).scaling["big"] = torch.tensor(0.6)
    x = cases.make_x(precision, device, (len(NAMES), 2))
    cases.compare(model, oracle, precision, device, x, adapter_names=NAMES)
    cases.lin(model).scaling["default"].fill_(0.2)
    cases.compare(model, oracle, precision, device, x, adapter_names=NAMES)


def test_mixed_batch_trains_after_inference_mode_saw_the_same_names(
    oracle: ModuleType, device: str
):
    """What is kept for the next call must not be an inference tensor."""
    precision = cases.PRECISIONS["fp32"]
    names = ["default", "big"]
    model = make_mixed(precision, device)
    fastlora.accelerate(model)
    x = cases.make_x(precision, device, (2, 3))
    with torch.inference_mode():
        cases.lin(model)(x, adapter_names=names)
    cases.compare(model, oracle, precision, device, x, adapter_names=names)


def test_mixed_batch_with_dropout_masks_each_row_as_one_adapter_would(device: str):
    precision = cases.PRECISIONS["fp32"]
    model = make_mixed(precision, device, lora_dropout=0.4)
    fastlora.accelerate(model)
    layer, x = cases.lin(model), cases.make_x(precision, device, (len(NAMES), 3))
    with cases.only("fused"):
        torch.manual_seed(cases.SEED)
        y = layer(x, adapter_names=NAMES)
        for row, name in enumerate(NAMES):
            torch.manual_seed(cases.SEED)
            if name in ("__base__", "absent"):
                expected = layer.base_layer(x)
            else:
                expected = layer(x, adapter_names=[name] * len(NAMES))
            torch.testing.assert_close(y[row], expected[row], atol=1e-5, rtol=1e-5)


def test_mixed_batches_that_go_to_peft(device: str):
    x = cases.make_x(cases.PRECISIONS["fp32"], device, (3, 2))
    names = ["default", "other", "__base__"]

    def assert_handed_back(model: nn.Module, reason: str, names: list[str] = names) -> None:
        fastlora.accelerate(model)
        layer = cases.lin(model)
        found = peft_layers.operands(layer, x, names)
        assert isinstance(found, str) and reason in found
        with cases.only("PEFT"):
            got = layer(x, adapter_names=names)
        assert torch.equal(got, PeftLinear.forward(layer, x, adapter_names=names))

    model = cases.make_model(device=device).eval()
    assert_handed_back(model, "no adapter in use", ["__base__"] * 3)
    model = cases.make_model(device=device, lora_bias=True).eval()
    cases.add_adapter(model, "other", r=2)
    assert_handed_back(model, "has a bias on lora_B")
    model = cases.make_model(device=device)
    cases.add_adapter(model, "other", r=2, lora_dropout=0.2)
    cases.lin(model).lora_dropout["other"].p = 1.0  # so that PEFT's result has no chance in it
    assert_handed_back(model, "differ in dropout")
    cases.lin(model).enable_adapters(False)
    assert_handed_back(model, "adapters are disabled")
    for wrong in (["default"], ["default", "other"]):
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            cases.lin(model)(x, adapter_names=wrong)
    cases.lin(model).enable_adapters(True)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        cases.lin(model)(x, adapter_names=names)


# torch.compile


@pytest.mark.no_poison
@pytest.mark.parametrize("autocast", [False, True])
def test_torch_compile_has_no_graph_break(autocast: bool, device: str):
    """One adapter and two, in the fused forward and in PEFT's."""
    model = cases.make_model(device=device)
    cases.add_adapter(model, "other", r=2)
    fastlora.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = cases.make_x(cases.PRECISIONS["fp32"], device)

    def compare() -> None:
        found = []
        for run in (model, compiled):
            model.zero_grad()
            with torch.autocast(x.device.type, bf16, enabled=autocast):
                y = run(x)
            y.float().square().sum().backward()
            found.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(found[0]) == len(found[1]) >= 3
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(traced, eager)

    try:
        with cases.only("fused"):
            compare()
            model.base_model.set_adapter(["default", "other"])
            compare()
        with cases.only("PEFT"), fastlora.dispatch.force("eager"):
            compare()
    finally:
        torch.compiler.reset()
