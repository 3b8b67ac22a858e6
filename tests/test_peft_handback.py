"""What `fastlora.accelerate` leaves to PEFT: layers from the start, calls at each call, and the reasons."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastlora

peft = pytest.importorskip("peft")

import peft_cases as cases  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.helpers import disable_input_dtype_casting  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402

from fastlora.integrations import peft_layers  # noqa: E402

pytestmark = pytest.mark.usefixtures("same_masks")

bf16 = torch.bfloat16


def freeze_nothing(model: nn.Module) -> None:
    cases.lin(model).base_layer.weight.requires_grad_(True)


def hook_on(get: Callable[[PeftLinear], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        get(cases.lin(model)).register_forward_hook(lambda module, args, y: y * 1.5)

    return change


def backward_hook(model: nn.Module) -> None:
    cases.lin(model).lora_B["default"].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))


def backward_pre_hook(model: nn.Module) -> None:
    cases.lin(model).lora_B["default"].register_full_backward_pre_hook(lambda m, go: (go[0] * 2,))


def pre_hook(model: nn.Module) -> None:
    cases.lin(model).lora_dropout["default"].register_forward_pre_hook(
        lambda m, args: (args[0] + 1,)
    )


def accelerate_hook(model: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(cases.lin(model).base_layer, hooks.ModelHook())


def own_forward(model: nn.Module) -> None:
    a = cases.lin(model).lora_A["default"]
    a.forward = lambda x: nn.functional.linear(x, a.weight) * 3


class WeightSubclass(nn.Parameter):
    pass


def adapter_of_a_subclass(model: nn.Module) -> None:
    a = cases.lin(model).lora_A["default"]
    a.weight = WeightSubclass(a.weight.detach())
    assert type(a.weight) is WeightSubclass


def as_plain_attribute(get: Callable[[PeftLinear], nn.Module]) -> Callable[[nn.Module], None]:
    """What nn.DataParallel's replicas and FSDP with flat parameters make of a weight."""

    def change(model: nn.Module) -> None:
        module = get(cases.lin(model))
        weight = module._parameters.pop("weight")
        module.weight = weight.detach()

    return change


def partitioned(model: nn.Module) -> None:
    cases.lin(
        model
    ).base_layer.weight.ds_id = 0  # how DeepSpeed marks the parameters that ZeRO-3 splits


class LinearSubclass(nn.Linear):
    pass


class EmbeddingSubclass(nn.Embedding):
    pass


def adapter_module_of_a_subclass(model: nn.Module) -> None:
    cases.lin(model).lora_A["default"].__class__ = LinearSubclass


def adapter_in_fp64(model: nn.Module) -> None:
    cases.lin(model).lora_A["default"].to(torch.float64)
    cases.lin(model).lora_B["default"].to(torch.float64)


def odd_dropout(model: nn.Module) -> None:
    cases.lin(model).lora_dropout["default"] = nn.AlphaDropout(0.5).eval()


def dropout_in_place(model: nn.Module) -> None:
    cases.lin(model).lora_dropout["default"] = nn.Dropout(0.5, inplace=True).eval()


def bias_on_lora_a(model: nn.Module) -> None:
    a = cases.lin(model).lora_A["default"]
    a.bias = nn.Parameter(torch.rand_like(a.weight[:, 0]))


def scaling_by_row(model: nn.Module) -> None:
    cases.lin(model).scaling["default"] = torch.rand(
        cases.OUT, device=cases.lin(model).weight.device
    )


def trained_scaling(model: nn.Module) -> None:
    device = cases.lin(model).weight.device
    cases.lin(model).scaling["default"] = torch.tensor(2.0, device=device, requires_grad=True)


def two_with_dropout(model: nn.Module) -> None:
    cases.add_adapter(model, "other", r=3, lora_dropout=0.2)
    model.base_model.set_adapter(["default", "other"])


def twice(model: nn.Module) -> None:
    model.base_model.set_adapter(["default", "default"])


def two_dtypes(model: nn.Module) -> None:
    cases.add_adapter(model, "other", r=3)
    cases.lin(model).lora_A["other"].double()
    cases.lin(model).lora_B["other"].double()
    model.base_model.set_adapter(["default", "other"])


def disabled(model: nn.Module) -> None:
    cases.lin(model).enable_adapters(False)


