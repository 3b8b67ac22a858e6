"""Each launcher of kernels/ alone, against its formula in fp64; the packed mask bit for bit."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_checks import assert_rounded, pack, randn, unpack

from fastlora import reference
from fastlora.kernels.config import DROPOUT_LEVELS, cdiv, dropout_threshold, keep_scale
from fastlora.kernels.dora_grad import dora_grad
from fastlora.kernels.dora_norm import dora_norm
from fastlora.kernels.lora_forward import lora_forward
from fastlora.kernels.lora_grad_a import lora_grad_a
from fastlora.kernels.lora_grad_ab import lora_grad_ab
from fastlora.kernels.lora_grad_b import lora_grad_b
from fastlora.kernels.lora_grad_x import lora_grad_x
from fastlora.kernels.lora_shrink import lora_shrink
from fastlora.kernels.reduce import sum_splits

HAS_CUDA = torch.cuda.is_available()
F16 = torch.float16  # the interpreter rounds fp16 rightly, and truncates bf16

# M, K, N, R: what each row is there for is its id. TMA descriptors want rows of a multiple of 16 bytes.
SHAPES = [
    pytest.param(1, 8, 8, 1, id="one-token"),
    pytest.param(130, 264, 136, 16, id="two-tiles-each-way"),
    pytest.param(67, 40, 24, 17, id="aligned-r17"),
    pytest.param(33, 37, 51, 3, id="odd"),
    pytest.param(9, 48, 40, 130, id="three-rank-steps"),
]
if HAS_CUDA:
    SHAPES += [
        pytest.param(8192, 4096, 4096, 16, id="8192x4096x4096-r16"),
        pytest.param(4097, 4104, 1032, 64, id="4097-r64"),
        pytest.param(2049, 4097, 4099, 256, id="odd-r256"),
    ]
EACH_SHAPE = pytest.mark.parametrize(("M", "K", "N", "R"), SHAPES)
DTYPES = [torch.bfloat16, F16, torch.float32]
PRECISIONS = [
    pytest.param((torch.bfloat16, False), id="bf16"),
    pytest.param((F16, False), id="fp16"),
    pytest.param((torch.float32, False), id="fp32-ieee"),
    pytest.param((torch.float32, True), id="fp32-tf32"),
]
VARIANTS = ["tma", "pointer"]


@pytest.fixture(params=PRECISIONS)
def dtype(request):
    """The dtype of x or dy, with torch's switch for TF32 set for the test."""
    dtype, tf32 = request.param
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    yield dtype
    torch.backends.cuda.matmul.allow_tf32 = before


def expected_kernel(variant, dtype, K, N):
    """Exact fp32 products have no TMA variant, nor have rows that are not a multiple of 16 bytes."""
    exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return variant if K % 8 == N % 8 == 0 and not exact else "pointer"


@pytest.fixture
def launched(monkeypatch):
    """Names of the GEMM kernels that a test launches."""
    names = []

    class Spy:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for stem in ("lora_forward", "lora_grad_x"):
        module = importlib.import_module(f"fastlora.kernels.{stem}")
        for kind in VARIANTS:
            name = f"_{stem}_{kind}_kernel"
            monkeypatch.setattr(module, name, Spy(kind, getattr(module, name)))
    masked = "_lora_grad_x_dropout_kernel"  # by TMA, like the one without a mask
    monkeypatch.setattr(module, masked, Spy("tma", getattr(module, masked)))
    return names


SEEDS = [0, 1, -1, 2**32 + 5, -(2**40) - 3, 2**63 - 1, -(2**63)]
MASKS = [
    pytest.param(1, 8, 0.5, id="one-byte"),
    pytest.param(37, 300, 0.1, id="odd-bytes"),
    pytest.param(5, 129, 0.9, id="one-bit-over"),
    pytest.param(3, 7, 2.0**-14, id="lowest-p"),
    pytest.param(70, 136, 1.0, id="all-dropped"),
]
if HAS_CUDA:
    MASKS.append(pytest.param(8193, 4099, 0.1, id="8193x4099"))


@pytest.mark.parametrize("seed_value", SEEDS)
@pytest.mark.parametrize(("M", "K", "p"), MASKS)
def test_mask_bits_equal_the_reference(device, M, K, p, seed_value):
    seed = torch.tensor(seed_value, dtype=torch.int64, device=device)
    x, a = randn(device, F16, M, K), randn(device, F16, 4, K)
    _, mask = lora_shrink(x, a, 1.0, p, seed)
    assert mask.dtype == torch.uint8
    assert mask.shape == (M, cdiv(K, 8))
    keep = reference.dropout_keep_mask(seed, M, K, p, device)
    assert torch.equal(unpack(mask, K), keep)
    # Bits past K in a row's last byte are the draws of the columns that would come next.
    wide = reference.dropout_keep_mask(seed, M, 8 * cdiv(K, 8), p, device)
    assert torch.equal(mask, pack(wide))


