"""`fastlora.accelerate` at the level of one layer: outputs and all gradients are those of PEFT's forward.

Both sides work on the same parameters and, by the fixture `same_masks`, on the same dropout mask. Where
the fused forward should run, PEFT's is made to fail, and the other way round.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora

peft = pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from fastlora.integrations import peft_layers  # noqa: E402

pytestmark = pytest.mark.usefixtures("same_masks")

SEED = 77
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
IN, OUT, ROWS = 40, 24, (2, 9)


class Net(nn.Module):
    """One linear that PEFT wraps, and one that it leaves."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.lin = linear
        self.head = nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin(x))


@dataclass(frozen=True)
class Precision:
    """dtypes of one run; autocast None is off."""

    base: torch.dtype
    adapters_fp32: bool = True
    autocast: torch.dtype | None = None
    x: torch.dtype | None = None

    @property
    def out(self) -> torch.dtype:
        return self.autocast or self.base


PRECISIONS = {
    "fp32": Precision(fp32),
    "bf16, fp32 adapters": Precision(bf16),
    "bf16, bf16 adapters": Precision(bf16, adapters_fp32=False),
    "bf16, fp32 adapters, autocast": Precision(bf16, autocast=bf16),
    "fp32, autocast bf16": Precision(fp32, autocast=bf16),
}


def make_model(
    precision: Precision = PRECISIONS["fp32"],
    *,
    conv1d: bool = False,
    base_bias: bool = True,
    device: str = "cpu",
    **config: Any,
) -> nn.Module:
    base = Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT, bias=base_bias)
    nn.init.normal_(base.weight, std=IN**-0.5)
    if base.bias is not None:
        nn.init.normal_(base.bias)
    options = {"r": 6, "lora_alpha": 9, "target_modules": ["lin"], "init_lora_weights": False}
    options |= {"fan_in_fan_out": conv1d} | config
    model = get_peft_model(
        Net(base).to(device, precision.base),
        LoraConfig(**options),
        autocast_adapter_dtype=precision.adapters_fp32,
    )
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Adapters as large as the frozen part, so that an error in them shows."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=1.0 if p.dim() < 2 else p.shape[1] ** -0.5)


def lin(model: nn.Module) -> PeftLinear:
    return model.base_model.model.lin


def make_x(precision: Precision, device: str, rows: tuple[int, ...] = ROWS) -> Tensor:
    return torch.randn(*rows, IN, device=device).to(precision.x or precision.base)


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the other forward ran")


@contextlib.contextmanager
def only(which: str) -> Iterator[None]:
    """Make the other forward fail: PEFT's for "fused", the op's for "PEFT"."""
    with pytest.MonkeyPatch.context() as patch:
        if which == "fused":
            patch.setattr(PeftLinear, "forward", forbidden)
        else:
            patch.setattr(peft_layers, "lora_linear", forbidden)
            patch.setattr(peft_layers, "lora_linear_multi", forbidden)
        yield


def measure(
    call: Callable[[Tensor], Tensor],
    layer: nn.Module,
    x: Tensor,
    dy: Tensor,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """y, and the gradients of x and of every trainable parameter of the layer."""
    torch.manual_seed(SEED)
    x = x.detach().requires_grad_()
    leaves = {"x": x} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = call(x)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True)
    got = {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}
    return {"y": y.detach(), **got}


