"""torch.compile of the embedding, the merged linear and DoRA: ops, graphs, recompilations, dropout."""

from __future__ import annotations

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

import fastlora
from fastlora import dora, embedding, merged_linear

ops_embedding = pytest.importorskip(
    "fastlora.ops_embedding", reason="needs Triton", exc_type=ImportError
)
ops_merged = pytest.importorskip("fastlora.ops_merged", reason="needs Triton", exc_type=ImportError)
ops_dora = pytest.importorskip("fastlora.ops_dora", reason="needs Triton", exc_type=ImportError)
ops_shrink = pytest.importorskip("fastlora.ops_shrink", reason="needs Triton", exc_type=ImportError)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WIDTHS, ENABLED, BOUNDS = (16, 8, 24), (True, False, True), [0, 16, 24, 48]
pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Tables(nn.Module):
    """Ids to 12 numbers each."""

    name, inputs, p = "embedding", "ids", 0.0

    def __init__(self, p=0.0):
        super().__init__()
        self.layer = fastlora.LoRAEmbedding(nn.Embedding(20, 12, padding_idx=2), 3, 6)
        nn.init.normal_(self.layer.lora_A)

    def forward(self, ids):
        return self.layer(ids)


class Slices(nn.Module):
    """q, k and v of which two are adapted."""

    name, inputs = "merged", "x"

    def __init__(self, p=0.0):
        super().__init__()
        self.layer = fastlora.LoRAMergedLinear(
            24, 48, 4, 8, p, ENABLED, widths=WIDTHS, adapter_dtype=F32
        )
        nn.init.normal_(self.layer.lora_B)

    def forward(self, x):
        return self.layer(x)


class Dora(nn.Module):
    name, inputs = "dora", "x"

    def __init__(self, p=0.0):
        super().__init__()
        self.p, self.scaling = p, torch.tensor(1.5)
        self.weight = nn.Parameter(torch.randn(16, 24) * 0.2, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(16), requires_grad=False)
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.randn(4, 24)),
            nn.Parameter(torch.randn(16, 4)),
        )
        self.magnitude = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x):
        return fastlora.dora_linear(
            x, self.weight, self.lora_A, self.lora_B, self.magnitude, bias=self.bias,
            scaling=self.scaling, dropout_p=self.p, training=self.training,
        )  # fmt: skip


KINDS = pytest.mark.parametrize("kind", [Tables, Slices, Dora], ids=lambda kind: kind.name)


def draw(kind, *shape, device):
    if kind.inputs == "ids":
        return torch.randint(0, 20, shape, device=device)
    return torch.randn(*shape, 24, device=device)


def set_scaling(model, value):
    if isinstance(model, Dora):
        model.scaling.fill_(value)
    else:
        model.layer.scaling = value


@KINDS
def test_one_graph_for_all_values(kind, device, path):
    # The twin's dropout is hundreds of ops to compile: `test_torch_compile.py` has it.
    model = kind(0.4 if path == "fused" else 0.0).to(device)
    call, counter = compiled(model)
    check(call, model, draw(kind, 2, 6, device=device))
    with no_recompilation:
        for value in (0.5, -3, 1.25):
            set_scaling(model, value)
            check(call, model, draw(kind, 2, 6, device=device))
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_A" in n).mul_(2)
        for seed in (2, 3):
            check(call, model, draw(kind, 2, 6, device=device), seed)
    check(call, model, draw(kind, 2, 9, device=device))
    with no_recompilation:
        for tokens in (7, 11, 6):
            check(call, model, draw(kind, 2, tokens, device=device))
    assert counter.frame_count == 2, "one static compilation, one dynamic"
    assert not counters["graph_break"]


@KINDS
def test_dynamic_from_the_start(kind, device):
    model = kind(0.4).to(device)
    call, _ = compiled(model, dynamic=True)
    check(call, model, draw(kind, 2, 6, device=device))
    with no_recompilation:
        for shape in ((3, 7), (2, 5)):
            check(call, model, draw(kind, *shape, device=device))


