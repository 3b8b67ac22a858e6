"""lora_linear_group under torch.compile: the ops, one graph, one mask, recompilations, what is saved."""

from __future__ import annotations

import pytest
import torch
from compile_cases import compiled, opcheck, targets
from torch._dynamo.utils import counters

import fastlora

ops_group = pytest.importorskip("fastlora.ops_group", reason="needs Triton", exc_type=ImportError)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WIDTHS, RANKS = (24, 16, 8), (4, 3, 8)
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def make(device, dtype=F32, adapter=None, M=7, K=24, bias=()):
    """x and the lists of tensors of three projections."""

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, device=device).to(dtype)

    return draw(M, K), {
        "weights": [draw(n, K) for n in WIDTHS],
        "lora_As": [draw(r, K, dtype=adapter or dtype) for r in RANKS],
        "lora_Bs": [draw(n, r, dtype=adapter or dtype) for n, r in zip(WIDTHS, RANKS, strict=True)],
        "biases": [draw(n) if i in bias else None for i, n in enumerate(WIDTHS)],
    }


def step(call, x, tensors, **options):
    """The outputs, and the gradients of x and the adapters."""
    x = x.detach().requires_grad_()
    tensors = {**tensors}
    for kind in ("lora_As", "lora_Bs"):
        tensors[kind] = [t.detach().requires_grad_() for t in tensors[kind]]
    torch.manual_seed(3)
    ys = call(x, **tensors, **options)
    leaves = [x, *tensors["lora_As"], *tensors["lora_Bs"]]
    total = sum(y.square().sum() for y in ys)
    return [y.detach() for y in ys], torch.autograd.grad(total, leaves)


OP_CASES = [
    # dtype, dtype of the adapters, dropout_p, projections with a bias, which tensors need a gradient
    pytest.param(F32, F32, 0.5, (0, 2), range(12), id="all"),
    pytest.param(F16, F32, 0.0, (1,), (4, 5, 6, 7), id="adapters"),
    pytest.param(BF16, BF16, 0.2, (), (0, 5), id="x-and-one"),
    pytest.param(F32, F32, 0.2, (0,), (9,), id="one-b"),
    pytest.param(F32, F32, 0.0, (0,), (), id="none"),
]


@pytest.mark.parametrize(("dtype", "adapter", "p", "bias", "wanted"), OP_CASES)
def test_opcheck(device, dtype, adapter, p, bias, wanted):
    x, kinds = make(device, dtype, adapter, bias=bias)
    flat = [x, *(t for kind in kinds.values() for t in kind if t is not None)]
    x, *tensors = (t.requires_grad_(i in wanted) for i, t in enumerate(flat))
    seed = torch.tensor(5, device=device) if p else None
    scaling, has_bias = torch.randn(3, device=device), [i in bias for i in range(3)]
    forward = torch.ops.fastlora.lora_linear_group.default
    backward = torch.ops.fastlora.lora_linear_group_backward.default
    args = (x, seed, scaling, p, has_bias, tensors)
    opcheck(forward, args)
    with torch.no_grad():
        *ys, s, mask = forward(*args)
        needs = [[1 + k * 3 + i in wanted for i in range(3)] for k in (1, 2)]
        saved = [torch.randn_like(y) for y in ys] + [t.detach() for t in tensors[:9]]
        args = (
            x.detach(), mask if p else None, s, scaling, p, [0, 4, 7], 0 in wanted, *needs, saved
        )  # fmt: skip
    opcheck(backward, args)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_one_graph(device, path, p):
    call, counter = compiled(fastlora.lora_linear_group)
    options = {"scaling": [1.5, 0.5, -2.0], "dropout_p": p}
    for M in (5, 7, 12):
        x, tensors = make(device, M=M, bias=(1,))
        got = step(call, x, tensors, **options)
        expected = step(fastlora.lora_linear_group, x, tensors, **options)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2, "one static compilation, one dynamic"
    assert not counters["graph_break"]
    ops = [name for name in targets(counter.graphs[-1]) if "lora_linear_group" in name]
    assert len(ops) == (1 if path == "fused" else 0)


def test_more_ranks_than_the_kernels_take_together(device):
    x, tensors = make(device)
    for kind, shapes in (("lora_As", [(r, 24) for r in (200, 60, 9)]), ("lora_Bs", [])):
        shapes = shapes or [(n, r) for n, r in zip(WIDTHS, (200, 60, 9), strict=True)]
        tensors[kind] = [torch.randn(s, device=device) for s in shapes]
    call, _ = compiled(fastlora.lora_linear_group)
    got = step(call, x, tensors, dropout_p=0.4)
    expected = step(fastlora.lora_linear_group, x, tensors, dropout_p=0.4)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("used", [(0,), (1, 2)], ids=str)
def test_outputs_that_nothing_uses(device, used):
    x, tensors = make(device)

    def some(x, **tensors):
        ys = fastlora.lora_linear_group(x, **tensors, scaling=[1.5, 0.5, 2.0])
        return [ys[i] for i in used]

    def grads(function):
        lora_As = [t.detach().requires_grad_() for t in tensors["lora_As"]]
        ys = function(x, **{**tensors, "lora_As": lora_As})
        total = sum(y.square().sum() for y in ys)
        return torch.autograd.grad(total, lora_As, allow_unused=True)

    call, _ = compiled(some)
    for i, (got, expected) in enumerate(zip(grads(call), grads(some), strict=True)):
        if i in used:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        else:  # a graph may give zeros for what nothing uses
            assert expected is None
            assert got is None or not got.any()


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_scaling_as_an_argument(device, kind):
    x, tensors = make(device)
    call, counter = compiled(
        lambda a, b: fastlora.lora_linear_group(x, **tensors, scaling=[a, b, 1])
    )
    for a, b in ((0.5, 2.0), (3.0, 1.5), (4.0, -1.0)):
        expected = fastlora.lora_linear_group(x, **tensors, scaling=[a, b, 1])
        given = [torch.tensor(f, device=device) if kind == "tensor" else f for f in (a, b)]
        torch.testing.assert_close(call(*given), expected)
    assert counter.frame_count == (1 if kind == "tensor" else 2)


def test_inductor(device):
    x, tensors = make(device, bias=(0,))
    call = torch.compile(fastlora.lora_linear_group, fullgraph=True)
    got = step(call, x, tensors, scaling=[1.5, 0.5, -2.0])
    expected = step(fastlora.lora_linear_group, x, tensors, scaling=[1.5, 0.5, -2.0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_eager_calls_do_not_pay_for_the_ops(device, monkeypatch):
    monkeypatch.setattr(ops_group, "lora_linear_group", None)
    x, tensors = make(device)
    assert len(fastlora.lora_linear_group(x, **tensors)) == 3
