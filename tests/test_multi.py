"""Many adapters in one batch: values and every gradient against single-adapter calls in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlora
from fastlora import AdapterStack, lora_linear_multi, reference
from fastlora.dispatch import decide_for, force
from fastlora.kernels.config import keep_scale

HAS_CUDA = torch.cuda.is_available()
LEAVES = ("x", "weight", "lora_A", "lora_B", "bias")


@dataclass(frozen=True)
class Batch:
    """The arguments of one call, and the gradient ``dy`` that comes back to it."""

    tensors: dict[str, Tensor]
    ids: Tensor
    scaling: Tensor
    ranks: Tensor | None
    dy: Tensor
    dropout_p: float = 0.0

    def double(self) -> Batch:
        tensors = {name: t.double() for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, dy=self.dy.double(), scaling=self.scaling.double())


def make(M, K, N, L, R, dtype, device, *, ids=None, ranks=None, adapter_dtype=None, p=0.0):
    adapter = adapter_dtype or dtype

    def draw(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    tensors = {
        "x": draw(M, K),
        "weight": draw(N, K, scale=K**-0.5),
        "lora_A": draw(L, R, K, scale=K**-0.5, dtype=adapter),
        "lora_B": draw(L, N, R, scale=R**-0.5, dtype=adapter),
        "bias": draw(N),
    }
    ids = torch.randint(-1, L, (M,)) if ids is None else torch.as_tensor(ids)
    if ranks is not None:
        ranks = torch.tensor(ranks, dtype=torch.int32, device=device)
    scaling = torch.rand(L, device=device) + 0.5
    return Batch(tensors, ids.to(device), scaling, ranks, draw(M, N), p)


def fused_call(b: Batch) -> Tensor:
    t = b.tensors
    stack = AdapterStack(t["lora_A"], t["lora_B"], b.scaling, b.ranks)
    assert decide_for(t["x"], t["weight"], t["lora_A"], t["lora_B"]).fused
    torch.manual_seed(1)
    return lora_linear_multi(
        t["x"], t["weight"], stack, b.ids, bias=t["bias"], dropout_p=b.dropout_p
    )


def by_adapter(b: Batch, single) -> Tensor:
    """The rows of each adapter through ``single(rows of x, rows kept, A, B, scaling)``, put back in place."""
    t = b.tensors
    torch.manual_seed(1)
    M, K = t["x"].shape
    keep = torch.ones(M, K, dtype=torch.bool, device=t["x"].device)
    if b.dropout_p:
        seed = reference.draw_seed(t["x"].device)
        keep = reference.dropout_keep_mask(seed, M, K, b.dropout_p, t["x"].device)
    out = t["x"].new_zeros(M, t["weight"].shape[0])
    for slot in range(-1, len(t["lora_A"])):
        rows = (b.ids == slot).nonzero().squeeze(1)
        r = t["lora_A"].shape[1] if b.ranks is None or slot < 0 else int(b.ranks[slot])
        if slot < 0 or r == 0:
            y = F.linear(t["x"][rows], t["weight"], t["bias"])
            y = y + 0 * (t["lora_A"].sum() + t["lora_B"].sum()).to(y.dtype)
        else:
            a, bb = t["lora_A"][slot, :r], t["lora_B"][slot, :, :r]
            y = single(t, rows, keep[rows], a, bb, b.scaling[slot], b.dropout_p)
        out = out.index_add(0, rows, y)
    return out


def plain_single(t, rows, keep, a, b, scaling, p) -> Tensor:
    """PEFT's forward of one adapter, in the dtype of x."""
    x = t["x"][rows]
    dropped = torch.where(keep, x * keep_scale(p), 0) if p else x
    branch = F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, t["weight"], t["bias"]) + (branch * scaling).to(x.dtype)


