"""The eager reference: against fp64, PEFT, published Philox vectors, and the statistics of its mask."""

from __future__ import annotations

import math

import pytest
import torch

from fastlora import reference
from fastlora.kernels.config import DROPOUT_LEVELS, dropout_threshold, keep_scale

SHAPES = [
    pytest.param((12,), 32, 24, 4, True, id="12-32-24-r4-bias"),
    pytest.param((3, 5), 33, 17, 3, False, id="batched-odd-r3"),
    pytest.param((1,), 8, 40, 1, True, id="one-row-r1"),
    pytest.param((9,), 10, 12, 64, False, id="rank-over-width"),
    pytest.param((0,), 16, 8, 4, True, id="no-rows"),
]


def make(lead, k, n, r, bias, dtype=torch.float64):
    shapes = {"x": (*lead, k), "weight": (n, k), "lora_A": (r, k), "lora_B": (n, r)}
    if bias:
        shapes["bias"] = (n,)
    return {name: torch.randn(s, dtype=dtype).requires_grad_() for name, s in shapes.items()}


def formula(x, weight, lora_A, lora_B, bias=None, scaling=1.0):
    y = x @ weight.T + scaling * ((x @ lora_A.T) @ lora_B.T)
    return y if bias is None else y + bias


def gradients(y, tensors, dy):
    return torch.autograd.grad(y, list(tensors.values()), dy)