def test_mask_is_the_same_for_every_dtype_and_rank(device):
    seed = torch.tensor(77, device=device)
    x, masks = torch.randn(70, 530, device=device), []
    for dtype in DTYPES:
        for R in (1, 64, 200):
            a = randn(device, dtype, R, 530)
            masks.append(lora_shrink(x.to(dtype), a, 1.0, 0.3, seed)[1])
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_share_of_kept_elements(device):
    p, M, K = 0.1, 512, 512
    keep = reference.dropout_keep_mask(5, M, K, p, device)
    expected = 1 - dropout_threshold(p) / DROPOUT_LEVELS
    deviation = (expected * (1 - expected) / (M * K)) ** 0.5
    assert abs(keep.double().mean().item() - expected) < 4 * deviation
    # Neighbours in a block of 8, neighbouring blocks and neighbouring rows are independent.
    for other in (keep.roll(1, 1), keep.roll(8, 1), keep.roll(1, 0)):
        assert abs((keep & other).double().mean().item() - expected**2) < 6 * deviation


@EACH_SHAPE
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_shrink(device, dtype, M, K, N, R, p):
    x, a = randn(device, dtype, M, K), randn(device, torch.float32, R, K, scale=K**-0.5)
    seed = torch.tensor(9, device=device)
    s, mask = lora_shrink(x, a, 1.5, p, seed if p else None, factor=0.5)
    keep = reference.dropout_keep_mask(seed, M, K, p, device)
    assert (mask is None) == (p == 0)
    expected = 0.75 * keep_scale(p) * (x.double() * keep) @ a.to(dtype).double().t()
    assert_rounded(s, expected, dtype, depth=K)
    scaling = torch.tensor(1.5, device=device)
    again, _ = lora_shrink(x, a, scaling, p, seed if p else None, factor=0.5)
    assert torch.equal(s, again)


@EACH_SHAPE
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_forward(device, variant, launched, dtype, M, K, N, R, bias_dtype):
    x, w = randn(device, dtype, M, K), randn(device, dtype, N, K, scale=K**-0.5)
    s, b = randn(device, dtype, M, R), randn(device, torch.float32, N, R, scale=R**-0.5)
    bias = None if bias_dtype is None else randn(device, bias_dtype, N)
    y = lora_forward(x, w, s, b, bias)
    expected = x.double() @ w.double().t() + s.double() @ b.to(dtype).double().t()
    if bias is not None:
        expected += bias.double()
    assert_rounded(y, expected, dtype, depth=K)
    assert launched == [expected_kernel(variant, dtype, K, N)]


@EACH_SHAPE
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_forward_with_a_column_scale(device, variant, launched, dtype, M, K, N, R, bias_dtype):
    x, w = randn(device, dtype, M, K), randn(device, dtype, N, K, scale=K**-0.5)
    s, b = randn(device, dtype, M, R), randn(device, torch.float32, N, R, scale=R**-0.5)
    bias = None if bias_dtype is None else randn(device, bias_dtype, N)
    g, z = torch.rand(N, device=device), x.new_full((M, N), float("nan"))
    g[0] = 0
    y = lora_forward(x, w, s, b, bias, g, z)
    expected = x.double() @ w.double().t() + s.double() @ b.to(dtype).double().t()
    assert_rounded(z, expected, dtype, depth=K)
    expected *= g
    if bias is not None:
        expected += bias.double()
    assert_rounded(y, expected, dtype, depth=K)
    assert torch.equal(y, lora_forward(x, w, s, b, bias, g))
    assert launched == [expected_kernel(variant, dtype, K, N)] * 2