def run(call, b: Batch, wanted=LEAVES) -> dict[str, Tensor]:
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in b.tensors.items()}
    y = call(replace(b, tensors=leaves))
    assert y.requires_grad == bool(wanted)
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], b.dy) if wanted else ()
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def check(oracle, b: Batch, wanted=LEAVES) -> dict[str, Tensor]:
    got = run(fused_call, b, wanted)
    plain = run(lambda b: by_adapter(b, plain_single), b, wanted)
    exact = run(lambda b: by_adapter(b, plain_single), b.double(), wanted)
    dtype = b.tensors["x"].dtype
    for name, truth in exact.items():
        depth = oracle.depth_of(name, b.tensors["x"], b.dy)
        oracle.assert_close(got[name], plain[name], truth, dtype, name, depth)
        assert got[name].dtype == b.tensors.get(name, b.tensors["x"]).dtype
    for name in ("lora_A", "lora_B"):
        if name in got:
            unused = [slot for slot in range(len(got[name])) if not (b.ids == slot).any()]
            assert not got[name][unused].any(), "exact zeros for adapters that no row uses"
    return got


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [
    pytest.param({"M": 1, "K": 64, "N": 48, "L": 2, "R": 4, "ids": [1]}, id="one-row"),
    pytest.param({"M": 5, "K": 40, "N": 24, "L": 3, "R": 8, "ids": [-1] * 5}, id="all-base"),
    pytest.param({"M": 40, "K": 72, "N": 56, "L": 1, "R": 16, "ids": [0] * 40}, id="one-adapter"),
    pytest.param(
        {"M": 33, "K": 37, "N": 51, "L": 40, "R": 3, "ids": list(range(33))}, id="all-differ"
    ),
    pytest.param({"M": 129, "K": 130, "N": 70, "L": 6, "R": 16}, id="random"),
    pytest.param(
        {"M": 70, "K": 64, "N": 136, "L": 5, "R": 64, "ranks": [1, 64, 0, 8, 33]}, id="mixed-ranks"
    ),
    pytest.param(
        {"M": 20, "K": 48, "N": 40, "L": 3, "R": 130, "ranks": [130, 1, 70]}, id="many-ranks"
    ),
    pytest.param(
        {"M": 300, "K": 72, "N": 40, "L": 4, "R": 8, "ids": sorted([i % 4 for i in range(300)])},
        id="segments",
    ),
]
if HAS_CUDA:
    CASES += [
        pytest.param({"M": 8192, "K": 4096, "N": 4096, "L": 32, "R": 16}, id="8192-random"),
        pytest.param(
            {"M": 8192, "K": 4096, "N": 1024, "L": 4, "R": 256, "ranks": [256, 8, 64, 0]},
            id="8192-mixed-ranks",
        ),
        pytest.param({"M": 64, "K": 4096, "N": 14336, "L": 200, "R": 16}, id="decode-64"),
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_values_and_gradients(oracle, device, case, p):
    check(oracle, make(dtype=F32, device=device, p=p, **case))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES[4:6])
def test_half_precision_with_fp32_adapters(oracle, device, case, dtype):
    check(oracle, make(dtype=dtype, adapter_dtype=F32, device=device, p=0.1, **case))


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize(("M", "K"), [(1, 1032), (17, 1032), (40, 1032), (130, 1032), (257, 136)])
def test_serving(oracle, device, dtype, M, K):
    """No gradients: up to 256 rows the frozen product streams W, and s comes in parts over a long K."""
    b = make(M, K, 72, 5, 16, dtype, device, ranks=[16, 3, 0, 8, 16])
    check(oracle, b, wanted=())


@pytest.mark.parametrize("wanted", [("x",), ("lora_A",), ("lora_B",), ("bias",), ("weight", "x")])
def test_only_what_needs_a_gradient(oracle, device, wanted):
    check(oracle, make(70, 40, 24, 3, 8, F32, device, p=0.2), wanted)


def test_layouts(oracle, device):
    """A transposed weight (Conv1D's), strided x and stacks that are views of a larger pool."""
    b = make(45, 72, 56, 3, 8, F32, device)
    t = dict(b.tensors)
    t["x"] = torch.randn(45, 144, device=device)[:, ::2]
    t["weight"] = t["weight"].t().contiguous().t()
    pool_a, pool_b = torch.randn(3, 32, 72, device=device), torch.randn(3, 56, 32, device=device)
    t["lora_A"], t["lora_B"] = pool_a[:, 4:12], pool_b[:, :, 8:16]
    check(oracle, replace(b, tensors=t))


def test_the_stale_rest_of_a_slot_reaches_nothing(device):
    ranks = [3, 0, 8, 5]
    b = make(50, 64, 48, 4, 8, F32, device, ranks=ranks, p=0.2)
    clean = run(fused_call, b)
    t = {name: tensor.clone() for name, tensor in b.tensors.items()}
    for slot, r in enumerate(ranks):
        t["lora_A"][slot, r:] = float("nan")
        t["lora_B"][slot, :, r:] = float("inf")
    stale = run(fused_call, replace(b, tensors=t))
    for name, value in clean.items():
        assert torch.equal(value, stale[name]), name