def peft_forward(layer: PeftLinear, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: PeftLinear.forward(layer, x, **kwargs)


def compare(
    model: nn.Module,
    oracle: ModuleType,
    precision: Precision,
    device: str,
    x: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Accelerate; assert that the fused pass is as exact as PEFT's forward against one in fp64."""
    layer = lin(model)
    x = make_x(precision, device) if x is None else x
    dy = torch.randn(*x.shape[:-1], OUT, device=device).to(precision.out)
    exact_layer = copy.deepcopy(layer).double()
    with only("PEFT"):
        plain = measure(peft_forward(layer, **kwargs), layer, x, dy, precision.autocast)
        exact = measure(peft_forward(exact_layer, **kwargs), exact_layer, x.double(), dy.double())
    report = fastlora.accelerate(model)
    assert [m.forward for m in report.modules] == ["fused"], str(report)
    assert type(layer) is peft_layers.AcceleratedLinear
    with only("fused"):
        got = measure(lambda t: layer(t, **kwargs), layer, x, dy, precision.autocast)
    assert got.keys() == plain.keys() == exact.keys()
    for name in exact:
        assert got[name].dtype == plain[name].dtype, name
        oracle.assert_close(got[name], plain[name], exact[name], precision.out, name)
    return got


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
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_grid(config: dict[str, Any], precision: Precision, oracle: ModuleType, device: str):
    model = make_model(precision, device=device, **config)
    got = compare(model, oracle, precision, device)
    expected = {"y", "x", "lora_A.default.weight", "lora_B.default.weight"}
    if config.get("lora_bias"):
        expected.add("lora_B.default.bias")
    if "bias" in config:
        expected.add("base_layer.bias")
    assert got.keys() == expected


def test_fp16_base(oracle: ModuleType, device: str):
    compare(make_model(Precision(fp16), device=device), oracle, Precision(fp16), device)


def test_bf16_x_under_autocast_with_a_fp32_base(oracle: ModuleType, device: str):
    precision = Precision(fp32, autocast=bf16, x=bf16)
    compare(make_model(precision, device=device), oracle, precision, device)


@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 1, 4)])
def test_leading_shapes(rows: tuple[int, ...], oracle: ModuleType, device: str):
    precision = PRECISIONS["fp32"]
    x = make_x(precision, device, rows)
    compare(make_model(device=device, lora_dropout=0.1), oracle, precision, device, x)


def test_strided_x(oracle: ModuleType, device: str):
    x = torch.randn(IN, 7, device=device).t()
    compare(make_model(device=device), oracle, PRECISIONS["fp32"], device, x)


def test_dropout_is_off_in_eval(oracle: ModuleType, device: str):
    model = make_model(device=device, lora_dropout=0.5).eval()
    compare(model, oracle, PRECISIONS["fp32"], device)


def test_frozen_adapter_still_passes_a_gradient_to_x(oracle: ModuleType, device: str):
    model = make_model(device=device, inference_mode=True)
    assert compare(model, oracle, PRECISIONS["fp32"], device).keys() == {"y", "x"}