@EACH_SHAPE
@pytest.mark.parametrize("adapter", [None, torch.float32])
def test_dora_norm(device, dtype, M, K, N, R, adapter):
    w = randn(device, dtype, N, K, scale=K**-0.5)
    # The interpreter truncates where it casts to bf16: fp32 adapters hold what dtype can here.
    a, b = randn(device, dtype, R, K), randn(device, dtype, N, R, scale=R**-0.5)
    a, b = a.to(adapter or dtype), b.to(adapter or dtype)
    magnitude = randn(device, adapter or dtype, N)
    magnitude[0] = 0
    expected = torch.linalg.norm(w.double() + 0.7 * b.double() @ a.double(), dim=1)
    exact = dtype != torch.float32 or not torch.backends.cuda.matmul.allow_tf32
    for scaling in (0.7, torch.tensor(0.7, device=device)):
        g, norm = dora_norm(w, a, b, magnitude, scaling)
        assert g.dtype == norm.dtype == torch.float32
        # Products of 16-bit numbers are exact in fp32; what is left is one running sum a column of a tile.
        # For TF32 the tensor cores cut both factors off after 10 bits.
        torch.testing.assert_close(norm.double(), expected, rtol=2e-6 if exact else 2**-9, atol=0)
        assert torch.equal(g, magnitude.float() / norm)
        assert torch.equal(norm, dora_norm(w, a, b, magnitude, scaling)[1])
    turned = [t.t().contiguous().t() for t in (w, a, b)]
    assert torch.equal(dora_norm(*turned, magnitude, 0.7)[1], norm)


def test_dora_norm_where_the_parts_cancel(device):
    """A row of W0 + B A a thousandth as long as its parts: the expanded square tells nothing of it."""
    a, b = randn(device, torch.float32, 4, 300), randn(device, torch.float32, 20, 4)
    rest = 1e-3 * randn(device, torch.float32, 20, 300)
    w = (rest.double() - b.double() @ a.double()).float()
    expected = torch.linalg.norm(w.double() + b.double() @ a.double(), dim=1)
    _, norm = dora_norm(w, a, b, b[:, 0].contiguous(), 1.0)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-4, atol=0)


@EACH_SHAPE
def test_dora_grad(device, dtype, M, K, N, R):
    dy, z = randn(device, dtype, M, N), randn(device, dtype, M, N)
    g, norm = torch.randn(N, device=device), torch.rand(N, device=device) + 0.1
    g[0] = 0
    expected = (dy.double() * z.double()).sum(0) / norm
    # The gradient of a sum is one number for all; what comes from a transposed product has other strides.
    for given in (dy, dy.t().contiguous().t(), dy[:1, :1].expand(M, N)):
        exact = given.double()
        for out in {dtype, torch.float32}:
            dz, dmagnitude = dora_grad(given, z, g, norm, out)
            assert_rounded(dz, exact * g, dtype, products=False)
            assert_rounded(
                dmagnitude, (exact * z.double()).sum(0) / norm, out, depth=M, products=False
            )
    dz, none = dora_grad(dy, None, g, norm, dtype)
    assert none is None
    assert_rounded(dz, dy.double() * g, dtype, products=False)
    none, dmagnitude = dora_grad(dy, z, g, norm, torch.float32, need_dz=False)
    assert none is None
    assert_rounded(dmagnitude, expected, torch.float32, depth=M, products=False)
    again = dora_grad(dy, z, g, norm, torch.float32)[1]
    assert torch.equal(again, dmagnitude)


@EACH_SHAPE
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_grad_x(device, variant, launched, dtype, M, K, N, R, p):
    dy, w = randn(device, dtype, M, N), randn(device, dtype, N, K, scale=N**-0.5)
    ds, a = randn(device, dtype, M, R), randn(device, torch.float32, R, K, scale=R**-0.5)
    keep = reference.dropout_keep_mask(9, M, K, p, device)
    dx = lora_grad_x(dy, w, ds, a, pack(keep) if p else None)
    expected = keep * (ds.double() @ a.to(dtype).double()) + dy.double() @ w.double()
    assert_rounded(dx, expected, dtype, depth=N)
    assert launched == [expected_kernel(variant, dtype, K, N)]


@EACH_SHAPE
def test_grad_b(device, dtype, M, K, N, R):
    dy, s = randn(device, dtype, M, N), randn(device, dtype, M, R)
    b = randn(device, torch.float32, N, R, scale=R**-0.5)
    expected_ds = 1.5 * keep_scale(0.25) * dy.double() @ b.to(dtype).double()
    expected_db = dy.double().t() @ s.double()
    for scaling in (1.5, torch.tensor(1.5, device=device)):
        ds, db = lora_grad_b(dy, s, b, scaling, 0.25)
        assert_rounded(ds, expected_ds, dtype, depth=N)
        assert_rounded(db, expected_db, torch.float32, depth=M)
        only_ds, none = lora_grad_b(dy, s, b, scaling, 0.25, need_db=False)
        assert none is None
        assert_rounded(only_ds, expected_ds, dtype, depth=N)
        none, only_db = lora_grad_b(dy, s, b, scaling, 0.25, need_ds=False)
        assert none is None
        assert_rounded(only_db, expected_db, torch.float32, depth=M)


