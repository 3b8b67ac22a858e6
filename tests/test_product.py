"""Few rows: the launches that serve them alone, and the linear that chooses them."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_rounded, pack, randn, unpack

from fastlora import reference
from fastlora.kernels import config, lora_product, lora_shrink
from fastlora.kernels.config import (
    adds_to_rank_product,
    decode_config,
    decodes,
    shrink_splits,
)
from fastlora.kernels.launch import clear_plans
from fastlora.kernels.lora_decode import lora_decode
from fastlora.kernels.lora_expand import lora_expand
from fastlora.kernels.lora_product import lora_dx, lora_y

HAS_CUDA = torch.cuda.is_available()
HALVES = [torch.bfloat16, torch.float16]
EACH_DTYPE = pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
EACH_HALF = pytest.mark.parametrize("dtype", HALVES, ids=str)
# M, N, R
EXPANDED = [(1, 8, 1), (16, 136, 8), (37, 51, 3), (130, 264, 64), (9, 40, 200)]
# M, K, N, R
DECODED = [
    (1, 8, 8, 1),
    (5, 37, 51, 3),
    (2, 136, 40, 16),
    (16, 264, 136, 16),
    (9, 520, 40, 64),
    (16, 1032, 70, 8),
]
if HAS_CUDA:
    EXPANDED += [(64, 4096, 16), (8192, 4096, 16), (2049, 4099, 256)]
    DECODED += [
        (1, 4096, 4096, 16),
        (16, 4096, 14336, 64),
        (7, 14336, 4096, 24),
        (3, 4097, 4099, 5),
    ]


@pytest.fixture
def added(monkeypatch):
    """cuBLAS, or torch's product on the CPU, adds to the rank product whatever the sizes."""
    monkeypatch.setattr(lora_product, "adds_frozen_product", lambda x, **backward: True)


@pytest.fixture
def split(monkeypatch):
    """`lora_shrink` sums in parts of one step each."""
    monkeypatch.setattr(lora_shrink, "shrink_splits", lambda M, K, m, k, num_sms: -(-K // k))
    clear_plans()
    yield
    clear_plans()


@EACH_DTYPE
@pytest.mark.parametrize(("M", "N", "R"), EXPANDED)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_expand(device, dtype, M, N, R, p):
    s = randn(device, dtype, M, R)
    b = randn(device, torch.float32, N, R, scale=R**-0.5)
    keep = reference.dropout_keep_mask(9, M, N, p, device)
    product = keep * (s.double() @ b.to(dtype).double().t())
    for bias in (None, randn(device, dtype, N)):
        expected = product if bias is None else product + bias.double()
        for right in (b, b.to(dtype).t().contiguous().t()):
            u = lora_expand(s, right, pack(keep) if p else None, bias)
            assert u.is_contiguous()
            assert_rounded(u, expected, dtype, depth=R)


def test_expand_takes_the_columns_of_a_wider_s(device):
    s = randn(device, torch.float16, 20, 24)
    b = randn(device, torch.float16, 72, 5)
    part = s[:, 3:8]
    assert_rounded(lora_expand(part, b), part.double() @ b.double().t(), torch.float16)


@EACH_HALF
@pytest.mark.parametrize(("M", "K", "N", "R"), DECODED)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "fp32"])
def test_decode(device, dtype, M, K, N, R, adapter):
    x, w = randn(device, dtype, M, K), randn(device, dtype, N, K, scale=K**-0.5)
    a = randn(device, adapter or dtype, R, K, scale=K**-0.5)
    b = randn(device, adapter or dtype, N, R, scale=R**-0.5)
    exact_s = 1.5 * x.double() @ a.to(dtype).double().t()
    for bias in (None, randn(device, torch.float32, N)):
        y, s = lora_decode(x, w, a, b, 1.5, bias)
        assert_rounded(s, exact_s, dtype, depth=K)
        expected = x.double() @ w.double().t() + s.double() @ b.to(dtype).double().t()
        if bias is not None:
            expected += bias.double()
        assert_rounded(y, expected, dtype, depth=K)
    again = lora_decode(x, w, a, b, torch.tensor(1.5, device=device), bias)
    assert torch.equal(again[0], y) and torch.equal(again[1], s)
    turned = [t.t().contiguous().t() for t in (x, w, a, b)]
    y, s = lora_decode(*turned, 1.5, bias)
    assert_rounded(s, exact_s, dtype, depth=K)
    assert_rounded(y, expected, dtype, depth=K)


