"""LoRALinear: values, sharing of the base, initialisation, errors."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
from torch import nn

from fastlora import LoRALinear

SHAPES = [
    pytest.param(16, 24, 4, True, id="16-24-r4-bias"),
    pytest.param(33, 17, 3, False, id="odd-r3-nobias"),
    pytest.param(8, 40, 1, True, id="rank1"),
    pytest.param(12, 10, 64, False, id="rank-over-width"),
]


def make(k=16, n=24, r=4, bias=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    base = nn.Linear(k, n, bias=bias, dtype=dtype)
    options = {"lora_alpha": 8, **options}
    layer = LoRALinear(base, r, **options)
    nn.init.normal_(layer.lora_B)
    return base, layer


def formula(x, layer):
    y = x @ layer.weight.T + layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T)
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize(("k", "n", "r", "bias"), SHAPES)
def test_forward_and_gradients_follow_the_formula(k, n, r, bias):
    _, layer = make(k, n, r, bias)
    x = torch.randn(3, 5, k, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 5, n, dtype=torch.float64)
    wanted = (x, layer.lora_A, layer.lora_B)
    y = layer(x)
    got = torch.autograd.grad(y, wanted, dy)
    expected_y = formula(x, layer)
    expected = torch.autograd.grad(expected_y, wanted, dy)
    torch.testing.assert_close(y, expected_y)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_new_layer_computes_what_the_base_does():
    base = nn.Linear(16, 24, dtype=torch.float64)
    x = torch.randn(7, 16, dtype=torch.float64)
    torch.testing.assert_close(LoRALinear(base, 4, 8)(x), base(x))


def test_base_is_shared_and_frozen():
    base, layer = make()
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    x = torch.randn(2, 16, dtype=torch.float64)
    layer(x).sum().backward()
    assert base.weight.grad is None
    assert base.bias.grad is None
    assert layer.lora_A.grad is not None


def test_state_dict_has_loralibs_keys_and_round_trips():
    _, layer = make()
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert list(make(bias=False)[1].state_dict()) == ["weight", "lora_A", "lora_B"]
    other = LoRALinear(nn.Linear(16, 24, dtype=torch.float64), 4, 8)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


def test_copy_is_independent_and_equal():
    _, layer = make()
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    nn.init.normal_(twin.lora_A)
    assert not torch.allclose(twin(x), layer(x))


@pytest.mark.parametrize(("rslora", "expected"), [(False, 10 / 16), (True, 10 / 4)])
def test_scaling(rslora, expected):
    _, layer = make(r=16, lora_alpha=10, use_rslora=rslora)
    assert layer.scaling == pytest.approx(expected)


def test_changed_scaling_takes_effect():
    _, layer = make()
    x = torch.randn(5, 16, dtype=torch.float64)
    before = layer(x)
    layer.scaling = -0.25
    torch.testing.assert_close(layer(x), formula(x, layer))
    assert not torch.allclose(layer(x), before)


def test_dropout_acts_in_training_only():
    _, layer = make(lora_dropout=0.5)
    x = torch.randn(64, 16, dtype=torch.float64)
    assert not torch.allclose(layer(x), formula(x, layer))
    torch.testing.assert_close(layer.eval()(x), formula(x, layer))


def test_dropout_of_everything_leaves_the_frozen_linear():
    base, layer = make(lora_dropout=1.0)
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), base(x))


def test_dropout_keeps_the_mean():
    _, layer = make(lora_dropout=0.25)
    x = torch.randn(1, 16, dtype=torch.float64)
    many = layer(x.expand(20000, 16).contiguous())
    # Five standard errors: the mean of many masks is the undropped value.
    error = (many.mean(0) - formula(x, layer)[0]).abs()
    assert bool((error < 5 * many.std(0) / math.sqrt(20000)).all())


def test_kaiming_fills_its_range_and_b_is_zero():
    layer = LoRALinear(nn.Linear(400, 30), 16, 8)
    bound = 1 / math.sqrt(400)
    assert 0.95 * bound < layer.lora_A.abs().max().item() <= bound
    assert layer.lora_A.mean().abs().item() < 0.1 * bound
    assert not layer.lora_B.any()


def test_gaussian_has_std_one_over_r():
    layer = LoRALinear(nn.Linear(4000, 30), 16, 8, init_lora_weights="gaussian")
    assert layer.lora_A.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert not layer.lora_B.any()


def test_reset_draws_a_and_clears_b():
    _, layer = make()
    before = layer.lora_A.detach().clone()
    weight = layer.weight.detach().clone()
    layer.reset_lora_parameters()
    assert not torch.equal(layer.lora_A, before)
    assert not layer.lora_B.any()
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_adapter_dtype(adapter_dtype):
    _, layer = make(dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
    expected = adapter_dtype or torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == expected
    x = torch.randn(9, 16, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    wide = copy.deepcopy(layer).double().requires_grad_(False)
    oracle = formula(x.double(), wide)
    # Each of A, B, s and y may be rounded to bf16 once, by 2^-8 of its size, or by 2^-7 in Triton's
    # interpreter, which truncates; this sums what those roundings can do to each element of y.
    unit = 2**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2**-8
    a, b = wide.lora_A.T, wide.lora_B.T
    s_size = layer.scaling * (x.double() @ a).abs() @ b.abs()
    a_size = layer.scaling * x.double().abs() @ a.abs() @ b.abs()
    limit = unit * (oracle.abs() + 2 * s_size + a_size)
    error = (y.double() - oracle).abs()
    assert bool((error <= limit).all()), f"{(error / limit).max()} times the limit"


def test_mode_and_repr_and_meta():
    assert not LoRALinear(nn.Linear(4, 5).eval(), 2, 4).training
    layer = LoRALinear(nn.Linear(4, 5, device="meta"), 2, 4)
    assert layer.lora_A.is_meta
    assert layer.lora_B.shape == (5, 2)
    assert repr(layer) == (
        "LoRALinear(in_features=4, out_features=5, bias=True, r=2, lora_alpha=4, "
        "lora_dropout=0.0, use_rslora=False)"
    )


def test_state_dict_survives_the_move_to_another_dtype():
    _, layer = make()
    x = torch.randn(5, 16, dtype=torch.float64)
    expected = formula(x, layer)
    torch.testing.assert_close(layer.float()(x.float()).double(), expected, rtol=1e-4, atol=1e-4)


class OddLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def hooked():
    base = nn.Linear(4, 4)
    base.forward = lambda x: x
    return base


def integer():
    base = nn.Linear(4, 4)
    base.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return base


BAD = [
    pytest.param({"base": nn.Conv1d(4, 4, 1)}, TypeError, "base.*got Conv1d", id="base-kind"),
    pytest.param({"base": OddLinear(4, 4)}, TypeError, "base.*OddLinear", id="base-forward"),
    pytest.param({"base": hooked()}, TypeError, "base.*another forward", id="base-own-forward"),
    pytest.param({"base": integer()}, ValueError, "base.weight.*got torch.int8", id="base-int8"),
    pytest.param({"r": 0}, ValueError, "r must be from 1 to 256, got 0", id="r0"),
    pytest.param({"r": 257}, ValueError, "r must be from 1 to 256, got 257", id="r257"),
    pytest.param({"r": 4.0}, TypeError, "r must be an int.*got 4.0", id="r-float"),
    pytest.param({"r": True}, TypeError, "r must be an int.*got True", id="r-bool"),
    pytest.param({"lora_alpha": 0}, ValueError, "lora_alpha.*got 0", id="alpha0"),
    pytest.param({"lora_alpha": math.inf}, ValueError, "lora_alpha.*got inf", id="alpha-inf"),
    pytest.param({"lora_alpha": "8"}, TypeError, "lora_alpha.*got '8'", id="alpha-str"),
    pytest.param({"lora_dropout": -0.1}, ValueError, "lora_dropout.*got -0.1", id="p-below"),
    pytest.param({"lora_dropout": 1.5}, ValueError, "lora_dropout.*got 1.5", id="p-above"),
    pytest.param({"lora_dropout": math.nan}, ValueError, "lora_dropout.*got nan", id="p-nan"),
    pytest.param({"lora_dropout": None}, TypeError, "lora_dropout.*got None", id="p-none"),
    pytest.param({"use_rslora": 1}, TypeError, "use_rslora.*got 1", id="rslora-int"),
    pytest.param({"init_lora_weights": "pissa"}, ValueError, "init_.*got 'pissa'", id="init"),
    pytest.param({"adapter_dtype": torch.int8}, ValueError, "adapter_dtype.*int8", id="dtype"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"base": nn.Linear(4, 4), "r": 2, "lora_alpha": 4, **change}
    with pytest.raises(error, match=message):
        LoRALinear(**arguments)


def test_refused_base_stays_trainable():
    base = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="r must be"):
        LoRALinear(base, 0, 4)
    assert base.weight.requires_grad