@EACH_SHAPE
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_grad_a(device, dtype, M, K, N, R, p):
    x, ds = randn(device, dtype, M, K), randn(device, dtype, M, R)
    keep = reference.dropout_keep_mask(9, M, K, p, device)
    expected = ds.double().t() @ (x.double() * keep)
    for out in {dtype, torch.float32}:
        da = lora_grad_a(x, ds, pack(keep) if p else None, out)
        assert_rounded(da, expected, out, depth=M)


@EACH_SHAPE
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_grad_ab(device, variant, dtype, M, K, N, R, p):
    x, ds = randn(device, dtype, M, K), randn(device, dtype, M, R)
    dy, s = randn(device, dtype, M, N), randn(device, dtype, M, R)
    keep = reference.dropout_keep_mask(9, M, K, p, device)
    mask = pack(keep) if p else None
    expected_a = ds.double().t() @ (x.double() * keep)
    expected_b = dy.double().t() @ s.double()
    for a_dtype, b_dtype in {(dtype, torch.float32), (torch.float32, dtype)}:
        da, db = lora_grad_ab(x, ds, mask, dy, s, a_dtype, b_dtype)
        assert_rounded(da, expected_a, a_dtype, depth=M)
        assert_rounded(db, expected_b, b_dtype, depth=M)
    # Any strides, and the same bits from run to run.
    turned = x.t().contiguous().t(), dy.repeat_interleave(2, 1)[:, ::2]
    da, db = lora_grad_ab(turned[0], ds, mask, turned[1], s, a_dtype, b_dtype)
    assert_rounded(da, expected_a, a_dtype, depth=M)
    assert_rounded(db, expected_b, b_dtype, depth=M)
    again = lora_grad_ab(turned[0], ds, mask, turned[1], s, a_dtype, b_dtype)
    assert torch.equal(da, again[0]) and torch.equal(db, again[1])


@EACH_SHAPE
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_grad_x_beside_another_kernel(device, variant, dtype, M, K, N, R, p):
    x, dy, ds = randn(device, dtype, M, K), randn(device, dtype, M, N), randn(device, dtype, M, R)
    w, a = randn(device, dtype, N, K), randn(device, dtype, R, K)
    mask = pack(reference.dropout_keep_mask(9, M, K, p, device)) if p else None
    lora_grad_ab(x, ds, mask, dy, ds, dtype, dtype)
    dx = lora_grad_x(dy, w, ds, a, mask, beside=True)
    assert_rounded(dx, lora_grad_x(dy, w, ds, a, mask).double(), dtype, depth=N + R)


@pytest.mark.parametrize("splits", [1, 2, 7, 100])
@pytest.mark.parametrize("shape", [(1, 1), (3, 85), (16, 16), (257, 3)], ids=str)
def test_sum_splits(device, dtype, splits, shape):
    parts = torch.randn(splits, *shape, device=device)
    expected = 0.75 * parts.double().sum(0)
    for scaling in (1.5, torch.tensor(1.5, device=device), torch.tensor(1.5, device=device).half()):
        out = torch.full(shape, float("nan"), dtype=dtype, device=device)
        sum_splits(parts, out, scaling, 0.5)
        assert_rounded(out, expected, dtype, depth=splits, products=False)


def test_backward_masks_what_forward_did(device, variant, dtype):
    M, K, N, R = 70, 136, 24, 8
    x, a = randn(device, dtype, M, K), randn(device, dtype, R, K)
    seed = torch.tensor(-5, device=device)
    _, mask = lora_shrink(x, a, 1.0, 0.5, seed)
    ds, w, dy = torch.ones_like(x[:, :R]), a.new_zeros(N, K), x.new_ones(M, N)
    dx = lora_grad_x(dy, w, ds, torch.ones_like(a), mask)
    # With a zero weight dx is exactly 0 where the mask dropped and R where it kept.
    keep = reference.dropout_keep_mask(seed, M, K, 0.5, device)
    assert torch.equal(dx, R * keep.to(dtype))


def test_outputs_are_allocated_poisoned(device):
    # What every test above relies on: an element that no kernel writes is NaN, or 0x7F in a mask.
    common = importlib.import_module("fastlora.kernels.common")
    made = {}
    source = (
        "floats = torch.empty((2, 3), dtype=torch.float16, device=device)\n"
        "bytes_ = torch.empty((2, 3), dtype=torch.uint8, device=device)\n"
    )
    exec(source, {**vars(common), "device": device}, made)
    assert made["floats"].isnan().all()
    assert (made["bytes_"] == 0x7F).all()