@KINDS
def test_a_new_scaling_is_used(kind, device, path):
    model = kind().to(device)
    call, _ = compiled(model)
    x = draw(kind, 5, device=device)
    set_scaling(model, 1.0)
    one = call(x).detach()
    with no_recompilation:
        set_scaling(model, -2.0)
        two = call(x).detach()
    assert not torch.allclose(one, two)
    torch.testing.assert_close(two, model(x).detach(), rtol=1e-4, atol=1e-4)


def arguments(kind, device):
    """The function of a kind, and its tensors, the first of which are its inputs."""
    model = kind().to(device)
    source = model if kind is Dora else model.layer
    tensors = [draw(kind, 7, device=device), source.weight, source.lora_A, source.lora_B]
    tensors = [t.detach() for t in tensors]
    if kind is Tables:
        return fastlora.lora_embedding, tensors, {}
    if kind is Dora:
        return fastlora.dora_linear, [*tensors, source.magnitude.detach()], {}
    return fastlora.lora_merged_linear, tensors, {"widths": WIDTHS, "enable_lora": ENABLED}


@KINDS
@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "float"])
def test_scaling_as_an_argument(kind, device, path, as_tensor):
    function, tensors, options = arguments(kind, device)
    call, counter = compiled(lambda scaling: function(*tensors, scaling=scaling, **options))
    for value in (0.5, 2.0, 3.0, 4.0):
        expected = function(*tensors, scaling=value, **options)
        got = call(torch.tensor(value, device=device) if as_tensor else value)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # torch takes a number for a constant until it sees a second one.
    assert counter.frame_count == (1 if as_tensor else 2)