def merged(model: nn.Module) -> None:
    model.merge_adapter()


def adapter_elsewhere(model: nn.Module) -> None:
    cases.lin(model).set_adapter(["absent"])


def second_is_a_variant(model: nn.Module) -> None:
    cases.add_adapter(model, "other", r=3, use_dora=True)
    model.set_adapter("other")
    variants = cases.lin(model).lora_variant
    variants["other"] = type("AnyLinearVariant", (type(variants["other"]),), {})()


HANDED_BACK: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "base trained": (freeze_nothing, "base weight is trained as well"),
    "hook on base_layer": (hook_on(lambda layer: layer.base_layer), "the base layer has hooks"),
    "hook on lora_A": (hook_on(lambda layer: layer.lora_A["default"]), "lora_A has hooks"),
    "hook on dropout": (pre_hook, "lora_dropout has hooks"),
    "backward hook on lora_B": (backward_hook, "lora_B has hooks"),
    "backward pre-hook on lora_B": (backward_pre_hook, "lora_B has hooks"),
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
    "dropout in place": (dropout_in_place, "writes into its input"),
    "bias on lora_A": (bias_on_lora_a, "lora_A of 'default' has a bias"),
    "scaling of a shape": (scaling_by_row, "not a constant number"),
    "trained scaling": (trained_scaling, "not a constant number"),
    "two adapters with dropout": (two_with_dropout, "several adapters are active with dropout"),
    "one adapter twice": (twice, "adapter 'default' is active twice"),
    "two dtypes": (two_dtypes, "an adapter is torch.float64"),
    "disabled": (disabled, "adapters are disabled"),
    "merged": (merged, "merged into the base weight"),
    "no such adapter": (adapter_elsewhere, "no adapter in use is in this layer"),
    "another variant": (second_is_a_variant, "'other' is a variant of LoRA, Any"),
}


@pytest.mark.parametrize("case", HANDED_BACK.values(), ids=HANDED_BACK)
def test_handed_back(case: tuple[Callable[[nn.Module], None], str], device: str):
    """Decided at each call: the change comes after accelerate, and shows in the next report."""
    change, reason = case
    model = cases.make_model(device=device)
    report = fastlora.accelerate(model)
    assert report.modules[0].forward == "fused"
    change(model)
    layer = cases.lin(model)
    x, dy = (
        cases.make_x(cases.PRECISIONS["fp32"], device),
        torch.randn(*cases.ROWS, cases.OUT, device=device),
    )
    with cases.only("PEFT"):
        plain = cases.measure(cases.peft_forward(layer), layer, x, dy)
        got = cases.measure(layer, layer, x, dy)
    assert got.keys() == plain.keys()
    for name in plain:
        assert torch.equal(got[name], plain[name]), name
    again = fastlora.accelerate(model)
    assert again.accelerated == report.accelerated
    assert reason in again.modules[0].now
    assert reason in str(again)


def decision(model: nn.Module, x: Tensor) -> str:
    found = peft_layers.operands(cases.lin(model), x)
    return found if isinstance(found, str) else "fused"


def test_what_depends_on_the_call_is_decided_at_the_call(device: str):
    model = cases.make_model(device=device)
    fastlora.accelerate(model)
    x = cases.make_x(cases.PRECISIONS["fp32"], device)
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


def test_arguments_that_only_peft_knows(device: str):
    model = cases.make_model(device=device)
    fastlora.accelerate(model)
    layer, x = cases.lin(model), cases.make_x(cases.PRECISIONS["fp32"], device)
    with cases.only("PEFT"):
        got = layer(x, alora_offsets=None)
    assert torch.equal(got, PeftLinear.forward(layer, x))


def test_torch_func_and_forward_ad_work(device: str):
    model = cases.make_model(device=device)
    layer = cases.lin(model)
    x = cases.make_x(cases.PRECISIONS["fp32"], device)
    with cases.only("PEFT"):
        plain = torch.func.grad(lambda t: layer(t).sum())(x)
        _, tangent = torch.func.jvp(layer, (x,), (x,))
    fastlora.accelerate(model)
    with cases.only("PEFT"):
        assert torch.equal(torch.func.grad(lambda t: layer(t).sum())(x), plain)
        assert torch.equal(torch.func.jvp(layer, (x,), (x,))[1], tangent)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, tangent)