def test_dropout_differs_from_call_to_call_and_follows_the_seed(device: str):
    model = make_model(device=device, lora_dropout=0.5)
    fastlora.accelerate(model)
    x = make_x(PRECISIONS["fp32"], device)
    torch.manual_seed(1)
    first, second = lin(model)(x), lin(model)(x)
    torch.manual_seed(1)
    assert torch.equal(lin(model)(x), first)
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
    precision = PRECISIONS["bf16, fp32 adapters"]
    model = make_model(precision, device=device, lora_dropout=0.1)
    layer, x = lin(model), make_x(precision, device, (256,)).requires_grad_()
    slow = saved_bytes(peft_forward(layer), layer, x)
    fastlora.accelerate(model)
    fast = saved_bytes(layer, layer, x)
    s_row = 16  # r=6 in bf16, padded to 16 bytes
    assert fast == 256 * (2 * IN + s_row + IN // 8)
    assert slow >= 256 * (4 * IN + IN)


# Several adapters


def add_adapter(model: nn.Module, name: str, **config: Any) -> None:
    options = {"target_modules": ["lin"], "init_lora_weights": False}
    model.add_adapter(name, LoraConfig(**(options | config)))
    randomize(model)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_several_active_adapters_are_one_product(
    precision: Precision, oracle: ModuleType, device: str
):
    model = make_model(precision, device=device)
    add_adapter(model, "wide", r=11, lora_alpha=3, lora_bias=True)
    add_adapter(model, "rs", r=2, lora_alpha=5, use_rslora=True)
    if not precision.adapters_fp32:
        lin(model).to(bf16)  # PEFT 0.19 on casts a new adapter to fp32
    model.base_model.set_adapter(["default", "wide", "rs"])
    got = compare(model, oracle, precision, device)
    assert sum("lora_" in name for name in got) == 7


def test_several_active_adapters_of_two_dtypes(oracle: ModuleType, device: str):
    """PEFT 0.18 leaves an adapter that is added later in the dtype of a bf16 base."""
    precision = PRECISIONS["bf16, fp32 adapters"]
    model = make_model(precision, device=device)
    add_adapter(model, "later", r=5)
    lin(model).lora_A["later"].to(bf16)
    lin(model).lora_B["later"].to(bf16)
    model.base_model.set_adapter(["later", "default"])
    compare(model, oracle, precision, device)


def test_scalings_as_tensors(oracle: ModuleType, device: str):
    """What `prepare_model_for_compiled_hotswap` makes of them."""
    model = make_model(device=device, lora_dropout=0.1)
    lin(model).scaling["default"] = torch.tensor(1.7, device=device)
    compare(model, oracle, PRECISIONS["fp32"], device)
    lin(model).scaling["default"] = torch.tensor(0.3)  # PEFT takes one on the CPU too
    compare(model, oracle, PRECISIONS["fp32"], device)
    model = make_model(device=device)
    add_adapter(model, "other", r=3)
    lin(model).scaling["default"] = torch.tensor(1.7, device=device)
    model.base_model.set_adapter(["default", "other"])
    compare(model, oracle, PRECISIONS["fp32"], device)


# Mixed batches

NAMES = ["default", "__base__", "small", "absent", "default", "big"]


def make_mixed(precision: Precision, device: str, **config: Any) -> nn.Module:
    """Three adapters of three ranks, all of them trainable."""
    model = make_model(precision, device=device, **config)
    add_adapter(model, "small", r=2, lora_alpha=3, **config)
    add_adapter(model, "big", r=9, use_rslora=True, **config)
    lin(model).to(precision.base if not precision.adapters_fp32 else None)
    model.base_model.set_adapter(["default", "small", "big"])
    return model


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_mixed_batch(precision: Precision, oracle: ModuleType, device: str):
    """In training mode, where PEFT's layer does not refuse: its model does."""
    model = make_mixed(precision, device)
    x = make_x(precision, device, (len(NAMES), 5))
    got = compare(model, oracle, precision, device, x, adapter_names=NAMES)
    assert sum("lora_" in name for name in got) == 6


def test_mixed_batch_of_single_rows_and_of_one_adapter(oracle: ModuleType, device: str):
    precision = PRECISIONS["fp32"]
    x = make_x(precision, device, (6,))
    for names in (NAMES, ["small"] * 6, ["small"] * 5 + ["__base__"]):
        compare(make_mixed(precision, device), oracle, precision, device, x, adapter_names=names)


def test_mixed_batch_with_scalings_as_tensors(oracle: ModuleType, device: str):
    precision = PRECISIONS["fp32"]
    model = make_mixed(precision, device)
    lin(model).scaling["default"] = torch.tensor(1.7, device=device)
    lin(model).scaling["big"] = torch.tensor(0.6)
    x = make_x(precision, device, (len(NAMES), 2))
    compare(model, oracle, precision, device, x, adapter_names=NAMES)
    lin(model).scaling["default"].fill_(0.2)
    compare(model, oracle, precision, device, x, adapter_names=NAMES)


def test_mixed_batch_with_dropout_masks_each_row_as_one_adapter_would(device: str):
    precision = PRECISIONS["fp32"]
    model = make_mixed(precision, device, lora_dropout=0.4)
    fastlora.accelerate(model)
    layer, x = lin(model), make_x(precision, device, (len(NAMES), 3))
    with only("fused"):
        torch.manual_seed(SEED)
        y = layer(x, adapter_names=NAMES)
        for row, name in enumerate(NAMES):
            torch.manual_seed(SEED)
            if name in ("__base__", "absent"):
                expected = layer.base_layer(x)
            else:
                expected = layer(x, adapter_names=[name] * len(NAMES))
            torch.testing.assert_close(y[row], expected[row], atol=1e-5, rtol=1e-5)


def test_mixed_batches_that_go_to_peft(device: str):
    x = make_x(PRECISIONS["fp32"], device, (3, 2))
    names = ["default", "other", "__base__"]

    def assert_handed_back(model: nn.Module, reason: str, names: list[str] = names) -> None:
        fastlora.accelerate(model)
        layer = lin(model)
        found = peft_layers.operands(layer, x, names)
        assert isinstance(found, str) and reason in found
        with only("PEFT"):
            got = layer(x, adapter_names=names)
        assert torch.equal(got, PeftLinear.forward(layer, x, adapter_names=names))

    model = make_model(device=device).eval()
    assert_handed_back(model, "no adapter in use", ["__base__"] * 3)
    model = make_model(device=device, lora_bias=True).eval()
    add_adapter(model, "other", r=2)
    assert_handed_back(model, "has a bias on lora_B")
    model = make_model(device=device)
    add_adapter(model, "other", r=2, lora_dropout=0.2)
    lin(model).lora_dropout["other"].p = 1.0  # so that PEFT's result has no chance in it
    assert_handed_back(model, "differ in dropout")
    lin(model).enable_adapters(False)
    assert_handed_back(model, "adapters are disabled")
    for wrong in (["default"], ["default", "other"]):
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            lin(model)(x, adapter_names=wrong)
    lin(model).enable_adapters(True)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        lin(model)(x, adapter_names=names)


# Handed back


def freeze_nothing(model: nn.Module) -> None:
    lin(model).base_layer.weight.requires_grad_(True)


def hook_on(get: Callable[[PeftLinear], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        get(lin(model)).register_forward_hook(lambda module, args, y: y * 1.5)

    return change


def backward_hook(model: nn.Module) -> None:
    lin(model).lora_B["default"].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))


def pre_hook(model: nn.Module) -> None:
    lin(model).lora_dropout["default"].register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def accelerate_hook(model: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(lin(model).base_layer, hooks.ModelHook())


def own_forward(model: nn.Module) -> None:
    a = lin(model).lora_A["default"]
    a.forward = lambda x: nn.functional.linear(x, a.weight) * 3


class WeightSubclass(nn.Parameter):
    pass


def adapter_of_a_subclass(model: nn.Module) -> None:
    a = lin(model).lora_A["default"]
    a.weight = WeightSubclass(a.weight.detach())
    assert type(a.weight) is WeightSubclass


def as_plain_attribute(get: Callable[[PeftLinear], nn.Module]) -> Callable[[nn.Module], None]:
    """What nn.DataParallel's replicas and FSDP with flat parameters make of a weight."""

    def change(model: nn.Module) -> None:
        module = get(lin(model))
        weight = module._parameters.pop("weight")
        module.weight = weight.detach()

    return change


def partitioned(model: nn.Module) -> None:
    lin(model).base_layer.weight.ds_id = 0  # how DeepSpeed marks the parameters that ZeRO-3 splits


class LinearSubclass(nn.Linear):
    pass


def adapter_module_of_a_subclass(model: nn.Module) -> None:
    lin(model).lora_A["default"].__class__ = LinearSubclass


def adapter_in_fp64(model: nn.Module) -> None:
    lin(model).lora_A["default"].to(torch.float64)
    lin(model).lora_B["default"].to(torch.float64)


def odd_dropout(model: nn.Module) -> None:
    lin(model).lora_dropout["default"] = nn.AlphaDropout(0.5).eval()


def scaling_by_row(model: nn.Module) -> None:
    lin(model).scaling["default"] = torch.rand(OUT, device=lin(model).weight.device)


def trained_scaling(model: nn.Module) -> None:
    device = lin(model).weight.device
    lin(model).scaling["default"] = torch.tensor(2.0, device=device, requires_grad=True)


def two_with_dropout(model: nn.Module) -> None:
    add_adapter(model, "other", r=3, lora_dropout=0.2)
    model.base_model.set_adapter(["default", "other"])


def twice(model: nn.Module) -> None:
    model.base_model.set_adapter(["default", "default"])


def two_dtypes(model: nn.Module) -> None:
    add_adapter(model, "other", r=3)
    lin(model).lora_A["other"].double()
    lin(model).lora_B["other"].double()
    model.base_model.set_adapter(["default", "other"])


def disabled(model: nn.Module) -> None:
    lin(model).enable_adapters(False)


def merged(model: nn.Module) -> None:
    model.merge_adapter()


def adapter_elsewhere(model: nn.Module) -> None:
    lin(model).set_adapter(["absent"])


def second_is_dora(model: nn.Module) -> None:
    add_adapter(model, "dora", r=3, use_dora=True)
    model.set_adapter("dora")


HANDED_BACK: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "base trained": (freeze_nothing, "base weight is trained as well"),
    "hook on base_layer": (hook_on(lambda layer: layer.base_layer), "the base layer has hooks"),
    "hook on lora_A": (hook_on(lambda layer: layer.lora_A["default"]), "lora_A has hooks"),
    "hook on dropout": (pre_hook, "lora_dropout has hooks"),
    "backward hook on lora_B": (backward_hook, "lora_B has hooks"),
    "accelerate's hook": (accelerate_hook, "hook of accelerate"),
    "forward on the instance": (own_forward, "the forward of lora_A was replaced"),
    "tensor subclass": (adapter_of_a_subclass, "the weights of 'default' are no plain parameters"),
    "module subclass": (adapter_module_of_a_subclass, "not exactly torch.nn.Linear"),
    "base weight as attribute": (
        as_plain_attribute(lambda layer: layer.base_layer),
        "not a parameter of the base layer",
    ),
    "lora_A as attribute": (
        as_plain_attribute(lambda layer: layer.lora_A["default"]),
        "no plain parameters",
    ),
    "ZeRO-3": (partitioned, "partitioned by ZeRO-3"),
    "fp64 adapters": (adapter_in_fp64, "an adapter is torch.float64 beside torch.float32 x"),
    "another dropout": (odd_dropout, "AlphaDropout"),
    "scaling of a shape": (scaling_by_row, "not a constant number"),
    "trained scaling": (trained_scaling, "not a constant number"),
    "two adapters with dropout": (two_with_dropout, "several adapters are active with dropout"),
    "one adapter twice": (twice, "adapter 'default' is active twice"),
    "two dtypes": (two_dtypes, "an adapter is torch.float64"),
    "disabled": (disabled, "adapters are disabled"),
    "merged": (merged, "merged into the base weight"),
    "no such adapter": (adapter_elsewhere, "no adapter in use is in this layer"),
    "DoRA active": (second_is_dora, "'dora' is a variant of LoRA, Dora"),
}


@pytest.mark.parametrize("case", HANDED_BACK.values(), ids=HANDED_BACK)
def test_handed_back(case: tuple[Callable[[nn.Module], None], str], device: str):
    """Decided at each call: the change comes after accelerate, and shows in the next report."""
    change, reason = case
    model = make_model(device=device)
    report = fastlora.accelerate(model)
    assert report.modules[0].forward == "fused"
    change(model)
    layer = lin(model)
    x, dy = make_x(PRECISIONS["fp32"], device), torch.randn(*ROWS, OUT, device=device)
    with only("PEFT"):
        plain = measure(peft_forward(layer), layer, x, dy)
        got = measure(layer, layer, x, dy)
    assert got.keys() == plain.keys()
    for name in plain:
        assert torch.equal(got[name], plain[name]), name
    again = fastlora.accelerate(model)
    assert again.accelerated == report.accelerated
    assert reason in again.modules[0].now
    assert reason in str(again)


def decision(model: nn.Module, x: Tensor) -> str:
    found = peft_layers.operands(lin(model), x)
    return found if isinstance(found, str) else "fused"


def test_what_depends_on_the_call_is_decided_at_the_call(device: str):
    model = make_model(device=device)
    fastlora.accelerate(model)
    x = make_x(PRECISIONS["fp32"], device)
    assert decision(model, x) == "fused"
    with disable_input_dtype_casting(model):
        assert "cast of the input is switched off" in decision(model, x)
    with fastlora.dispatch.force("eager"):
        assert "force('eager')" in decision(model, x)
    assert "torch.float64" in decision(model, x.double())
    assert "a dimension is empty" in decision(model, x[:, :0])
    assert "does not fit 40 in_features" in decision(model, x[..., :5])
    assert "a subclass" in decision(model, x.as_subclass(WeightSubclass))
    assert "meta" in decision(model, x.to("meta"))
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: None)
    try:
        assert "hooks on all modules" in decision(model, x)
    finally:
        handle.remove()
    assert decision(model, x) == "fused"


