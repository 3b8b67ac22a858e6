"""fastlora.lora_linear on the fused path: values and every gradient against an fp64 oracle.

The criterion (tests/oracle.py): no further from fp64 than plain eager in the same dtype, up to chance.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import fastlora
from fastlora import reference

HAS_CUDA = torch.cuda.is_available()

# M, K, N, R. Left out: products of these lists; each row is there for what its id says.
SHAPES = [
    pytest.param(1, 16, 24, 1, id="one-token-rank1"),
    pytest.param(1, 1, 1, 1, id="all-ones"),
    pytest.param(9, 1, 17, 2, id="one-column"),
    pytest.param(129, 40, 72, 8, id="aligned-rows-r8"),
    pytest.param(33, 37, 51, 3, id="odd-r3"),
    pytest.param(20, 136, 70, 64, id="r64"),
    pytest.param(9, 19, 130, 200, id="two-pass-db-r200"),
]
if HAS_CUDA:
    SHAPES += [
        pytest.param(8192, 4096, 4096, 16, id="8192x4096x4096-r16"),
        pytest.param(8192, 4096, 1024, 64, id="8192x4096x1024-r64"),
        pytest.param(2048, 4096, 14336, 256, id="2048x4096x14336-r256"),
        pytest.param(4097, 4099, 1025, 8, id="odd-4097"),
        pytest.param(300, 1000, 1032, 33, id="aligned-not-tile-r33"),
        pytest.param(1, 4096, 4096, 128, id="decode-r128"),
    ]
PS = [0.0, 0.1]
EDGE_PS = [2.0**-14, 0.5, 1 - 2.0**-14, 1.0]

# fp32 twice: exact products, and TF32 allowed, which opens the TMA variants to it.
PRECISIONS = [
    pytest.param((torch.bfloat16, False), id="bf16"),
    pytest.param((torch.float16, False), id="fp16"),
    pytest.param((torch.float32, False), id="fp32-ieee"),
    pytest.param((torch.float32, True), id="fp32-tf32"),
]
MID = (270, 520, 392, 16) if HAS_CUDA else (35, 40, 24, 8)


@pytest.fixture(params=PRECISIONS)
def dtype(request):
    """The dtype of x, with torch's switch for TF32 set for the test."""
    dtype, tf32 = request.param
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    yield dtype
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize(("M", "K", "N", "R"), SHAPES)
def test_values_and_gradients(oracle, device, dtype, M, K, N, R, p):
    oracle.check(oracle.make_case(M, K, N, R, dtype, device, dropout_p=p))


@pytest.mark.parametrize("p", EDGE_PS)
def test_edge_probabilities(oracle, device, dtype, p):
    if dtype == torch.float16 and 0.5 < p < 1:
        pytest.skip("1 / (1 - p) = 16384: s passes the largest fp16, in eager too")
    oracle.check(oracle.make_case(*MID, dtype, device, dropout_p=p))


def test_p_of_one_leaves_the_frozen_linear(oracle, device, dtype):
    got = oracle.check(oracle.make_case(*MID, dtype, device, dropout_p=1.0))
    assert not got["lora_A"].any()
    assert not got["lora_B"].any()


def test_p_that_rounds_to_zero_drops_nothing(oracle, device):
    case = oracle.make_case(*MID, torch.float32, device, dropout_p=1e-6)
    with_dropout = oracle.fused(case)
    without = oracle.fused(dataclasses.replace(case, dropout_p=0.0))
    for name, value in without.items():
        assert torch.equal(with_dropout[name], value), name


def test_eval_drops_nothing(oracle, device, dtype):
    case = oracle.make_case(*MID, dtype, device, dropout_p=0.5, training=False)
    got = oracle.check(case)
    without = oracle.fused(dataclasses.replace(case, dropout_p=0.0, training=True))
    for name, value in without.items():
        assert torch.equal(got[name], value), name


def test_a_given_seed_takes_the_place_of_the_drawn_one(oracle, device):
    case = oracle.make_case(4, 16, 8, 4, torch.float32, device, dropout_p=0.5)
    call = functools.partial(fastlora.lora_linear, **case.tensors, dropout_p=0.5)
    torch.manual_seed(5)
    drawn = call()
    torch.manual_seed(5)
    seed = reference.draw_seed(case.dy.device)
    before = torch.random.get_rng_state()
    assert torch.equal(call(seed=seed), drawn)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(call(seed=seed + 1), drawn)


