"""torch.compile of many adapters in one batch: whole graphs on both paths, recompilations, the ops."""

from __future__ import annotations

import contextlib

import pytest
import torch
from compile_cases import (
    assert_alike,
    compiled,
    graphs_of,
    no_recompilation,
    opcheck,
    targets,
)
from torch._dynamo.utils import counters

import fastlora
from fastlora import AdapterStack, adapter_products, dispatch, routing_ops
from fastlora.kernels import config, config_multi

ops_multi = pytest.importorskip("fastlora.ops_multi", reason="needs Triton", exc_type=ImportError)

F32, F16 = torch.float32, torch.float16
LEAVES = ("x", "weight", "bias", "lora_A", "lora_B")
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def tensors(device, M=7, K=24, N=16, L=3, R=4, dtype=F32, adapter_dtype=None):
    shapes = {"x": (M, K), "weight": (N, K), "bias": (N,), "lora_A": (L, R, K), "lora_B": (L, N, R)}
    made = {name: torch.randn(shape, device=device) * 0.5 for name, shape in shapes.items()}
    return {n: t.to((adapter_dtype or dtype) if "lora" in n else dtype) for n, t in made.items()}


def layer(x, weight, bias, lora_A, lora_B, ids, scaling=None, ranks=None, p=0.0):
    stack = AdapterStack(lora_A, lora_B, 1.0 if scaling is None else scaling, ranks)
    return fastlora.lora_linear_multi(x, weight, stack, ids, bias=bias, dropout_p=p)


def run(call, values, *args, wanted=LEAVES, **options):
    """y and the gradients of the leaves ``wanted``."""
    leaves = [values[n].detach().clone().requires_grad_(n in wanted) for n in LEAVES]
    torch.manual_seed(1)
    y = call(*leaves, *args, **options)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.square().sum().backward()
    return {"y": y.detach()} | {n: t.grad for n, t in zip(LEAVES, leaves, strict=True)}


def check(call, values, *args, tolerance=1e-4, function=layer, **options):
    got, expected = (run(f, values, *args, **options) for f in (call, function))
    assert_alike(got, expected, tolerance)


def draw_ids(M, L, device):
    return torch.randint(-1, L, (M,), device=device)


OP_CASES = [
    # M, K, N, L, R, dtype, dtype of the adapters, dropout_p, ranks, which need a gradient
    pytest.param(7, 24, 16, 3, 4, F32, F32, 0.5, None, LEAVES, id="all"),
    pytest.param(5, 27, 13, 2, 3, F16, F32, 0.0, None, ("lora_A", "lora_B"), id="odd-fp16"),
    pytest.param(40, 16, 16, 2, 8, F32, F32, 0.2, [0, 8], ("x",), id="x"),
    pytest.param(5, 24, 16, 4, 8, F32, F32, 0.0, None, (), id="none"),
]


@pytest.mark.parametrize(
    ("M", "K", "N", "L", "R", "dtype", "adapter", "p", "ranks", "wanted"), OP_CASES
)
def test_opcheck(device, M, K, N, L, R, dtype, adapter, p, ranks, wanted):
    made = tensors(device, M, K, N, L, R, dtype, adapter)
    x, weight, bias, lora_A, lora_B = (made[n].requires_grad_(n in wanted) for n in LEAVES)
    ranks = None if ranks is None else torch.tensor(ranks, dtype=torch.int32, device=device)
    scaling, need_b = torch.rand(L, device=device) + 0.5, "lora_B" in wanted
    seed = torch.tensor(5, device=device) if p else None
    ids = torch.randint(0, L, (M,), device=device)  # of rows without an adapter s is not written
    tables = ops_multi.tables_of(fastlora.route(ids, L))
    args = (x, weight, bias, lora_A, lora_B, scaling, ranks, seed, p, need_b, tables)
    forward = torch.ops.fastlora.lora_linear_multi.default
    opcheck(forward, args)
    with torch.no_grad():
        _, s, mask = forward(*args)
        saved = (x, weight, lora_A, lora_B, s if need_b else None, mask if p else None)
        saved = (None if t is None else t.detach() for t in saved)
        needs = ("x" in wanted, "lora_A" in wanted, need_b)
        dy = torch.randn(M, N, device=device).to(dtype)
        args = (dy, *saved, scaling, ranks, p, *needs, tables)
    backward = torch.ops.fastlora.lora_linear_multi_backward.default
    opcheck(backward, args)


@pytest.mark.parametrize(("M", "L"), [(1, 1), (5, 9), (70, 3)])
def test_opcheck_of_the_routing(device, M, L):
    ids = draw_ids(M, L, device)
    route = torch.ops.fastlora.route.default
    opcheck(route, (ids, L))
    rows, _, sorted_ids = route(ids, L)
    args = (rows, sorted_ids, L)
    tables = torch.ops.fastlora.routing_tables.default
    opcheck(tables, args)
    routing = fastlora.route(ids, L)
    for key, table in routing_ops.unflattened(tables(*args), L).items():
        assert torch.equal(table, routing._table(*key))