def test_torch_func_and_forward_ad_work(device: str):
    model = make_model(device=device)
    layer = lin(model)
    x = make_x(PRECISIONS["fp32"], device)
    with only("PEFT"):
        plain = torch.func.grad(lambda t: layer(t).sum())(x)
        _, tangent = torch.func.jvp(layer, (x,), (x,))
    fastlora.accelerate(model)
    with only("PEFT"):
        assert torch.equal(torch.func.grad(lambda t: layer(t).sum())(x), plain)
        assert torch.equal(torch.func.jvp(layer, (x,), (x,))[1], tangent)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, tangent)


def test_errors_are_those_of_peft(device: str):
    model = make_model(Precision(bf16), device=device)
    fastlora.accelerate(model)
    with pytest.raises(RuntimeError, match="dtype"):  # fp32 x beside a bf16 base, no autocast
        lin(model)(torch.randn(2, IN, device=device))
    with pytest.raises(TypeError):
        lin(model)(make_x(Precision(bf16), device), unknown=1)
    with pytest.raises(RuntimeError, match="shape"):
        lin(model)(torch.randn(2, IN + 1, device=device, dtype=bf16))


# Left alone, and the report


def test_left_alone_with_a_reason(device: str):
    net = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "sub": LinearSubclass(8, 8),
            "emb": nn.Embedding(5, 8),
            "conv": nn.Conv1d(8, 8, 1),
        }
    )
    config = LoraConfig(r=2, target_modules=["plain", "sub", "emb", "conv"])
    model = get_peft_model(net, config)
    report = fastlora.accelerate(model)
    assert report.accelerated == ("base_model.model.plain",)
    reasons = {name.rpartition(".")[2]: reason for name, reason in report.left}
    assert "LinearSubclass, not exactly torch.nn.Linear or Conv1D" in reasons["sub"]
    assert "embeddings have no kernel" in reasons["emb"]
    assert "Conv1d, not exactly peft.tuners.lora.layer.Linear" in reasons["conv"]
    assert "accelerated 1 of 4 LoRA layers" in str(report)
    types = {n: type(m) for n, m in model.base_model.model.items()}
    assert types["plain"] is peft_layers.AcceleratedLinear
    assert [t.__module__ for n, t in types.items() if n != "plain"] == [PeftLinear.__module__] * 3