def test_eval_draws_no_seed(oracle, device):
    case = oracle.make_case(4, 16, 8, 4, torch.float32, device, dropout_p=0.5, training=False)
    oracle.fused_call(case)
    after_call = torch.rand(1, device=device)
    torch.manual_seed(oracle.SEED)
    assert torch.equal(after_call, torch.rand(1, device=device))


@pytest.mark.parametrize("p", PS)
def test_without_bias(oracle, device, dtype, p):
    oracle.check(oracle.make_case(*MID, dtype, device, bias=False, dropout_p=p))


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("R", [8, 64])
def test_fp32_adapters_beside_16_bit_x(oracle, device, dtype, R, p):
    M, K, N, _ = MID
    case = oracle.make_case(M, K, N, R, dtype, device, adapter_dtype=torch.float32, dropout_p=p)
    got = oracle.check(case)
    assert got["lora_A"].dtype == got["lora_B"].dtype == torch.float32


@pytest.mark.parametrize("fp32", ["lora_A", "lora_B"])
def test_one_fp32_adapter(oracle, device, fp32):
    case = oracle.make_case(*MID, torch.float16, device, dropout_p=0.1)
    oracle.check(case.relaid(**{fp32: case.tensors[fp32].float()}))


LEADING = [(), (5,), (1,), (2, 3), (2, 1, 3)]


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("p", PS)
def test_leading_dimensions_are_kept(oracle, device, leading, p):
    M = torch.Size(leading).numel()
    flat = oracle.make_case(M, 24, 16, 4, torch.float32, device, dropout_p=p)
    expected = oracle.fused(flat)
    case = dataclasses.replace(
        flat.relaid(x=flat.tensors["x"].view(*leading, 24)), dy=flat.dy.view(*leading, 16)
    )
    got = oracle.fused(case)
    assert got["y"].shape == (*leading, 16)
    assert got["x"].shape == (*leading, 24)
    for name, value in expected.items():
        assert torch.equal(got[name].reshape(value.shape), value), name


def strided(t):
    """The same values with every second column of a wider tensor."""
    wide = t.new_full((t.shape[0], 2 * t.shape[1]), float("nan"))
    wide[:, ::2] = t
    return wide[:, ::2]


def shifted(t):
    """The same values at an address that is not 16-byte aligned, in rows of odd length."""
    wide = t.new_full((t.shape[0], t.shape[1] + 5), float("nan"))
    wide[:, 3 : 3 + t.shape[1]] = t
    return wide[:, 3 : 3 + t.shape[1]]


def padded(t):
    """The same values in longer rows that a TMA descriptor can still describe."""
    wide = t.new_full((t.shape[0], t.shape[1] + 32), float("nan"))
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


def transposed(t):
    return t.t().contiguous().t()


def repeated(t):
    """One row, expanded: stride 0."""
    return t[:1].expand_as(t)


LAYOUTS = [transposed, strided, shifted, padded, repeated]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "dy"])
def test_layouts(oracle, device, name, layout):
    case = oracle.make_case(*MID, torch.float16, device, dropout_p=0.1)
    if name == "dy":
        case = dataclasses.replace(case, dy=layout(case.dy))
    else:
        case = case.relaid(**{name: layout(case.tensors[name])})
    oracle.check(case)


def test_strided_bias(oracle, device):
    case = oracle.make_case(*MID, torch.float32, device)
    oracle.check(case.relaid(bias=strided(case.tensors["bias"][:, None])[:, 0]))


def test_permuted_3d_x(oracle, device):
    M, K, N, R = MID
    case = oracle.make_case(5 * M, K, N, R, torch.bfloat16, device, dropout_p=0.1)
    x = case.tensors["x"].view(M, 5, K).transpose(0, 1)
    dy = case.dy.view(M, 5, N).transpose(0, 1)
    oracle.check(dataclasses.replace(case.relaid(x=x), dy=dy))


def test_gradient_of_a_sum(oracle, device, dtype):
    case = oracle.make_case(*MID, dtype, device, dropout_p=0.1)
    case = dataclasses.replace(case, dy=case.dy.new_ones(()).expand_as(case.dy))
    expected = oracle.check(case)
    oracle.assert_fused(case)
    leaves = {n: t.detach().requires_grad_() for n, t in case.tensors.items()}
    oracle.fused_call(dataclasses.replace(case, tensors=leaves)).sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]), name


WANTED = [
    ("lora_A", "lora_B"),
    ("lora_A",),
    ("lora_B",),
    ("x",),
    ("weight",),
    ("bias",),
    ("x", "lora_B"),
    ("weight", "bias"),
    (),
]