@pytest.mark.parametrize("ranks", [None, [4, 0, 2]])
def test_opcheck_of_the_twin(device, ranks):
    made = {n: t.requires_grad_() for n, t in tensors(device).items()}
    ranks = None if ranks is None else torch.tensor(ranks, dtype=torch.int32, device=device)
    ids, scaling = draw_ids(7, 3, device), torch.rand(3, device=device)
    args = (made["x"], made["lora_A"], made["lora_B"], ids, scaling, ranks)
    forward = torch.ops.fastlora.adapter_products.default
    opcheck(forward, args)
    args = (torch.randn(7, 16, device=device), *(None if t is None else t.detach() for t in args))
    backward = torch.ops.fastlora.adapter_products_backward.default
    opcheck(backward, args)
    # The gradients that are written down, against autograd's.
    dy, *leaves = args[:4]
    leaves = [t.requires_grad_() for t in leaves]
    y = adapter_products.adapter_products(*leaves, ids, scaling, ranks)
    for got, grad in zip(backward(*args), torch.autograd.grad(y, leaves, dy), strict=True):
        torch.testing.assert_close(got, grad)


def test_every_tile_has_its_table(device):
    blocks = {
        c.BLOCK_M
        for M in (1, 16, 17, 33, 256, 257, 8192)
        for itemsize in (2, 4)
        for c in (
            config_multi.multi_gemm_tma_config(M, 4096, itemsize, 132, None),
            config_multi.multi_gemm_tma_config(M, 4096, itemsize, 132, 16),
            config.gemm_pointer_config(itemsize, "ieee"),
            config.gemm_pointer_config(itemsize, "tf32"),
        )
    }
    assert blocks == set(config_multi.MULTI_TILES)
    by_tma = config_multi.multi_gemm_tma_config
    sizes = {by_tma(M, 4096, 2, 132, R).BLOCK_M for M in (257, 1024, 8192) for R in (None, 16)}
    assert sizes == {config_multi.MULTI_SORTED_TILE}


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_one_graph_for_all_values(device, path, p):
    call, counter = compiled(layer)
    for M in (7, 9):  # a static graph, then one for every number of rows
        check(call, tensors(device, M), draw_ids(M, 3, device), torch.rand(3, device=device), p=p)
    with no_recompilation:
        for M in (12, 40) if p == 0 else (12, 8):  # other adapters, ids and scalings
            scaling = torch.rand(3, device=device)
            check(call, tensors(device, M), draw_ids(M, 3, device), scaling, p=p)
        check(call, tensors(device, 12), torch.full((12,), -1, device=device), scaling, p=p)
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_ranks_change_without_a_recompilation(device, path):
    call, _ = compiled(layer)
    scaling = torch.rand(3, device=device)
    for i, ranks in enumerate(([4, 4, 4], [0, 3, 1], [2, 0, 0])):
        ranks = torch.tensor(ranks, dtype=torch.int32, device=device)
        with no_recompilation if i else contextlib.nullcontext():
            check(call, tensors(device), draw_ids(7, 3, device), scaling, ranks)


def test_a_number_as_the_scaling(device):
    call, counter = compiled(layer)
    for scaling in (0.5, 2.0, -1.0):
        check(call, tensors(device), draw_ids(7, 3, device), scaling)
    assert counter.frame_count == 2, "torch takes a number for a constant until it sees a second"


@pytest.mark.parametrize(
    "wanted", [(), ("x",), ("lora_A",), ("lora_B",), ("bias",), ("weight", "x")]
)
def test_only_what_needs_a_gradient(device, path, wanted):
    check(compiled(layer)[0], tensors(device), draw_ids(7, 3, device), wanted=wanted)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_serving_with_s_in_parts(device, mode):
    values = tensors(device, 5, 1032)
    ids = draw_ids(5, 3, device)
    with mode():
        got = compiled(layer)[0](*values.values(), ids)
        torch.testing.assert_close(got, layer(*values.values(), ids), rtol=1e-4, atol=1e-4)


def test_half_precision_under_autocast(device, path):
    def call(*args):
        with torch.autocast(device, dtype=torch.bfloat16):
            return layer(*args)

    values, ids = tensors(device), draw_ids(7, 3, device)
    check(compiled(call)[0], values, ids, function=call, tolerance=0.03)


def two_layers(x, weight, bias, lora_A, lora_B, routing):
    x = layer(x, weight, bias, lora_A, lora_B, routing).tanh()
    return layer(x, weight.t(), None, lora_B.transpose(1, 2), lora_A.transpose(1, 2), routing)