def test_a_layer_with_variants_only_is_left_alone():
    model = make_model(use_dora=True)
    report = fastlora.accelerate(model)
    assert report.left == (
        ("base_model.model.lin", "each of its adapters is a variant of LoRA: Dora"),
    )
    assert type(lin(model)) is PeftLinear


def test_a_hooked_layer_is_left_alone():
    hooks = pytest.importorskip("accelerate.hooks")
    model = make_model()
    hooks.add_hook_to_module(lin(model), hooks.ModelHook())
    report = fastlora.accelerate(model)
    assert not report.accelerated
    assert "replaced on the instance" in report.left[0][1]


def test_subclasses_of_peft_linear_are_left_alone():
    class Quantised(PeftLinear):
        pass

    model = make_model()
    lin(model).__class__ = Quantised
    assert "Quantised, not exactly" in fastlora.accelerate(model).left[0][1]


def test_weight_of_a_subclass_is_left_alone():
    model = make_model()
    base = lin(model).base_layer
    base.weight = WeightSubclass(base.weight.detach(), requires_grad=False)
    assert "WeightSubclass, a subclass of Tensor" in fastlora.accelerate(model).left[0][1]


def test_alora_is_left_alone():
    model = make_model(alora_invocation_tokens=[1, 2])
    assert "ALora" in fastlora.accelerate(model).left[0][1]