@pytest.mark.parametrize("wanted", WANTED, ids="-".join)
@pytest.mark.parametrize("R", [8, 40])
def test_only_wanted_gradients(oracle, device, wanted, R):
    M, K, N, _ = MID
    case = oracle.make_case(M, K, N, R, torch.float16, device, dropout_p=0.1, wanted=wanted)
    got = oracle.check(case)
    assert got.keys() == {"y", *wanted}


@pytest.mark.parametrize("R", [8, 40])
def test_scaling_as_a_tensor_equals_a_float(oracle, device, R):
    M, K, N, _ = MID
    case = oracle.make_case(M, K, N, R, torch.float16, device, dropout_p=0.1, scaling=0.75)
    expected = oracle.check(case)
    for where in {"cpu", device}:
        scaling = torch.tensor(0.75, device=where)
        got = oracle.check(dataclasses.replace(case, scaling=scaling))
        for name, value in expected.items():
            assert torch.equal(got[name], value), (where, name)


@pytest.mark.parametrize("scaling", [0.0, -2.0, 1, 1e-3])
def test_scaling_values(oracle, device, scaling):
    oracle.check(oracle.make_case(*MID, torch.float16, device, scaling=scaling, dropout_p=0.1))


@pytest.mark.parametrize("R", [8, 40])
def test_two_runs_are_bit_identical(oracle, device, dtype, R):
    M, K, N = (4099, 1024, 1032) if HAS_CUDA else (130, 48, 40)
    case = oracle.make_case(M, K, N, R, dtype, device, dropout_p=0.1)
    first, second = oracle.fused(case), oracle.fused(case)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("M", "K", "N"), [(0, 16, 8), (3, 16, 0), (3, 0, 8), (0, 0, 0)])
def test_empty_dimensions_run_eagerly(oracle, device, M, K, N):
    tensors = {
        "x": torch.randn(2, M, K, device=device),
        "weight": torch.randn(N, K, device=device),
        "lora_A": torch.randn(4, K, device=device),
        "lora_B": torch.randn(N, 4, device=device),
        "bias": torch.randn(N, device=device),
    }
    case = oracle.Case(tensors, torch.randn(2, M, N, device=device), dropout_p=0.1)
    decision = fastlora.explain(**tensors)
    assert decision.path == "eager"
    assert "empty" in decision.reason
    got = oracle.run(oracle.fused_call, case)
    assert got["y"].shape == (2, M, N)
    for name, t in tensors.items():
        assert got[name].shape == t.shape
    torch.testing.assert_close(got["bias"], case.dy.sum((0, 1)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "dropped"])
def test_a_dropped_nan_or_inf_stays_out_of_the_branch(oracle, device, value, kept):
    M, K, N, R = MID
    case = oracle.make_case(M, K, N, R, torch.float32, device, dropout_p=0.5)
    keep = reference.dropout_keep_mask(
        oracle.drawn_seed(torch.device(device)), M, K, 0.5, device=device
    )
    row, column = (keep == kept).nonzero()[-1].tolist()
    case.tensors["x"][row, column] = value
    got, expected = oracle.fused(case), oracle.run(oracle.reference_call, case)
    # The frozen product sees x as it is; its row is lost either way, and no other.
    assert got["y"].isfinite().all(dim=1).nonzero().numel() == M - 1
    assert not got["y"][row].isfinite().any()
    # lora_A's gradient loses column `column`, lora_B's everything, only where the element is kept.
    assert got["lora_A"].isfinite().all() == (not kept)
    assert got["lora_B"].isfinite().all() == (not kept)
    for name, e in expected.items():
        assert torch.equal(got[name].isfinite(), e.isfinite()), name
    assert got["x"].isfinite().all()


@pytest.mark.alone  # the older setting cannot be read any more where the newer was used
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_newer_setting_of_tf32_is_read(dtype, device):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch before 2.9")
    from fastlora.kernels.common import dot_precision, tf32_allowed

    x, weight, a, b = (
        torch.randn(shape, device=device).to(dtype)
        for shape in ((300, 16), (8, 16), (2, 16), (8, 2))
    )
    for value, allowed in (("tf32", True), ("ieee", False)):
        matmul.fp32_precision = value
        assert tf32_allowed() == allowed
        assert dot_precision(torch.float32) == ("tf32" if allowed else "ieee")
        expected = x.double() @ (weight.double() + b.double() @ a.double()).t()
        y = fastlora.lora_linear(x, weight, a, b)
        torch.testing.assert_close(y.double(), expected, rtol=0.1, atol=0.3)
