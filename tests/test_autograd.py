"""What autograd asks of the fused op: derivatives, what is saved, replay, autocast, and training."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import reference

F32, F16 = torch.float32, torch.float16
CHECKED = [(3, 5, 4, 2), (2, 9, 3, 1)]


def leaves_of(case, wanted=("x", "lora_A", "lora_B", "bias")):
    return {n: t.detach().requires_grad_(n in wanted) for n, t in case.tensors.items()}


def grads_of(leaves):
    return {n: t.grad for n, t in leaves.items() if t.grad is not None}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(("M", "K", "N", "R"), CHECKED)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_of_the_reference(oracle, device, M, K, N, R, p):
    case = oracle.make_case(M, K, N, R, F32, device, dropout_p=p).double()
    leaves = [t.requires_grad_() for t in case.tensors.values()]

    def call(*tensors):
        tensors = dict(zip(case.tensors, tensors, strict=True))
        return oracle.reference_call(dataclasses.replace(case, tensors=tensors))

    assert torch.autograd.gradcheck(call, leaves, nondet_tol=0.0)


@pytest.mark.parametrize(("M", "K", "N", "R"), CHECKED)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_of_the_fused_op(oracle, device, M, K, N, R, p):
    # The kernels take no fp64. y is linear in each argument, so a wide step costs no truncation error:
    # what is left is fp32's rounding of y over the step, 1e-6 / 1e-2.
    case = oracle.make_case(M, K, N, R, F32, device, dropout_p=p)
    oracle.assert_fused(case)
    leaves = [t.requires_grad_() for t in case.tensors.values()]

    def call(*tensors):
        tensors = dict(zip(case.tensors, tensors, strict=True))
        return oracle.fused_call(dataclasses.replace(case, tensors=tensors))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*double precision.*")
        assert torch.autograd.gradcheck(
            call, leaves, eps=1e-2, atol=1e-3, rtol=1e-3, nondet_tol=0.0
        )


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpoint_replays_the_mask(oracle, device, use_reentrant):
    case = oracle.make_case(20, 24, 16, 4, F16, device, dropout_p=0.5)
    oracle.assert_fused(case)

    def step(wrap):
        leaves = leaves_of(case)
        torch.manual_seed(3)

        def block(x):
            h = fastlora.lora_linear(**{**leaves, "x": x}, dropout_p=0.5)
            return fastlora.lora_linear(h, *adapter, dropout_p=0.5)

        adapter = leaves["weight"].t(), leaves["lora_B"].t(), leaves["lora_A"].t()
        y = wrap(block, leaves["x"])
        torch.rand(3, device=device)  # moves the generator on between forward and recomputation
        y.backward(case.tensors["x"])
        return {"y": y.detach(), **grads_of(leaves)}

    plain = step(lambda block, x: block(x))
    assert_equal(step(lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant)), plain)


def test_gradient_of_a_weight_from_a_strided_dy(oracle, device):
    """What lies between its columns is not read: torch's own bf16 product on a CPU does."""
    case = oracle.make_case(13, 16, 20, 2, torch.bfloat16, device)
    wide = case.dy.new_full((20, 32), float("nan"))
    wide[:, 3:16] = case.dy.t()
    strided = dataclasses.replace(case, dy=wide[:, 3:16].t())
    assert_equal(oracle.check(strided), oracle.fused(case))


@pytest.mark.parametrize("adapter_dtype", [F16, F32], ids=["fp16", "fp32"])
def test_micro_batches_accumulate(oracle, device, adapter_dtype):
    case = oracle.make_case(24, 24, 16, 4, F16, device, dropout_p=0.1, adapter_dtype=adapter_dtype)
    leaves = leaves_of(case, ("lora_A", "lora_B"))
    parts = []
    for rows in (slice(0, 10), slice(10, 24)):
        part = dataclasses.replace(
            case.relaid(x=case.tensors["x"][rows]), dy=case.dy[rows], wanted=("lora_A", "lora_B")
        )
        parts.append(oracle.fused(part))
        x = {"x": part.tensors["x"]}
        oracle.fused_call(dataclasses.replace(part, tensors=leaves | x)).backward(part.dy)
    for name in ("lora_A", "lora_B"):
        assert torch.equal(leaves[name].grad, parts[0][name] + parts[1][name]), name