@KINDS
def test_half_precision_and_modes_without_gradients(kind, device, path):
    model = kind().to(device)
    model.to(BF16)
    call, _ = compiled(model)
    x = draw(kind, 2, 5, device=device)
    x = x.to(BF16) if x.is_floating_point() else x
    check(call, model, x, tolerance=0.05)
    expected = model(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = call(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", [Slices, Dora], ids=lambda kind: kind.name)
def test_every_call_draws_a_mask(kind, device):
    model = kind(0.5).to(device)
    call, _ = compiled(model)
    x = torch.randn(8, 24, device=device)
    torch.manual_seed(3)
    first, second = call(x), call(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(call(x), first)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"padding_idx": -1}, {"sparse": True}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_embedding(options, device):
    def run(function):
        torch.manual_seed(0)
        weight = torch.randn(10, 8, device=device)
        a = torch.randn(3, 10, device=device, requires_grad=True)
        b = torch.randn(8, 3, device=device, requires_grad=True)
        y = function(torch.tensor([[1, 2], [2, 9]], device=device), weight, a, b, **options)
        y.square().sum().backward()
        return y.detach(), weight, a.detach(), a.grad.to_dense(), b.grad

    call, _ = compiled(fastlora.lora_embedding)
    for got, expected in zip(run(call), run(fastlora.lora_embedding), strict=True):
        torch.testing.assert_close(got, expected)


def test_wrong_ids_are_an_error(device):
    if device == "cuda":
        pytest.skip("a wrong id stops the GPU")
    call, _ = compiled(fastlora.lora_embedding)
    tensors = torch.randn(10, 8), torch.randn(3, 10), torch.randn(8, 3)
    call(torch.tensor([1, 2, 3]), *tensors)
    with no_recompilation, pytest.raises(IndexError, match="from 0 to 9, got 10"):
        call(torch.tensor([1, 10, 3]), *tensors)


@pytest.mark.parametrize(
    ("kind", "op"),
    [(Tables, "lora_embedding"), (Slices, "lora_merged_linear"), (Dora, "dora_linear")],
)
def test_nothing_is_computed_twice(kind, op, device):
    model = kind().to(device)
    forward, backward = map(targets, graphs_of(model, draw(kind, 5, device=device)))
    assert forward.count(f"fastlora.{op}.default") == 1
    assert backward.count(f"fastlora.{op}_backward.default") == 1
    assert f"fastlora.{op}.default" not in backward


def test_dora_makes_its_mask_with_the_kernel(device):
    model, x = Dora(0.3).to(device), torch.randn(5, 24, device=device)
    forward, backward = map(targets, graphs_of(model, x))
    assert forward.count("fastlora.lora_shrink.default") == 1
    assert forward.count("fastlora.dora_linear.default") == 1
    assert "fastlora.lora_shrink.default" not in backward


@pytest.mark.parametrize(
    ("wanted", "dtype", "adapter", "as_tensor"),
    [
        pytest.param(("weight", "lora_A", "lora_B"), F32, F32, True, id="all"),
        pytest.param(("lora_A",), F16, F32, False, id="A-fp16"),
        pytest.param(("lora_B",), BF16, BF16, True, id="B-bf16"),
        pytest.param((), F32, F32, False, id="none"),
    ],
)
def test_opcheck_of_the_embedding(device, wanted, dtype, adapter, as_tensor):
    M, V, N, R = 7, 11, 13, 3
    tensors = {
        "weight": torch.randn(V, N, device=device).to(dtype),
        "lora_A": torch.randn(R, V, device=device).to(adapter),
        "lora_B": torch.randn(N, R, device=device).to(adapter),
    }
    for name in wanted:
        tensors[name].requires_grad_()
    ids = torch.randint(0, V, (M,), device=device)
    scaling = torch.tensor(1.5, device=device) if as_tensor else None
    need_b = "lora_B" in wanted
    args = (ids, *tensors.values(), scaling, 1.5, need_b, 2, False, False)
    opcheck(torch.ops.fastlora.lora_embedding.default, args)
    with torch.no_grad():
        _, s = torch.ops.fastlora.lora_embedding.default(*args)
    dy = torch.randn(M, N, device=device).to(dtype)
    needs = "lora_A" in wanted, need_b
    lora_B = tensors["lora_B"].detach()
    args = (dy, s if need_b else None, lora_B, scaling, 1.5, *needs)
    if any(needs):
        opcheck(torch.ops.fastlora.lora_embedding_backward.default, args)


@pytest.mark.parametrize(
    ("wanted", "dtype", "p", "as_tensor"),
    [
        pytest.param(("x", "weight", "bias", "lora_A", "lora_B"), F32, 0.5, True, id="all"),
        pytest.param(("lora_A", "lora_B"), F16, 0.0, False, id="adapters-fp16"),
        pytest.param(("x",), BF16, 0.2, True, id="x-bf16"),
        pytest.param((), F32, 0.0, False, id="none"),
    ],
)
def test_opcheck_of_the_merged_linear(device, wanted, dtype, p, as_tensor):
    M, K, N, R = 5, 24, 48, 4
    shapes = {"x": (M, K), "weight": (N, K), "bias": (N,), "lora_A": (2 * R, K), "lora_B": (40, R)}
    made = {n: torch.randn(s, device=device).to(dtype) for n, s in shapes.items()}
    for name in wanted:
        made[name].requires_grad_()
    seed = torch.tensor(5, device=device) if p else None
    scaling = torch.tensor(1.5, device=device) if as_tensor else None
    args = (*made.values(), seed, scaling, 1.5, p, BOUNDS)
    opcheck(torch.ops.fastlora.lora_merged_linear.default, args)
    with torch.no_grad():
        _, s, mask = torch.ops.fastlora.lora_merged_linear.default(*args)
    x, weight, _, lora_A, lora_B = (t.detach() for t in made.values())
    needs = ("x" in wanted, "lora_A" in wanted, "lora_B" in wanted)
    dy = torch.randn(M, N, device=device).to(dtype)
    args = (dy, x, weight, lora_A, lora_B, s, mask if p else None, scaling, 1.5, p, BOUNDS, *needs)
    opcheck(torch.ops.fastlora.lora_merged_linear_backward.default, args)


@pytest.mark.parametrize(
    ("wanted", "dtype", "adapter", "as_tensor"),
    [
        pytest.param(
            ("x", "weight", "bias", "lora_A", "lora_B", "magnitude"), F32, F32, True, id="all"
        ),
        pytest.param(("lora_A", "lora_B", "magnitude"), F16, F32, False, id="adapters-fp16"),
        pytest.param(("magnitude",), BF16, BF16, True, id="magnitude-bf16"),
        pytest.param(("x",), F16, F16, False, id="x-fp16"),
        pytest.param((), F32, F32, False, id="none"),
    ],
)
def test_opcheck_of_dora(device, wanted, dtype, adapter, as_tensor):
    M, K, N, R = 7, 24, 16, 3
    shapes = {"x": (M, K), "weight": (N, K), "bias": (N,)}
    made = {n: torch.randn(s, device=device).to(dtype) for n, s in shapes.items()}
    shapes = {"lora_A": (R, K), "lora_B": (N, R), "magnitude": (N,)}
    made |= {n: torch.randn(s, device=device).to(adapter) for n, s in shapes.items()}
    for name in wanted:
        made[name].requires_grad_()
    scaling = torch.tensor(1.5, device=device) if as_tensor else None
    keep_z = "magnitude" in wanted
    args = (*made.values(), scaling, 1.5, keep_z)
    opcheck(torch.ops.fastlora.dora_linear.default, args)
    with torch.no_grad():
        _, s, g, norm, z = torch.ops.fastlora.dora_linear.default(*args)
    x, weight, _, lora_A, lora_B, magnitude = (t.detach() for t in made.values())
    dy = torch.randn(M, N, device=device).to(dtype)
    needs = [name in wanted for name in ("x", "weight", "lora_A", "lora_B")]
    kept = z if keep_z else None
    args = (dy, x, weight, lora_A, lora_B, magnitude, s, g, norm, kept, scaling, 1.5, *needs)
    opcheck(torch.ops.fastlora.dora_linear_backward.default, args)


def test_dora_without_z_has_no_gradient_of_the_magnitude(device):
    tensors = torch.randn(2, 8), torch.randn(4, 8), torch.randn(3, 8), torch.randn(4, 3)
    x, weight, a, b = (t.to(device) for t in tensors)
    magnitude = torch.ones(4, device=device, requires_grad=True)
    y, *_, z = ops_dora.dora_linear(x, weight, None, a, b, magnitude, None, 1.0, False)
    assert z.numel() == 0
    with pytest.raises(ValueError, match="keep_z must be True where magnitude requires a grad"):
        y.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck_of_the_shrink(device, p):
    x, lora_A = torch.randn(5, 27, device=device).to(F16), torch.randn(3, 27, device=device)
    seed = torch.tensor(5, device=device) if p else None
    opcheck(torch.ops.fastlora.lora_shrink.default, (x, lora_A, p, seed))


def test_an_op_without_s_has_no_gradient_of_lora_B(device):
    ids = torch.tensor([1, 2], device=device)
    tensors = torch.randn(4, 8), torch.randn(3, 4), torch.randn(8, 3)
    tensors = [t.to(device).requires_grad_() for t in tensors]
    y, s = ops_embedding.lora_embedding(ids, *tensors, None, 1.0, False, -1, False, False)
    assert s.numel() == 0
    with pytest.raises(ValueError, match="need_s must be True where lora_B requires a gradient"):
        y.sum().backward()


@KINDS
def test_no_double_backward(kind, device):
    function, tensors, options = arguments(kind, device)
    tensors = [t.requires_grad_(t.is_floating_point()) for t in tensors]
    y = compiled(lambda *t: function(*t, **options), "eager")[0](*tensors)
    b = tensors[3]
    with pytest.raises(RuntimeError, match="no double backward"):
        (grad,) = torch.autograd.grad(y.square().sum(), b, create_graph=True)
        grad.sum().backward()


def test_eager_calls_do_not_pay_for_the_ops(device, monkeypatch):
    monkeypatch.setattr(embedding, "ops_embedding", None)
    monkeypatch.setattr(merged_linear, "ops_merged", None)
    monkeypatch.setattr(ops_shrink, "shrink_op", None)
    monkeypatch.setattr(dora, "ops_dora", None)
    for kind in (Tables, Slices, Dora):
        model = kind(0.2).to(device)
        step(model, model, draw(kind, 5, device=device))


@KINDS
def test_inductor(kind, device):
    model = kind().to(device)
    call, counter = compiled(model, "inductor")
    check(call, model, draw(kind, 2, 5, device=device))
    assert counter.frame_count == 1
    assert not counters["graph_break"]