@EACH_DTYPE
@pytest.mark.parametrize(("M", "K", "N", "R"), [(1, 8, 8, 1), (37, 72, 51, 3), (70, 40, 136, 64)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_added_products(device, added, dtype, M, K, N, R, p):
    x, w = randn(device, dtype, M, K), randn(device, dtype, N, K, scale=K**-0.5)
    s, b = randn(device, dtype, M, R), randn(device, torch.float32, N, R, scale=R**-0.5)
    bias = randn(device, torch.float32, N)
    expected = x.double() @ w.double().t() + s.double() @ b.to(dtype).double().t() + bias.double()
    assert_rounded(lora_y(x, w, s, b, bias), expected, dtype, depth=K)

    dy, a = randn(device, dtype, M, N), randn(device, torch.float32, R, K, scale=R**-0.5)
    keep = reference.dropout_keep_mask(9, M, K, p, device)
    expected = keep * (s.double() @ a.to(dtype).double()) + dy.double() @ w.double()
    dx = lora_dx(dy, w, s, a, pack(keep) if p else None, beside=True)
    assert_rounded(dx, expected, dtype, depth=N)


@EACH_DTYPE
@pytest.mark.parametrize(("M", "K", "R"), [(1, 8, 1), (5, 300, 3), (37, 1032, 16), (64, 520, 130)])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_shrink_in_parts(device, split, dtype, M, K, R, p):
    x, a = randn(device, dtype, M, K), randn(device, dtype, R, K, scale=K**-0.5)
    seed = torch.tensor(9, device=device)
    keep = reference.dropout_keep_mask(seed, M, K, p, device)
    factors = torch.rand(R, device=device) + 0.5
    for scaling in (1.5, torch.tensor(1.5, device=device), factors):
        s, mask = lora_shrink.lora_shrink(x, a, scaling, p, seed if p else None, factor=0.5)
        scale = scaling.double() if isinstance(scaling, torch.Tensor) else scaling
        expected = 0.5 * config.keep_scale(p) * scale * ((x.double() * keep) @ a.double().t())
        assert_rounded(s, expected, dtype, depth=K)
        again = lora_shrink.lora_shrink(x, a, scaling, p, seed if p else None, factor=0.5)[0]
        assert torch.equal(s, again)
        assert mask is None if p == 0 else torch.equal(unpack(mask, K), keep)
    # Columns of a wider tensor are written in one part.
    wide = torch.full((M, R + 3), 7.0, dtype=dtype, device=device)
    s, _ = lora_shrink.lora_shrink(x, a, factors, p, seed if p else None, out=wide[:, 2:-1])
    assert_rounded(s, 2 * expected, dtype, depth=K)
    assert (wide[:, :2] == 7).all() and (wide[:, -1] == 7).all()


@EACH_HALF
@pytest.mark.parametrize(("M", "R", "p"), [(1, 8, 0.0), (3, 64, 0.0), (16, 3, 0.3), (64, 72, 0.3)])
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "fp32"])
def test_few_rows_are_no_further_from_fp64_than_eager(oracle, device, dtype, M, R, p, adapter):
    """The linear as its user calls it, y and every gradient."""
    K, N = (4096, 1032) if HAS_CUDA else (96, 72)
    case = oracle.make_case(M, K, N, R, dtype, device, adapter_dtype=adapter, dropout_p=p)
    oracle.check(case)


def test_which_way():
    assert decodes(1, 64, 2, False) and decodes(16, 1, 2, False)
    assert not decodes(17, 16, 2, False)
    assert not decodes(1, 65, 2, False)
    assert not decodes(1, 16, 4, False)
    assert not decodes(1, 16, 2, True)
    for fused_fp32 in (False, True):
        assert adds_to_rank_product(1, 2, "cuda", fused_fp32)
        assert adds_to_rank_product(256, 2, "cuda", fused_fp32)
        assert not adds_to_rank_product(257, 2, "cuda", fused_fp32)
        assert adds_to_rank_product(8192, 4, "cuda", fused_fp32) == (not fused_fp32)
        assert not adds_to_rank_product(64, 2, "cpu", fused_fp32)
    assert not adds_to_rank_product(64, 4, "cpu", False)


def test_no_cublas_where_only_deterministic_algorithms_may_run(device):
    """PyTorch refuses cuBLAS there, unless its workspace is set; the values are the fused GEMM's."""
    x, w, s, b = (
        randn(device, torch.float32, *size) for size in ((4, 64), (8, 64), (4, 8), (8, 8))
    )
    torch.use_deterministic_algorithms(True)
    try:
        assert not lora_product.adds_frozen_product(x)
        y = lora_y(x, w, s, b)
        lora_dx(y, w, s, b.t() @ w)
    finally:
        torch.use_deterministic_algorithms(False)
    assert lora_product.adds_frozen_product(x) == HAS_CUDA
    expected = x.double() @ w.double().t() + s.double() @ b.double().t()
    assert_rounded(y, expected, torch.float32, depth=64)


def test_splits_fill_the_gpu_and_no_more():
    assert shrink_splits(64, 4096, 32, 128, 132) == 32
    assert shrink_splits(64, 512, 32, 128, 132) == 4
    assert shrink_splits(512, 4096, 32, 128, 132) == 8
    assert shrink_splits(1024, 4096, 32, 128, 132) == 1
    assert shrink_splits(1, 8, 32, 128, 132) == 1


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("R", [1, 16, 64])
@pytest.mark.parametrize("N", [1024, 4096, 14336])
@pytest.mark.parametrize("a_itemsize", [2, 4])
def test_decode_tiles_fit(major, R, N, a_itemsize):
    c = decode_config(N, R, (2, a_itemsize), True, 132, major)
    stage = (2 * (16 + c.BLOCK_N) + a_itemsize * config.rank_block(R)) * c.BLOCK_K
    assert c.num_stages >= 2
    assert (c.num_stages - 1) * stage <= (200 if major == 9 else 96) * 1024
