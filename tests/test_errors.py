"""Arguments that do not fit together raise, with the argument's name, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora.dispatch import force

t = torch.randn
CALLS = [fastlora.lora_linear, fastlora.explain]
EACH_CALL = pytest.mark.parametrize("call", CALLS, ids=["lora_linear", "explain"])


def arguments(device, **changes):
    return {
        "x": t(2, 5, 16, device=device),
        "weight": t(12, 16, device=device),
        "lora_A": t(4, 16, device=device),
        "lora_B": t(12, 4, device=device),
        "bias": t(12, device=device),
        **changes,
    }


WRONG_SHAPES = [
    ("x", (), r"x must be \(\.\.\., in_features\), got a 0-dim tensor"),
    ("x", (2, 15), r"weight must be .*\(12, 15\), got \(12, 16\)"),
    (
        "weight",
        (16, 12),
        r"weight must be \(out_features, in_features\)=\(16, 16\), got \(16, 12\)",
    ),
    ("weight", (16,), r"weight must be 2-D, got shape \(16,\)"),
    ("weight", (1, 12, 16), r"weight must be 2-D"),
    ("lora_A", (16, 4), r"lora_A must be \(r, in_features\)=\(16, 16\), got \(16, 4\)"),
    ("lora_A", (4,), r"lora_A must be 2-D"),
    ("lora_A", (4, 17), r"lora_A must be .*\(4, 16\), got \(4, 17\)"),
    ("lora_A", (5, 16), r"lora_B must be \(out_features, r\)=\(12, 5\), got \(12, 4\)"),
    ("lora_B", (4, 12), r"lora_B must be .*\(12, 4\), got \(4, 12\)"),
    ("lora_B", (1, 12, 4), r"lora_B must be 2-D"),
    ("bias", (11,), r"bias must be \(out_features,\)=\(12,\), got \(11,\)"),
    ("bias", (1, 12), r"bias must be \(out_features,\)=\(12,\), got \(1, 12\)"),
    ("bias", (), r"bias must be .* got \(\)"),
]


@EACH_CALL
@pytest.mark.parametrize(("name", "shape", "message"), WRONG_SHAPES)
def test_wrong_shape(device, call, name, shape, message):
    call(**arguments(device))  # having been checked, it vouches for no other
    with pytest.raises(ValueError, match=message):
        call(**arguments(device, **{name: t(shape, device=device)}))


@EACH_CALL
def test_rank_zero(device, call):
    empty = {"lora_A": t(0, 16, device=device), "lora_B": t(12, 0, device=device)}
    with pytest.raises(ValueError, match="lora_A must have a rank of at least 1"):
        call(**arguments(device, **empty))


NAMES = ["x", "weight", "lora_A", "lora_B", "bias"]


@EACH_CALL
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_wrong_dtype(device, call, name, dtype):
    good = arguments(device)
    with pytest.raises(TypeError, match=f"{name} must have a floating-point dtype, got {dtype}"):
        call(**{**good, name: good[name].to(dtype)})


@EACH_CALL
@pytest.mark.parametrize("name", NAMES)
def test_not_a_tensor(device, call, name):
    with pytest.raises(TypeError, match=f"{name} must be a Tensor, got list"):
        call(**arguments(device, **{name: [[1.0]]}))


@EACH_CALL
@pytest.mark.parametrize("name", NAMES[1:])
def test_wrong_device(device, call, name):
    good = arguments(device)
    message = f"{name} must be on the device of x, {device}.*, got meta"
    with pytest.raises(ValueError, match=message):
        call(**{**good, name: good[name].to("meta")})


WRONG_P = [
    (-0.1, ValueError, r"dropout_p must be in \[0, 1\], got -0\.1"),
    (1.0001, ValueError, r"dropout_p must be in \[0, 1\], got 1\.0001"),
    (float("nan"), ValueError, r"dropout_p must be in \[0, 1\], got nan"),
    (float("inf"), ValueError, r"dropout_p must be in \[0, 1\], got inf"),
    (True, TypeError, r"dropout_p must be a float, got bool"),
    ("0.1", TypeError, r"dropout_p must be a float, got str"),
    (None, TypeError, r"dropout_p must be a float, got NoneType"),
    (torch.tensor(0.1), TypeError, r"dropout_p must be a float, got Tensor"),
]


@EACH_CALL
@pytest.mark.parametrize(("p", "error", "message"), WRONG_P, ids=lambda v: str(v)[:12])
def test_wrong_dropout_p(device, call, p, error, message):
    with pytest.raises(error, match=message):
        call(**arguments(device), dropout_p=p)


@pytest.mark.parametrize("p", [-0.1, True])
def test_dropout_p_is_checked_in_eval_too(device, p):
    with pytest.raises((ValueError, TypeError), match="dropout_p"):
        fastlora.lora_linear(**arguments(device), dropout_p=p, training=False)


WRONG_SCALING = [
    (torch.ones(1), ValueError, r"scaling must be a float or a 0-dim float tensor, .*\(1,\)"),
    (torch.ones(2, 2), ValueError, r"scaling must be .* of shape \(2, 2\)"),
    (torch.tensor(2), ValueError, r"scaling must be .* got torch\.int64 of shape \(\)"),
    (torch.tensor(2.0, requires_grad=True), ValueError, r"scaling must not require grad"),
    (torch.tensor(2.0, device="meta"), ValueError, r"scaling must be on .* or the CPU, got meta"),
    ("2", TypeError, r"scaling must be a float or a Tensor, got str"),
    (None, TypeError, r"scaling must be a float or a Tensor, got NoneType"),
]


@pytest.mark.parametrize(("scaling", "error", "message"), WRONG_SCALING, ids=range(7))
def test_wrong_scaling(device, scaling, error, message):
    with pytest.raises(error, match=message):
        fastlora.lora_linear(**arguments(device), scaling=scaling)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_weight_in_another_dtype_than_x(device, dtype):
    good = arguments(device)
    message = f"weight must have the dtype of x, torch.float32, got {dtype}"
    with pytest.raises(TypeError, match=message):
        fastlora.lora_linear(**{**good, "weight": good["weight"].to(dtype)})


WRONG_SEEDS = [
    (3, TypeError, r"seed must be a Tensor, got int"),
    (torch.tensor([3]), ValueError, r"seed must be a 0-dim int64 tensor on .*shape \(1,\)"),
    (torch.tensor(3.0), ValueError, r"seed must be a 0-dim int64 tensor on .*torch.float32"),
    (torch.empty((), dtype=torch.int64, device="meta"), ValueError, r"seed must be .* on meta"),
]


@pytest.mark.parametrize(("seed", "error", "message"), WRONG_SEEDS, ids=range(4))
def test_wrong_seed(device, seed, error, message):
    with pytest.raises(error, match=message):
        fastlora.lora_linear(**arguments(device), dropout_p=0.5, seed=seed)


def test_what_is_known_of_checked_calls_has_a_limit(device, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("fastlora.functional._MAX_KNOWN", 3)
    monkeypatch.setattr("fastlora.functional._known_fused", set())
    for rows in range(1, 6):
        fastlora.lora_linear(**arguments(device, x=t(rows, 16, device=device)))
    assert len(fastlora.functional._known_fused) == 2


def test_only_eager_can_be_forced():
    with pytest.raises(ValueError, match="path must be 'eager', got 'fused'"), force("fused"):
        pass


def test_good_arguments_pass(device):
    good = arguments(device)
    assert fastlora.lora_linear(**good, dropout_p=0, scaling=2).shape == (2, 5, 12)
    assert fastlora.lora_linear(**good, dropout_p=1).shape == (2, 5, 12)
    assert fastlora.explain(**good).fused
