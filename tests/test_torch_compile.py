"""torch.compile: the registered ops, whole graphs on both paths, recompilations, dropout, what is saved."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from compile_cases import (
    check,
    compiled,
    graphs_of,
    no_recompilation,
    opcheck,
    step,
    targets,
)
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import dispatch

ops = pytest.importorskip("fastlora.ops", reason="needs Triton", exc_type=ImportError)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DOC = Path(__file__).resolve().parent.parent / "docs" / "torch_compile.md"
pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)
        self.norm = nn.LayerNorm(24)

    def forward(self, x):
        return self.norm(x + self.v_proj(nn.functional.gelu(self.q_proj(x))))


def injected(device, p=0.0):
    torch.manual_seed(0)
    model = Block().to(device)
    fastlora.inject(model, r=4, lora_alpha=8, lora_dropout=p)
    for layer in (model.q_proj, model.v_proj):
        nn.init.normal_(layer.lora_B, std=0.5)
    return model


OP_CASES = [
    # M, K, N, R, dtype, dtype of the adapters, dropout_p, tensor scaling, which need a gradient
    pytest.param(7, 24, 16, 4, F32, F32, 0.5, False, ("x", "lora_A", "lora_B"), id="all"),
    pytest.param(5, 27, 13, 3, F16, F32, 0.0, True, ("lora_A", "lora_B"), id="odd-fp16"),
    pytest.param(5, 16, 16, 8, BF16, BF16, 0.2, True, ("weight", "bias", "lora_B"), id="some-bf16"),
    pytest.param(5, 16, 16, 8, F32, F32, 0.0, False, (), id="none"),
]


@pytest.mark.parametrize(
    ("M", "K", "N", "R", "dtype", "adapter", "p", "tensor_scaling", "wanted"), OP_CASES
)
def test_opcheck(oracle, device, M, K, N, R, dtype, adapter, p, tensor_scaling, wanted):
    case = oracle.make_case(M, K, N, R, dtype, device, adapter_dtype=adapter)
    x, weight, lora_A, lora_B, bias = (
        case.tensors[n].requires_grad_(n in wanted) for n in oracle.LEAVES
    )
    seed = torch.tensor(5, device=device) if p else None
    scaling = torch.tensor(1.5, device=device) if tensor_scaling else None
    args = (x, weight, bias, lora_A, lora_B, seed, scaling, 1.5, p)
    forward, backward = (
        torch.ops.fastlora.lora_linear.default,
        torch.ops.fastlora.lora_linear_backward.default,
    )
    opcheck(forward, args)
    with torch.no_grad():
        _, s, mask = forward(*args)
        saved = (x, weight, lora_A, lora_B, s, mask if p else None, scaling)
        needs = (n in wanted for n in ("x", "lora_A", "lora_B"))
        args = (case.dy, *(None if t is None else t.detach() for t in saved), 1.5, p, *needs)
    opcheck(backward, args)


def test_the_backward_op_gives_dense_gradients(oracle, device):
    # Its fake promises contiguous ones; the launch for one gradient alone makes dB transposed.
    case = oracle.make_case(5, 16, 24, 4, F32, device)
    _, weight, lora_A, lora_B = (case.tensors[n] for n in oracle.LEAVES[:4])
    s = torch.randn(5, 4, device=device)
    none, needs = (None, None, 1.0, 0.0), (False, False, True)
    dx, da, db = ops.lora_linear_backward(case.dy, None, weight, lora_A, lora_B, s, *none, *needs)
    assert dx.numel() == da.numel() == 0
    assert db.is_contiguous()
    torch.testing.assert_close(db, case.dy.t() @ s)


def test_eager_calls_do_not_pay_for_the_ops(oracle, device, monkeypatch):
    monkeypatch.setattr(ops, "lora_linear", None)
    oracle.fused(oracle.make_case(5, 16, 8, 4, F32, device))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_function_in_one_graph(oracle, device, path, p):
    call, counter = compiled(oracle.fused_call.__globals__["fastlora"].lora_linear)
    for M in (5, 7, 12):
        case = oracle.make_case(M, 24, 16, 4, F32, device, dropout_p=p)

        def run(case, function=call):
            torch.manual_seed(oracle.SEED)
            return function(**case.tensors, scaling=case.scaling, dropout_p=case.dropout_p)

        got, expected = oracle.run(run, case), oracle.run(oracle.fused_call, case)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")
    assert counter.frame_count == 2, "one static compilation, one dynamic"
    assert not counters["graph_break"]


def test_model_compiles_once(device, path):
    # The twin's dropout is hundreds of ops to compile: `test_function_in_one_graph` has it, on one layer.
    model = injected(device, 0.4 if path == "fused" else 0.0)
    call, counter = compiled(model)
    x = torch.randn(2, 6, 24, device=device)

    check(call, model, x)
    with no_recompilation:
        for value in (0.5, -3, 1.25):  # scalings
            model.q_proj.scaling = model.v_proj.scaling = value
            check(call, model, x)
        with torch.no_grad():  # adapters: in place, and other tensors
            model.q_proj.lora_A.mul_(2)
        model.v_proj.lora_B = nn.Parameter(torch.randn(24, 4, device=device))
        check(call, model, x)
        for seed in (2, 3):
            check(call, model, x, seed)
    check(call, model, torch.randn(2, 9, 24, device=device))
    with no_recompilation:
        for tokens in (7, 11, 6):
            check(call, model, torch.randn(2, tokens, 24, device=device))
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_dynamic_from_the_start(device):
    model = injected(device, 0.4)
    call, _ = compiled(model, dynamic=True)
    step(call, model, torch.randn(2, 6, 24, device=device))
    with no_recompilation:
        for shape in ((3, 7, 24), (2, 5, 24)):
            check(call, model, torch.randn(shape, device=device))


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_scaling_as_an_argument(oracle, device, path, kind):
    tensors = oracle.make_case(5, 16, 8, 4, F32, device).tensors
    call, counter = compiled(lambda scaling: fastlora.lora_linear(**tensors, scaling=scaling))
    for value in (0.5, 2.0, 3.0, 4.0):
        scaling = torch.tensor(value, device=device) if kind == "tensor" else value
        expected = fastlora.lora_linear(**tensors, scaling=value)
        torch.testing.assert_close(call(scaling), expected)
    # torch takes a number for a constant until it sees a second one.
    assert counter.frame_count == (1 if kind == "tensor" else 2)


def test_each_dropout_probability_is_right(oracle, device, path):
    tensors = oracle.make_case(20, 16, 8, 4, F32, device).tensors
    call, _ = compiled(lambda p: fastlora.lora_linear(**tensors, dropout_p=p))
    for p in (0.5, 0.0, 0.25, 1.0, 1e-9):
        torch.manual_seed(1)
        got = call(p)
        torch.manual_seed(1)
        torch.testing.assert_close(got, fastlora.lora_linear(**tensors, dropout_p=p))


def masks(call, device, size=16):
    """The masks that forward and backward of ``call(x, weight, A, B)`` used: y is dropout(x) itself."""
    x = torch.randn(20, size, device=device).requires_grad_()
    eye = torch.eye(size, device=device)
    y = call(x, torch.zeros_like(eye), eye.clone().requires_grad_(), eye.clone())
    y.backward(torch.ones_like(y))
    return y == 0, x.grad == 0


def dropped(x, weight, a, b):
    return fastlora.lora_linear(x, weight, a, b, dropout_p=0.5)


def test_dropout_draws_in_the_graph(device, path):
    call, _ = compiled(dropped)
    torch.manual_seed(3)
    forward, backward = masks(call, device)
    assert 0.3 < forward.float().mean() < 0.7
    assert torch.equal(forward, backward)
    assert not torch.equal(masks(call, device)[0], forward)
    torch.manual_seed(3)
    assert torch.equal(masks(call, device)[0], forward)


def test_two_calls_in_a_graph_draw_two_masks(device, path):
    call, _ = compiled(lambda *t: torch.stack([dropped(*t), dropped(*t)]))
    eye = torch.eye(16, device=device)
    first, second = call(torch.randn(20, 16, device=device), torch.zeros_like(eye), eye, eye)
    assert not torch.equal(first == 0, second == 0)


def test_checkpoint_inside_a_graph_replays_the_mask(device, path):
    def twice(*t):
        return checkpoint(lambda *t: dropped(dropped(*t), *t[1:]), *t, use_reentrant=False)

    call, _ = compiled(twice)
    forward, backward = masks(call, device)
    assert torch.equal(forward, backward)
    assert 0.5 < forward.float().mean() < 0.95, "two masks of 0.5"


def test_the_graph_saves_what_eager_saves(oracle, device):
    M, K, N, R = 20, 40, 24, 4
    case = oracle.make_case(M, K, N, R, F16, device, adapter_dtype=F32, dropout_p=0.1)
    leaves = [t.requires_grad_(n in ("x", "lora_A", "lora_B")) for n, t in case.tensors.items()]

    def call(x, weight, lora_A, lora_B, bias):
        return fastlora.lora_linear(x, weight, lora_A, lora_B, bias=bias, dropout_p=0.1)

    forward, backward = graphs_of(call, *leaves)
    called = targets(backward)
    assert called.count("fastlora.lora_linear_backward.default") == 1
    assert "fastlora.lora_linear.default" not in called
    values = [node.meta["val"] for node in forward.graph.output_node().args[0]]
    shapes = {(tuple(v.shape), v.dtype) for v in values[1:]}
    own = {(tuple(leaves[i].shape), leaves[i].dtype) for i in range(4)}
    assert shapes == own | {((M, R), F16), ((M, K // 8), torch.uint8), ((), F32)}
    assert len(values) == 1 + 7


def test_the_eager_twin_recomputes_no_product(oracle, device):
    case = oracle.make_case(20, 40, 24, 4, F32, device)
    leaves = [case.tensors[n].requires_grad_(n != "weight") for n in oracle.LEAVES[:4]]
    with dispatch.force("eager"):
        forward, backward = graphs_of(fastlora.lora_linear, *leaves)
    count = [targets(graph).count("aten.mm.default") for graph in (forward, backward)]
    assert count == [3, 5]  # x A^T, x W^T, s B^T; dy W, dy B, dA, dB and ds A


def test_autocast_of_a_model_in_its_dtype_leaves_the_op(device):
    """There is nothing to cast then; where it was cast nevertheless, torch 2.11 took the eager twin."""
    model = injected(device, p=0.25).to(BF16)
    for layer in (model.q_proj, model.v_proj):
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    x = torch.randn(5, 24, dtype=BF16, device=device)
    with torch.autocast(device, dtype=BF16):
        forward, backward = graphs_of(model, x)
    assert sum("fastlora.lora_linear.default" in name for name in targets(forward)) == 2
    assert sum("fastlora.lora_linear_backward" in name for name in targets(backward)) == 2


def test_autocast(device, path):
    model = injected(device, 0.4)

    def call(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            return model(x)

    x = torch.randn(2, 6, 24, device=device)
    check(compiled(call)[0], model, x, tolerance=0.02, function=call)


def test_force_is_part_of_what_a_graph_was_made_for(oracle, device):
    tensors = oracle.make_case(5, 16, 8, 4, F32, device).tensors
    found = []

    def backend(graph, _):
        found.append(graph.code)
        return graph.forward

    call = torch.compile(fastlora.lora_linear, backend=backend, fullgraph=True)
    call(**tensors)
    with dispatch.force("eager"):
        call(**tensors)
    call(**tensors)
    assert [("fastlora.lora_linear" in code) for code in found] == [True, False]


def test_the_decision_itself_can_be_traced(oracle, device, path):
    tensors = oracle.make_case(5, 16, 8, 4, F32, device, bias=False).tensors
    call, _ = compiled(lambda x, *t: x + dispatch.decide_for(x, *t).fused, dynamic=True)
    x = tensors["x"]
    assert torch.equal(call(*tensors.values()), x + (path == "fused"))


def test_no_grad_and_inference_mode(device, path):
    model = injected(device)
    call, _ = compiled(model)
    x = torch.randn(2, 6, 24, device=device)
    expected = model(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = call(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected)


def test_the_scaling_follows_the_weight():
    layer = injected("cpu").q_proj
    layer.scaling = 1 / 3
    for move in (lambda m: m.half(), lambda m: m.to("meta"), lambda m: m.to_empty(device="cpu")):
        move(layer)
        held = layer._scaling_tensor
        assert (held.device.type, held.dtype) == ("cpu", F32)
        assert held == torch.tensor(1 / 3)
    assert layer.double()._scaling_tensor.dtype == torch.float64
    assert "scaling" not in " ".join([*layer.state_dict(), *dict(layer.named_buffers())])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "default"])
def test_torch_export(device, strict):
    model = injected(device).eval()
    x = torch.randn(2, 6, 24, device=device)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
    if strict:
        assert targets(program).count("fastlora.lora_linear.default") == 2


def test_inductor_with_dropout(device, path):
    # Inductor has a generator of its own, so the mask is read off y, which is dropout(x) here.
    call, _ = compiled(dropped, "inductor")
    eye = torch.eye(16, device=device)
    x, a, b = torch.randn(20, 16, device=device), eye.clone(), eye.clone()
    leaves = [t.requires_grad_() for t in (x, a, b)]
    torch.manual_seed(3)
    y = call(x, torch.zeros_like(eye), a, b)
    keep = y != 0
    assert 0.3 < keep.float().mean() < 0.7
    torch.testing.assert_close(y, 2 * x * keep)
    dx, da, db = torch.autograd.grad(y.sum(), leaves)
    torch.testing.assert_close(dx, 2.0 * keep)
    for grad, sums in ((da, y.sum(0).expand(16, 16)), (db, y.sum(0).expand(16, 16))):
        torch.testing.assert_close(grad, sums)
    with no_recompilation:
        assert not torch.equal(call(x, torch.zeros_like(eye), a, b) != 0, keep)
        torch.manual_seed(3)
        assert torch.equal(call(x, torch.zeros_like(eye), a, b), y)


def test_inductor_trains_a_model(device):
    model = injected(device)
    call, counter = compiled(model, "inductor")
    check(call, model, torch.randn(2, 6, 24, device=device))
    assert counter.frame_count == 1
    assert not counters["graph_break"]


def test_the_example_of_the_docs(run_python):
    # Without the interpreter, so on the path that a user without a GPU gets.
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.S)
    option = "fullgraph=True"
    assert code.count(option) == 1
    code = code.replace(option, f"{option}, backend='aot_eager'")  # inductor takes its time
    assert run_python(code) == "torch.Size([2, 11, 64])"