def saved_by(call):
    """Every tensor that ``call`` saves for backward, and its result."""
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return saved, call()


def signature(t):
    return tuple(t.shape), t.dtype


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("scaling", ["float", "tensor"])
def test_saved_tensors(oracle, device, p, scaling):
    M, K, N, R = 20, 27, 16, 4
    case = oracle.make_case(M, K, N, R, F16, device, dropout_p=p, adapter_dtype=F32)
    if scaling == "tensor":
        case = dataclasses.replace(case, scaling=torch.tensor(1.5, device=device))
    leaves = leaves_of(case)
    saved, _ = saved_by(lambda: oracle.fused_call(dataclasses.replace(case, tensors=leaves)))
    own = [leaves[name] for name in ("x", "weight", "lora_A", "lora_B")]
    expected = [signature(t) for t in own] + [((M, R), F16)]
    expected += [((M, (K + 7) // 8), torch.uint8)] if p else []
    expected += [((), F32)] if scaling == "tensor" else []
    assert sorted(map(str, map(signature, saved))) == sorted(map(str, expected))
    # x and the parameters themselves, no copies.
    assert {t.data_ptr() for t in own} <= {t.data_ptr() for t in saved}


SAVED = [
    # wanted, whether x is saved, s, mask
    (("lora_A", "lora_B"), True, True, True),
    (("x", "lora_B"), False, True, True),
    (("x",), False, False, True),
    (("lora_B",), False, True, False),
    (("lora_A",), True, False, True),
    (("weight",), True, False, False),
    (("bias",), False, False, False),
]


@pytest.mark.parametrize(("wanted", "has_x", "has_s", "has_mask"), SAVED)
def test_only_what_backward_needs_is_saved(oracle, device, wanted, has_x, has_s, has_mask):
    M, K, R = 20, 27, 4
    case = oracle.make_case(M, K, 16, R, F16, device, dropout_p=0.1)
    leaves = leaves_of(case, wanted)
    saved, _ = saved_by(lambda: oracle.fused_call(dataclasses.replace(case, tensors=leaves)))
    pointers, signatures = {t.data_ptr() for t in saved}, [signature(t) for t in saved]
    assert (leaves["x"].data_ptr() in pointers) == has_x
    assert (((M, R), F16) in signatures) == has_s
    assert (((M, 4), torch.uint8) in signatures) == has_mask


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_nothing_is_saved_without_gradients(oracle, device, mode):
    case = oracle.make_case(20, 24, 16, 4, F16, device, dropout_p=0.1)
    expected = oracle.fused(case)["y"]
    leaves = leaves_of(case, () if mode is contextlib.nullcontext else ("x", "lora_A"))
    with mode():
        saved, y = saved_by(lambda: oracle.fused_call(dataclasses.replace(case, tensors=leaves)))
    assert not saved
    assert not y.requires_grad
    assert torch.equal(y, expected)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_autocast(oracle, device, p):
    case = oracle.make_case(40, 48, 32, 8, F32, device, dropout_p=p)
    case = dataclasses.replace(case, dy=case.dy.bfloat16())

    def under_autocast(call):
        def wrapped(case):
            with torch.autocast(device, dtype=torch.bfloat16):
                return call(case)

        return wrapped

    under_autocast(oracle.assert_fused)(case)
    got = oracle.run(under_autocast(oracle.fused_call), case)
    plain, exact = oracle.run(under_autocast(oracle.plain_call), case), oracle.exact(case)
    assert got.pop("y").dtype == torch.bfloat16
    for name, grad in got.items():
        assert grad.dtype == F32, name
        oracle.assert_close(grad, plain[name], exact[name], torch.bfloat16, name)


def test_autocast_leaves_16_bit_leaves_their_dtype(oracle, device):
    case = oracle.make_case(20, 24, 16, 4, torch.bfloat16, device, adapter_dtype=F32)
    expected = oracle.fused(case)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_equal(oracle.fused(case), expected)


@pytest.mark.parametrize("second", ["x", "lora_B"])
def test_double_backward_raises(oracle, device, second):
    # Of a sum, so that dy is a constant: dx depends on lora_B through what was saved alone.
    case = oracle.make_case(6, 8, 4, 2, F32, device)
    leaves = leaves_of(case)
    y = oracle.fused_call(dataclasses.replace(case, tensors=leaves))
    loss = y.square().sum() if second == "x" else y.sum()
    (dx,) = torch.autograd.grad(loss, leaves["x"], create_graph=True, retain_graph=True)
    assert_equal({"x": dx.detach()}, {"x": torch.autograd.grad(loss, leaves["x"])[0]})
    with pytest.raises(RuntimeError, match=r"no double backward.*force\('eager'\)"):
        torch.autograd.grad(dx.sum(), leaves[second])


def test_retained_graph_gives_the_same_again(oracle, device):
    case = oracle.make_case(20, 24, 16, 4, F16, device, dropout_p=0.1)
    leaves = leaves_of(case)
    y = oracle.fused_call(dataclasses.replace(case, tensors=leaves))
    wanted = [leaves[n] for n in ("x", "lora_A", "lora_B")]
    first = torch.autograd.grad(y, wanted, case.dy, retain_graph=True)
    second = torch.autograd.grad(y, wanted, case.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, wanted, case.dy)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_changing_a_saved_tensor_is_noticed(oracle, device, name):
    case = oracle.make_case(6, 8, 4, 2, F32, device)
    leaves = leaves_of(case)
    y = oracle.fused_call(dataclasses.replace(case, tensors=leaves))
    with torch.no_grad():
        leaves[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(case.dy)


def test_manual_seed_repeats_the_mask_and_calls_differ(oracle, device):
    case = oracle.make_case(20, 24, 16, 4, F32, device)
    oracle.assert_fused(case)
    torch.manual_seed(5)
    first, second = (fastlora.lora_linear(**case.tensors, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, fastlora.lora_linear(**case.tensors, dropout_p=0.5))
    assert torch.equal(second, fastlora.lora_linear(**case.tensors, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_fused_and_eager_draw_the_same_mask(oracle, device):
    # A weight and dy of zeros but for the branch: dx is exactly 0 where the mask dropped.
    case = oracle.make_case(20, 24, 16, 4, F32, device, dropout_p=0.5)
    case.tensors["weight"].zero_()
    dropped = oracle.fused(case)["x"] == 0
    with fastlora.dispatch.force("eager"):
        assert not fastlora.explain(**case.tensors).fused
        assert torch.equal(oracle.run(oracle.fused_call, case)["x"] == 0, dropped)
    keep = reference.dropout_keep_mask(
        oracle.drawn_seed(torch.device(device)), 20, 24, 0.5, device=device
    )
    assert torch.equal(~dropped, keep)


def train(device, dtype, steps=30):
    """Losses of a two-layer student that learns a shift of its frozen weights, by adapters alone."""
    generator = torch.Generator().manual_seed(1)
    widths, M, r = [24, 40, 16], 48, 4

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype) / shape[-1] ** 0.5

    weights = [draw(n, k) for k, n in itertools.pairwise(widths)]
    shifts = [0.5 * draw(n, 2) @ draw(2, k) for k, n in itertools.pairwise(widths)]
    adapters = nn.ParameterList()
    for k, n in itertools.pairwise(widths):
        adapters.extend([draw(r, k, dtype=F32), torch.zeros(n, r, device=device)])
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=2e-2)
    x = draw(M, widths[0]) * widths[0] ** 0.5
    target = F.linear(F.gelu(F.linear(x, weights[0] + shifts[0])), weights[1] + shifts[1])
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        h = x
        for i, weight in enumerate(weights):
            a, b = adapters[2 * i : 2 * i + 2]
            h = fastlora.lora_linear(
                F.gelu(h) if i else h, weight, a, b, scaling=2.0, dropout_p=0.1
            )
        loss = F.mse_loss(h.float(), target.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


# fp32: rounding that 30 steps of Adam amplify. bf16: y, s and the gradients are rounded each step, and
# truncated in the interpreter; a wrong gradient or mask separates the curves by tens of percent.
@pytest.mark.parametrize(("dtype", "rtol"), [(F32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_training_follows_eager(device, dtype, rtol):
    fused = train(device, dtype)
    with fastlora.dispatch.force("eager"):
        eager = train(device, dtype)
    torch.testing.assert_close(fused, eager, rtol=rtol, atol=0)
    assert fused[-5:].mean() < 0.5 * fused[:3].mean()