def test_equals_the_single_adapter_op_with_the_same_mask(device):
    b = make(64, 72, 56, 3, 8, F32, device, ids=[1] * 64, p=0.4)
    t = b.tensors
    torch.manual_seed(1)
    single = fastlora.lora_linear(
        t["x"], t["weight"], t["lora_A"][1], t["lora_B"][1],
        bias=t["bias"], scaling=float(b.scaling[1]), dropout_p=0.4,
    )  # fmt: skip
    assert torch.allclose(fused_call(b), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["fused", "eager"])
def test_ids_a_sequence_and_shared_routing(device, path):
    b = make(12, 32, 24, 3, 4, F32, device)
    t, ids = b.tensors, torch.tensor([2, -1, 0], device=device)
    x, rows = t["x"].view(3, 4, 32), ids.repeat_interleave(4)
    pair = (t["lora_A"], t["lora_B"])
    guard = force("eager") if path == "eager" else torch.enable_grad()
    with guard:
        a_sequence = lora_linear_multi(x, t["weight"], pair, ids, scaling=2.0)
        a_row = lora_linear_multi(x, t["weight"], pair, rows.view(3, 4), scaling=2.0)
        routing = fastlora.route(rows, 3)
        routed = lora_linear_multi(x, t["weight"], pair, routing, scaling=2.0)
    assert a_sequence.shape == (3, 4, 24)
    assert torch.equal(a_sequence, a_row)
    assert torch.equal(a_sequence, routed)
    base = F.linear(x, t["weight"])
    assert torch.allclose(a_sequence[1], base[1], atol=1e-5)
    assert not torch.allclose(a_sequence[0], base[0], atol=1e-2)


def test_routing_updated_in_place_serves_other_ids(oracle, device):
    b = make(40, 64, 48, 4, 8, F32, device)
    t = b.tensors
    stack = AdapterStack(t["lora_A"], t["lora_B"], b.scaling)
    routing = fastlora.route(b.ids, 4)
    lora_linear_multi(t["x"], t["weight"], stack, routing, bias=t["bias"])
    for ids in (torch.full((40,), -1), torch.arange(40) % 4, torch.randint(-1, 4, (40,))):
        other = replace(b, ids=ids.to(device))
        routing.update_(other.ids)
        got = lora_linear_multi(t["x"], t["weight"], stack, routing, bias=t["bias"])
        assert torch.equal(got, run(fused_call, other, ())["y"])


def test_a_routing_changed_before_backward_is_an_error(device):
    b = make(8, 32, 24, 2, 4, F32, device)
    t = {name: tensor.requires_grad_() for name, tensor in b.tensors.items()}
    routing = fastlora.route(b.ids, 2)
    y = lora_linear_multi(t["x"], t["weight"], (t["lora_A"], t["lora_B"]), routing)
    routing.update_(b.ids)
    with pytest.raises(RuntimeError, match="changed by update_ before its backward"):
        y.sum().backward()


def test_eager_twin_agrees_and_gives_zeros_where_no_adapter_occurs(device):
    b = make(30, 40, 24, 4, 8, F32, device, ids=[-1] * 10 + [2] * 20, p=0.3, ranks=[8, 8, 5, 0])
    got = run(fused_call, b)

    def eager(b):
        t = b.tensors
        torch.manual_seed(1)
        stack = AdapterStack(t["lora_A"], t["lora_B"], b.scaling, b.ranks)
        with force("eager"):
            return lora_linear_multi(
                t["x"], t["weight"], stack, b.ids, bias=t["bias"], dropout_p=b.dropout_p
            )

    for name, value in run(eager, b).items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-4), name
    base = run(eager, replace(b, ids=torch.full_like(b.ids, -1)))
    assert not base["lora_A"].any()
    assert not base["lora_B"].any()


def test_bit_identical_from_run_to_run(device):
    b = make(200, 72, 40, 3, 16, F16, device, p=0.1)
    first, second = run(fused_call, b), run(fused_call, b)
    assert all(torch.equal(first[name], second[name]) for name in first)


def arguments(device, **changes):
    t = make(6, 16, 12, 3, 4, F32, device).tensors
    given = {
        "x": t["x"],
        "weight": t["weight"],
        "adapters": AdapterStack(t["lora_A"], t["lora_B"]),
        "adapter_ids": torch.tensor([0, 1, 2, -1, 0, 1], device=device),
    }
    return {**given, **changes}