def test_errors_of_accelerate():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fastlora.accelerate(3)
    with pytest.raises(ValueError, match="this Sequential has none"):
        fastlora.accelerate(nn.Sequential(nn.Linear(2, 2)))


def test_a_peft_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(ImportError, match=r"PEFT 0\.18 or newer, got 0\.17\.1"):
        fastlora.accelerate(make_model())


def test_restore_gives_back_the_class_and_the_results(device: str):
    model = make_model(device=device)
    x = make_x(PRECISIONS["fp32"], device)
    before, attributes = lin(model)(x), dict(lin(model).__dict__)
    fastlora.accelerate(model)
    fastlora.accelerate(model)
    assert fastlora.restore(model) == ("base_model.model.lin",)
    assert type(lin(model)) is PeftLinear
    assert lin(model).__dict__ == attributes
    assert torch.equal(lin(model)(x), before)
    assert fastlora.restore(model) == ()


def test_scale_is_read_at_each_call(oracle: ModuleType, device: str):
    precision = PRECISIONS["fp32"]
    model = make_model(device=device)
    fastlora.accelerate(model)
    for change in (
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.unscale_layer(),
    ):
        change(lin(model))
        compare(model, oracle, precision, device)
    x = make_x(precision, device)
    whole = lin(model)(x)
    with rescale_adapter_scale(model, 0.0), only("fused"):
        none = lin(model)(x)
    assert torch.allclose(none, lin(model).base_layer(x), atol=1e-5)
    assert torch.equal(lin(model)(x), whole)