def test_errors_are_those_of_peft(device: str):
    model = cases.make_model(cases.Precision(bf16), device=device)
    fastlora.accelerate(model)
    with pytest.raises(RuntimeError, match="dtype"):  # fp32 x beside a bf16 base, no autocast
        cases.lin(model)(torch.randn(2, cases.IN, device=device))
    with pytest.raises(TypeError):
        cases.lin(model)(cases.make_x(cases.Precision(bf16), device), unknown=1)
    with pytest.raises(RuntimeError, match="shape"):
        cases.lin(model)(torch.randn(2, cases.IN + 1, device=device, dtype=bf16))


# Left alone, and the report


def test_left_alone_with_a_reason(device: str):
    net = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "sub": LinearSubclass(8, 8),
            "emb": EmbeddingSubclass(5, 8),
            "conv": nn.Conv1d(8, 8, 1),
        }
    )
    config = LoraConfig(r=2, target_modules=["plain", "sub", "emb", "conv"])
    model = get_peft_model(net, config)
    report = fastlora.accelerate(model)
    assert report.accelerated == ("base_model.model.plain",)
    reasons = {name.rpartition(".")[2]: reason for name, reason in report.left}
    assert "LinearSubclass, not exactly torch.nn.Linear or Conv1D" in reasons["sub"]
    assert "EmbeddingSubclass, not exactly torch.nn.Embedding" in reasons["emb"]
    assert "Conv1d, not exactly peft.tuners.lora.layer.Linear" in reasons["conv"]
    assert "accelerated 1 of 4 LoRA layers" in str(report)
    types = {n: type(m) for n, m in model.base_model.model.items()}
    assert types["plain"] is peft_layers.AcceleratedLinear
    assert [t.__module__ for n, t in types.items() if n != "plain"] == [PeftLinear.__module__] * 3


def test_a_layer_with_variants_only_is_left_alone():
    model = cases.make_model(use_dora=True)
    variants = cases.lin(model).lora_variant
    variants["default"] = type("AnyLinearVariant", (type(variants["default"]),), {})()
    report = fastlora.accelerate(model)
    assert report.left == (
        ("base_model.model.lin", "each of its adapters is a variant of LoRA: Any"),
    )
    assert type(cases.lin(model)) is PeftLinear


def test_a_hooked_layer_is_left_alone():
    hooks = pytest.importorskip("accelerate.hooks")
    model = cases.make_model()
    hooks.add_hook_to_module(cases.lin(model), hooks.ModelHook())
    report = fastlora.accelerate(model)
    assert not report.accelerated
    assert "replaced on the instance" in report.left[0][1]


def test_subclasses_of_peft_linear_are_left_alone():
    class Quantised(PeftLinear):
        pass

    model = cases.make_model()
    cases.lin(model).__class__ = Quantised
    assert "Quantised, not exactly" in fastlora.accelerate(model).left[0][1]


def test_weight_of_a_subclass_is_left_alone():
    model = cases.make_model()
    base = cases.lin(model).base_layer
    base.weight = WeightSubclass(base.weight.detach(), requires_grad=False)
    assert "WeightSubclass, a subclass of Tensor" in fastlora.accelerate(model).left[0][1]


def test_alora_is_left_alone():
    model = cases.make_model(alora_invocation_tokens=[1, 2])
    assert "ALora" in fastlora.accelerate(model).left[0][1]


def test_errors_of_accelerate():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fastlora.accelerate(3)
    with pytest.raises(ValueError, match="this Sequential has none"):
        fastlora.accelerate(nn.Sequential(nn.Linear(2, 2)))


def test_a_peft_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(ImportError, match=r"PEFT 0\.18 or newer, got 0\.17\.1"):
        fastlora.accelerate(cases.make_model())


def test_restore_gives_back_the_class_and_the_results(device: str):
    model = cases.make_model(device=device)
    x = cases.make_x(cases.PRECISIONS["fp32"], device)
    before, attributes = cases.lin(model)(x), dict(cases.lin(model).__dict__)
    fastlora.accelerate(model)
    fastlora.accelerate(model)
    assert fastlora.restore(model) == ("base_model.model.lin",)
    assert type(cases.lin(model)) is PeftLinear
    assert cases.lin(model).__dict__ == attributes
    assert torch.equal(cases.lin(model)(x), before)
    assert fastlora.restore(model) == ()