@pytest.mark.parametrize(("lead", "k", "n", "r", "bias"), SHAPES)
def test_fp64_follows_the_formula(lead, k, n, r, bias):
    t = make(lead, k, n, r, bias)
    y, expected = reference.lora_linear(**t, scaling=1.5), formula(**t, scaling=1.5)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    for got, want in zip(gradients(y, t, dy), gradients(expected, t, dy), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("lead", "k", "n", "r", "bias"), SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
def test_fp32_stays_near_fp64(lead, k, n, r, bias, p):
    t = make(lead, k, n, r, bias, torch.float32)
    wide = {name: v.detach().double().requires_grad_() for name, v in t.items()}
    y = reference.lora_linear(**t, scaling=1.5, dropout_p=p, seed=7)
    expected = reference.lora_linear(**wide, scaling=1.5, dropout_p=p, seed=7)
    dy = torch.randn_like(y)
    assert y.dtype == torch.float32
    # Sums of at most 64 + 33 products: a few dozen roundings of 2**-24, beside values of order 10.
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(y.double(), expected, **close)
    for got, want in zip(gradients(y, t, dy), gradients(expected, wide, dy.double()), strict=True):
        torch.testing.assert_close(got.double(), want, **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_rounded_once(dtype):
    t = make((64,), 48, 40, 8, True, dtype)
    wide = {name: v.detach().double() for name, v in t.items()}
    y = reference.lora_linear(**t, scaling=2.0)
    # Within one rounding of the output dtype, and what fp32 sums lose before it.
    torch.testing.assert_close(
        y.double(), formula(**wide, scaling=2.0), rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-4
    )
    for grad, tensor in zip(gradients(y, t, torch.ones_like(y)), t.values(), strict=True):
        assert grad.dtype == tensor.dtype


def test_fp32_adapters_keep_fp32_gradients():
    t = make((6,), 16, 8, 4, False, torch.bfloat16)
    for name in ("lora_A", "lora_B"):
        t[name] = t[name].detach().float().requires_grad_()
    y = reference.lora_linear(**t)
    assert y.dtype == torch.bfloat16
    grads = dict(zip(t, gradients(y, t, torch.ones_like(y)), strict=True))
    assert grads["lora_A"].dtype == grads["lora_B"].dtype == torch.float32


def test_tensor_scaling_equals_a_float():
    t = make((6,), 16, 8, 4, True)
    scaled = reference.lora_linear(**t, scaling=torch.tensor(0.75, dtype=torch.float64))
    torch.testing.assert_close(scaled, reference.lora_linear(**t, scaling=0.75))


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
def test_matches_peft(bias, use_rslora):
    lora = pytest.importorskip("peft.tuners.lora")
    base = torch.nn.Linear(32, 24, bias=bias)
    config = lora.LoraConfig(
        r=8, lora_alpha=4, lora_dropout=0.0, use_rslora=use_rslora, init_lora_weights=False
    )
    layer = lora.Linear(base, "default", config, r=8, lora_alpha=4)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 5, 32, requires_grad=True)
    dy = torch.randn(3, 5, 24)
    y = layer(x)
    scaling = 4 / math.sqrt(8) if use_rslora else 4 / 8
    ours = reference.lora_linear(x, base.weight, a, b, bias=base.bias, scaling=scaling)
    torch.testing.assert_close(ours, y)
    for got, want in zip(
        torch.autograd.grad(ours, (x, a, b), dy), torch.autograd.grad(y, (x, a, b), dy), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_dropout_scales_and_masks_the_lora_branch_alone():
    t = make((40,), 24, 16, 4, True)
    keep = reference.dropout_keep_mask(11, 40, 24, 0.25)
    dropped = torch.where(keep, t["x"] * keep_scale(0.25), 0.0)
    expected = t["x"] @ t["weight"].T + t["bias"] + 2 * (dropped @ t["lora_A"].T) @ t["lora_B"].T
    y = reference.lora_linear(**t, scaling=2.0, dropout_p=0.25, seed=11)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_products_in_the_dtype_of_x_where_kernels_cannot_run(oracle, dtype):
    """As exact as eager LoRA, which makes them in that dtype as well."""
    case = oracle.make_case(33, 72, 40, 8, dtype, "cpu", dropout_p=0.25)

    def in_its_dtype(case):
        seed = oracle.drawn_seed(case.tensors["x"].device)
        return reference.lora_linear(
            **case.tensors, scaling=case.scaling, dropout_p=0.25, seed=seed, compute=dtype
        )

    got, plain, exact = oracle.run(in_its_dtype, case), oracle.plain(case), oracle.exact(case)
    for name, value in exact.items():
        assert got[name].dtype == dtype
        oracle.assert_close(got[name], plain[name], value, dtype, name)


def test_eval_mode_ignores_dropout():
    t = make((6,), 16, 8, 4, True)
    y = reference.lora_linear(**t, dropout_p=0.9, training=False)
    torch.testing.assert_close(y, formula(**t))


def test_p1_leaves_the_frozen_linear():
    t = make((6,), 16, 8, 4, True)
    y = reference.lora_linear(**t, dropout_p=1.0, seed=3)
    torch.testing.assert_close(y, t["x"] @ t["weight"].T + t["bias"])
    grads = dict(zip(t, gradients(y, t, torch.ones_like(y)), strict=True))
    assert not grads["lora_A"].any()
    assert not grads["lora_B"].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_dropped_value_does_not_reach_the_adapters(bad):
    t = make((4,), 16, 8, 4, False)
    keep = reference.dropout_keep_mask(5, 4, 16, 0.5)
    clean = torch.where(keep, t["x"].detach(), 0.0)
    grads = []
    for x in (clean, clean.masked_fill(~keep, bad)):
        tensors = {**t, "x": x.requires_grad_()}
        y = reference.lora_linear(**tensors, dropout_p=0.5, seed=5)
        grads.append(gradients(y, tensors, torch.ones_like(y)))
    for name, want, got in zip(t, *grads, strict=True):
        if name != "weight":  # the frozen branch drops nothing
            torch.testing.assert_close(got, want)


def test_seed_is_drawn_from_torchs_generator():
    t = make((32,), 24, 8, 4, False)
    torch.manual_seed(1)
    first, second = (reference.lora_linear(**t, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, reference.lora_linear(**t, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_rng_state_replays_the_mask(device):
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    seed = reference.draw_seed(torch.device(device))
    with torch.random.fork_rng(enabled=True):
        (torch.set_rng_state if device == "cpu" else torch.cuda.set_rng_state)(state)
        assert reference.draw_seed(torch.device(device)) == seed
    assert seed.shape == ()
    assert seed.dtype == torch.int64


def test_checkpoint_recomputes_the_same_mask():
    t = make((32,), 24, 8, 4, False)

    def branch(x, lora_A, lora_B):
        return reference.lora_linear(x, t["weight"], lora_A, lora_B, dropout_p=0.5)

    tensors = {name: t[name] for name in ("x", "lora_A", "lora_B")}
    dy = torch.randn(32, 8, dtype=torch.float64)
    torch.manual_seed(2)
    plain = gradients(branch(**tensors), tensors, dy)
    torch.manual_seed(2)
    y = torch.utils.checkpoint.checkpoint(branch, *tensors.values(), use_reentrant=False)
    for got, want in zip(gradients(y, tensors, dy), plain, strict=True):
        torch.testing.assert_close(got, want)


def test_without_dropout_no_seed_is_drawn():
    t = make((4,), 16, 8, 4, False)
    state = torch.get_rng_state()
    reference.lora_linear(**t, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_levels():
    assert dropout_threshold(0.0) == 0
    assert dropout_threshold(1.0) == DROPOUT_LEVELS
    assert dropout_threshold(0.5) == DROPOUT_LEVELS // 2
    assert dropout_threshold(2.0**-18) == 0
    assert dropout_threshold(2.0**-14) == 1


def test_keep_scale_is_the_inverse_of_the_keep_rate():
    assert keep_scale(0.0) == 1.0
    assert keep_scale(0.5) == 2.0
    assert keep_scale(1.0) == 0.0
    for p in (0.1, 0.05, 1 / 3, 0.9, 0.999):
        kept = 1 - dropout_threshold(p) / DROPOUT_LEVELS
        assert keep_scale(p) * kept == pytest.approx(1.0, abs=1e-15)
        assert abs(kept - (1 - p)) <= 0.5 / DROPOUT_LEVELS