def stack(**changes):
    return AdapterStack(
        **{"lora_A": torch.zeros(3, 4, 16), "lora_B": torch.zeros(3, 12, 4), **changes}
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"adapters": [1, 2]}, TypeError, "adapters must be an AdapterStack or a pair"),
        ({"adapters": stack(lora_A=torch.zeros(4, 16))}, ValueError, "lora_A must be 3-D"),
        (
            {"adapters": stack(lora_B=torch.zeros(2, 12, 4))},
            ValueError,
            r"lora_B must be \(adapters, out_features, r\)=\(3, 12, 4\), got \(2, 12, 4\)",
        ),
        (
            {"adapters": AdapterStack(torch.zeros(0, 4, 16), torch.zeros(0, 12, 4))},
            ValueError,
            "at least one adapter",
        ),
        (
            {"adapters": stack(scaling=torch.ones(2))},
            ValueError,
            r"scaling must be a number or a float tensor \(3,\), got torch.float32 of shape \(2,\)",
        ),
        ({"scaling": "2"}, TypeError, "scaling must be a number or a Tensor, got str"),
        ({"scaling": torch.ones(3, requires_grad=True)}, ValueError, "scaling must not require"),
        ({"adapters": stack(ranks=torch.ones(3))}, TypeError, "ranks must be an int32 Tensor"),
        (
            {"adapters": stack(ranks=torch.ones(2, dtype=torch.int32))},
            ValueError,
            r"ranks must be \(3,\)",
        ),
        ({"adapter_ids": [0]}, TypeError, "adapter_ids must be a Tensor or a Routing, got list"),
        (
            {"adapter_ids": torch.zeros(5, dtype=torch.int64)},
            ValueError,
            r"adapter_ids must be one a row, \(6,\), or one a sequence, \(6,\), got \(5,\)",
        ),
        ({"adapter_ids": torch.tensor([0, 1, 2, 3, 0, 0])}, ValueError, "from -1 to 2, got 3"),
        (
            {"adapter_ids": fastlora.route(torch.zeros(5, dtype=torch.int64), 3)},
            ValueError,
            "adapter_ids routes 5 rows, x has 6",
        ),
        (
            {"adapter_ids": fastlora.route(torch.zeros(6, dtype=torch.int64), 2)},
            ValueError,
            "routed for 2 adapters, the stack has 3",
        ),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        lora_linear_multi(**arguments("cpu", **changes))


def sorted_rows(ids):
    routing = fastlora.route(ids, 3)
    return routing.order, routing.sorted_ids


def blocks_of_rows(ids):
    from fastlora.kernels.config_multi import FEW_BLOCK_M

    return *sorted_rows(ids), fastlora.route(ids, 3).block_starts(FEW_BLOCK_M)