@pytest.mark.parametrize("complete", [False, True], ids=["as-it-is", "complete"])
def test_a_routing_that_is_passed_in(device, path, complete):
    """New ones and one that is updated in place, with tables made by eager calls or without."""
    call, counter = compiled(two_layers)

    def new(ids):
        routing = fastlora.route(ids, 3)
        return routing.complete_() if complete else routing

    routing = new(draw_ids(7, 3, device))
    check(call, tensors(device), routing, function=two_layers)
    with no_recompilation:
        for ids in (draw_ids(7, 3, device), torch.full((7,), -1, device=device)):
            fresh = new(ids)
            check(call, tensors(device), fresh, function=two_layers)
            check(call, tensors(device), routing.update_(ids), function=two_layers)
    assert counter.frame_count == 1


def test_a_routing_made_in_the_graph(device, path):
    graph, counter = compiled(routed_inside)
    check(graph, tensors(device), draw_ids(7, 3, device), function=routed_inside)
    with no_recompilation:
        check(graph, tensors(device), draw_ids(7, 3, device), function=routed_inside)
    assert counter.frame_count == 1


def routed_inside(x, weight, bias, lora_A, lora_B, ids):
    return two_layers(x, weight, bias, lora_A, lora_B, fastlora.route(ids, lora_A.shape[0]))


def tables_made(call, *args):
    """How often the graph of a call makes tables; that of its backward makes none."""
    forward, *backward = map(targets, graphs_of(call, *args))
    assert len(backward) == any(t.requires_grad for t in args if isinstance(t, torch.Tensor))
    for called in backward:
        assert called.count("fastlora.lora_linear_multi_backward.default") == 2
        assert "fastlora.routing_tables.default" not in called
        assert "fastlora.lora_linear_multi.default" not in called
    assert forward.count("fastlora.lora_linear_multi.default") == 2
    return forward.count("fastlora.routing_tables.default")


def test_layers_share_the_tables(device):
    ids, values = draw_ids(7, 3, device), tensors(device)
    leaves = [t.clone().requires_grad_() for t in values.values()]
    routing, complete = fastlora.route(ids, 3), fastlora.route(ids, 3).complete_()
    assert tables_made(routed_inside, *leaves, ids) == 1
    assert tables_made(routed_inside, *values.values(), ids) == 1
    assert tables_made(two_layers, *leaves, routing) == 1
    assert tables_made(two_layers, *values.values(), routing) == 2, "complete_ is what helps here"
    assert tables_made(two_layers, *values.values(), complete) == 0


def test_a_routing_changed_before_backward_is_an_error(device):
    values = [t.requires_grad_() for t in tensors(device).values()]
    routing = fastlora.route(draw_ids(7, 3, device), 3)
    y = compiled(layer)[0](*values, routing)
    routing.update_(draw_ids(7, 3, device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_ids_a_sequence(device, path):
    def call(x, *args):
        return layer(x.view(3, -1, x.shape[-1]), *args).flatten(0, 1)

    graph, _ = compiled(call, dynamic=True)
    for tokens in (4, 5):
        check(graph, tensors(device, 3 * tokens), draw_ids(3, 3, device), function=call)


def test_adapters_trained_together(device, path):
    def call(x, weight, bias, *adapters):
        *flat, ids = adapters
        stack = fastlora.stack_adapters([(flat[0], flat[1]), (flat[2], flat[3])], [2.0, 0.5])
        return fastlora.lora_linear_multi(x, weight, stack, ids, bias=bias)

    values = tensors(device)
    flat = [torch.randn(s, device=device) for s in ((2, 24), (16, 2), (5, 24), (16, 5))]
    ids = draw_ids(7, 2, device)

    def grads(function):
        leaves = [t.clone().requires_grad_() for t in flat]
        y = function(values["x"], values["weight"], values["bias"], *leaves, ids)
        return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)

    graph, _ = compiled(call)
    for got, expected in zip(grads(graph), grads(call), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_wrong_ids_are_an_error(device, path):
    if device == "cuda":
        pytest.skip("a wrong id stops the GPU")
    values = tensors(device)
    call, _ = compiled(layer)
    call(*values.values(), draw_ids(7, 3, device))
    with no_recompilation, pytest.raises(ValueError, match="must be from -1 to 2, got 3"):
        call(*values.values(), torch.full((7,), 3))


def test_eager_calls_do_not_pay_for_the_ops(device, monkeypatch):
    for owner, name in (
        (ops_multi, "lora_linear_multi"),
        (ops_multi, "tables_of"),
        (fastlora.adapters, "route_op"),
        (adapter_products, "products_op"),
    ):
        monkeypatch.setattr(owner, name, None)
    layer(*tensors(device).values(), draw_ids(7, 3, device))
    with dispatch.force("eager"):
        layer(*tensors(device).values(), draw_ids(7, 3, device))


def test_an_op_without_s_has_no_gradient_of_lora_B(device):
    values = [t.requires_grad_() for t in tensors(device).values()]
    tables = ops_multi.tables_of(fastlora.route(draw_ids(7, 3, device), 3))
    scaling = torch.ones(3, device=device)
    y, s, _ = ops_multi.lora_linear_multi(*values, scaling, None, None, 0.0, False, tables)
    assert s.numel() == 0
    with pytest.raises(ValueError, match="need_s must be True where lora_B requires a gradient"):
        y.sum().backward()