@pytest.mark.parametrize("way", ["decode", "add", "add blocks"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("R", [1, 3, 16, 40])
def test_rows_that_gather_their_own_adapter(device, way, with_bias, R):
    """In one launch, or added to a product that is there; s in parts; what is past a row's rank is NaN."""
    from fastlora.kernels.config import LaunchConfig
    from fastlora.kernels.multi_add import frozen_linear, lora_multi_add
    from fastlora.kernels.multi_add_blocks import lora_multi_add_blocks
    from fastlora.kernels.multi_decode import lora_multi_decode

    M, K, N, slots = 41, 136, 40, 3  # some ten rows of an adapter: a block, and part of one
    x, weight = torch.randn(M, K, device=device), torch.randn(N, K, device=device)
    s, lora_B = torch.randn(2, M, R, device=device), torch.randn(slots, N, R, device=device)
    ids, ranks = torch.arange(M, device=device).int() % 4 - 1, [R, (R + 1) // 2, 0]
    bias = torch.randn(N, device=device) if with_bias else None
    exact = x.double() @ weight.double().t()
    for m, slot in enumerate(ids.tolist()):
        r = 0 if slot < 0 else ranks[slot]
        exact[m] += lora_B[slot, :, :r].double() @ s[:, m, :r].double().sum(0)
        s[:, m, r:] = float("nan")
    lora_B[1, :, ranks[1] :] = lora_B[2] = float("nan")
    exact = exact if bias is None else exact + bias
    c = LaunchConfig(16, 32, 32, num_warps=4, num_stages=2)
    held = torch.tensor(ranks, dtype=torch.int32, device=device)

    def call():
        if way == "decode":
            return lora_multi_decode(x, weight, s, lora_B, held, ids, c, bias)
        frozen = frozen_linear(x, weight, bias)
        add, rows = lora_multi_add, sorted_rows(ids)
        if way == "add blocks":
            add, rows = lora_multi_add_blocks, blocks_of_rows(ids)
        made = add(frozen.clone(), s, lora_B, held, rows)
        assert torch.equal(made[ids < 0], frozen[ids < 0])
        return made

    got = call()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(got, call())


def test_nothing_of_cublas_where_torch_must_be_deterministic(device):
    from fastlora.kernels.multi_gemm import multi_gemm_tiles

    x, weight = (torch.randn(n, 64, device=device).to(BF16) for n in (20, 48))
    assert multi_gemm_tiles(x, weight, 8)[0] == "add"
    torch.use_deterministic_algorithms(True)
    try:
        assert multi_gemm_tiles(x, weight, 8)[0] in ("tma", "pointer")
        lora_A, lora_B = torch.randn(3, 8, 64, device=device), torch.randn(3, 48, 8, device=device)
        ids = torch.arange(20, device=device) % 4 - 1
        y = fastlora.lora_linear_multi(x, weight, (lora_A.to(BF16), lora_B.to(BF16)), ids)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = fastlora.reference.lora_linear_multi(
        x.double(),
        weight.double(),
        lora_A.to(BF16).double(),
        lora_B.to(BF16).double(),
        ids,
        scaling=1.0,
    )
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("way", ["rows", "blocks"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(("K", "R"), [(1, 1), (137, 3), (1100, 16), (4200, 40), (4200, 130)])
def test_rows_that_read_their_own_adapter(device, dtype, K, R, way):
    """s in parts of K; ranks past a row's own are NaN in A, and left alone in s."""
    from fastlora.kernels.multi_shrink_blocks import lora_multi_shrink_blocks
    from fastlora.kernels.multi_shrink_rows import lora_multi_shrink_rows

    M, ranks = 41, [R, (R + 1) // 2, 0]
    x = torch.randn(M, K, device=device).to(dtype)
    lora_A = (
        torch.randn(3, R, K, device=device).to(BF16).float()
    )  # blocks cast it to the dtype of x
    lora_A[1, ranks[1] :] = lora_A[2] = float("nan")
    ids, scaling = torch.arange(M, device=device).int() % 4 - 1, torch.rand(3, device=device)
    held = torch.tensor(ranks, dtype=torch.int32, device=device)
    if way == "rows":
        s = lora_multi_shrink_rows(x, lora_A, scaling, held, sorted_rows(ids))
    else:
        s = lora_multi_shrink_blocks(x, lora_A, scaling, held, blocks_of_rows(ids))
    for m, slot in enumerate(ids.tolist()):
        r = 0 if slot < 0 else ranks[slot]
        exact = scaling[slot].double() * (lora_A[slot, :r].double() @ x[m].double())
        torch.testing.assert_close(s[:, m, :r].double().sum(0), exact, rtol=1e-4, atol=1e-4)
        assert s[:, m, r:].isnan().all()  # allocated as NaN in these tests


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("M", [3, 20, 64, 200, 300])
def test_a_captured_call_gives_what_an_eager_one_does(M, grad, dtype):
    """Replayed with other values, ids and rows without an adapter; kernels start before others have ended."""
    K, N, R, slots = 264, 600, 24, 7

    def draw(*shape):
        return torch.randn(shape, device="cuda").to(dtype)

    weight, bias = draw(N, K) / 16, draw(N)
    stack = fastlora.AdapterStack(
        draw(slots, R, K).requires_grad_(grad), draw(slots, N, R).requires_grad_(grad),
        torch.rand(slots, device="cuda"),
        torch.tensor([24, 8, 3, 0, 16, 24, 1], dtype=torch.int32, device="cuda"),
    )  # fmt: skip
    x = draw(M, K)
    routing = fastlora.route(torch.randint(-1, slots, (M,), device="cuda"), slots)

    def call():
        return fastlora.lora_linear_multi(x, weight, stack, routing, bias=bias)

    with torch.set_grad_enabled(grad):
        for _ in range(3):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        for ids in (torch.randint(-1, slots, (M,)), torch.full((M,), -1), torch.arange(M) % slots):
            x.copy_(draw(M, K))
            routing.update_(ids.cuda())
            graph.replay()
            assert torch.equal(y, call())
