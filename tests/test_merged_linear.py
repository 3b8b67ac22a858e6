"""The linear with adapted slices: kernels of both kinds against fp64, gradients, merging, errors."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRAMergedLinear, lora_linear, lora_merged_linear, reference
from fastlora.merged_linear import enabled_slices

HAS_CUDA = torch.cuda.is_available()
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
SEED = 7

# M, K, widths, enabled, R. The first two have slices whose borders are those of tiles.
SHAPES = [
    pytest.param(33, 48, (128, 128, 128), (1, 0, 1), 4, id="tiles-q-v"),
    pytest.param(130, 24, (128, 72), (1, 1), 17, id="tiles-last-is-short"),
    pytest.param(9, 24, (40, 8, 8), (1, 1, 1), 3, id="all-in-one-tile"),
    pytest.param(5, 37, (51, 100, 3, 1), (1, 0, 1, 1), 1, id="odd-r1"),
    pytest.param(1, 16, (130,), (1,), 64, id="one-slice-r64"),
]
if HAS_CUDA:
    SHAPES += [
        pytest.param(4096, 4096, (4096, 1024, 1024), (1, 0, 1), 16, id="llama-gqa"),
        pytest.param(1025, 1032, (1000, 500, 36), (1, 1, 0), 32, id="unaligned"),
    ]


def make(M, K, widths, enabled, R, dtype, device, adapter_dtype=None, bias=True):
    N, G = sum(widths), sum(enabled)
    rows = sum(w for w, on in zip(widths, enabled, strict=True) if on)
    adapter = adapter_dtype or dtype

    def draw(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    values = {
        "x": draw(M, K),
        "weight": draw(N, K, scale=K**-0.5),
        "lora_A": draw(G * R, K, scale=K**-0.5, dtype=adapter),
        "lora_B": draw(rows, R, scale=R**-0.5, dtype=adapter),
    }
    if bias:
        values["bias"] = draw(N)
    return values, draw(M, N), {"widths": widths, "enable_lora": tuple(map(bool, enabled))}


def plain(x, weight, lora_A, lora_B, bias=None, *, widths, enable_lora, scaling, dropped=None):
    """Plain PyTorch in the dtype of x, a slice at a time."""
    dropped = x if dropped is None else dropped
    y, r, row, column, g = x @ weight.t(), lora_B.shape[1], 0, 0, 0
    parts = []
    for width, on in zip(widths, enable_lora, strict=True):
        part = y[:, column : column + width]
        if on:
            a, b = lora_A[g * r : (g + 1) * r].to(x.dtype), lora_B[row : row + width].to(x.dtype)
            part = part + (dropped @ a.t() @ b.t()) * scaling
            g, row = g + 1, row + width
        column += width
        parts.append(part)
    return torch.cat(parts, 1) + (0 if bias is None else bias)


def run(call, values, dy, **options):
    leaves = {n: t.detach().requires_grad_() for n, t in values.items()}
    y = call(**leaves, **options)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy)))}  # noqa: B905


def compare(values, dy, options, oracle, dtype, scaling=1.5, **fused_options):
    truth = run(
        plain, {n: t.double() for n, t in values.items()}, dy.double(), scaling=scaling, **options
    )
    baseline = run(plain, values, dy, scaling=scaling, **options)
    got = run(lora_merged_linear, values, dy, scaling=scaling, **options, **fused_options)
    for name in truth:
        assert got[name].dtype == (dy if name == "y" else values[name]).dtype
        depth = oracle.depth_of(name, values["x"], dy)
        oracle.assert_close(got[name], baseline[name], truth[name], dtype, name, depth)
    return got


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(("M", "K", "widths", "enabled", "R"), SHAPES)
def test_values_and_gradients(M, K, widths, enabled, R, dtype, variant, device, oracle):
    values, dy, options = make(M, K, widths, enabled, R, dtype, device)
    compare(values, dy, options, oracle, dtype)


def test_which_kernel_runs(device, monkeypatch):
    pytest.importorskip("triton")
    sliced = importlib.import_module("fastlora.kernels.lora_forward_sliced")
    used = []

    class Spy(sliced.Launch):
        def __call__(self, *args):
            used.append(self._kernel)
            super().__call__(*args)

    monkeypatch.setattr(sliced, "Launch", Spy)
    tma, pointer = (
        getattr(sliced, f"_lora_forward_sliced_{kind}_kernel") for kind in ("tma", "pointer")
    )
    for widths, kernel in (((128, 256), tma), ((128, 72), tma), ((120, 136), pointer)):
        if HAS_CUDA and torch.cuda.get_device_capability()[0] != 9:
            kernel = pointer
        values, _, options = make(8, 16, widths, (1, 1), 4, F16, device)
        lora_merged_linear(**values, **options)
        assert used.pop() is kernel
        assert not used  # one launch for all slices


@pytest.mark.parametrize("shape", [SHAPES[1].values, SHAPES[3].values], ids=["tiles", "odd"])
def test_fp32_adapters_and_no_bias(shape, variant, device, oracle):
    values, dy, options = make(*shape, BF16, device, adapter_dtype=F32, bias=False)
    compare(values, dy, options, oracle, BF16)


@pytest.mark.parametrize("path", ["fused", "eager"])
def test_slices_share_one_dropout_mask(path, device):
    values, dy, options = make(9, 24, (40, 8, 8), (1, 0, 1), 3, F32, device)
    torch.manual_seed(SEED)
    seed = reference.draw_seed(values["x"].device)
    keep = reference.dropout_keep_mask(seed, 9, 24, 0.25, device)

    def dropping(x, **rest):
        return plain(x, **rest, dropped=torch.where(keep, x / 0.75, 0), scaling=2.0)

    expected = run(dropping, values, dy, **options)
    torch.manual_seed(SEED)
    with fastlora.dispatch.force("eager") if path == "eager" else torch.enable_grad():
        got = run(lora_merged_linear, values, dy, scaling=2.0, dropout_p=0.25, **options)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)
    still = lora_merged_linear(**values, scaling=2.0, dropout_p=0.25, training=False, **options)
    torch.testing.assert_close(still, plain(**values, scaling=2.0, **options), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_a_slice_that_overflows_leaves_the_others(variant, device):
    values, _, options = make(4, 16, (128, 128, 128), (1, 0, 1), 4, F16, device)
    expected = lora_merged_linear(**values, **options)
    values["lora_A"][:4] = 60000.0
    y = lora_merged_linear(**values, **options)
    assert not torch.isfinite(y[:, :128]).all()
    assert torch.equal(y[:, 128:], expected[:, 128:])


def test_equals_separate_linears(device):
    """Each slice is what lora_linear gives with its rows of the weight."""
    values, _, options = make(9, 24, (40, 8, 16), (1, 0, 1), 3, F32, device)
    y = lora_merged_linear(**values, scaling=0.5, **options)
    x, weight, a, b, bias = (values[n] for n in NAMES)
    for rows, ranks, b_rows in (
        (slice(0, 40), slice(0, 3), slice(0, 40)),
        (slice(48, 64), slice(3, 6), slice(40, 56)),
    ):
        part = lora_linear(x, weight[rows], a[ranks], b[b_rows], bias=bias[rows], scaling=0.5)
        torch.testing.assert_close(y[:, rows], part, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[:, 40:48], x @ weight[40:48].t() + bias[40:48])


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "weight", "bias"])
def test_only_wanted_gradients_are_made(wanted, device):
    values, dy, options = make(9, 24, (40, 8), (1, 1), 3, F32, device)
    got, expected = [], []
    for call, into in ((lora_merged_linear, got), (plain, expected)):
        leaf = values[wanted].clone().requires_grad_()
        y = call(**{**values, wanted: leaf}, scaling=0.5, **options)
        into.append(torch.autograd.grad(y, leaf, dy)[0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_layouts_leading_dimensions_and_tensor_scaling(device):
    values, _, options = make(12, 24, (40, 8), (0, 1), 3, F32, device)
    expected = lora_merged_linear(**values, scaling=0.5, **options)
    odd = {n: t.t().contiguous().t() for n, t in values.items() if t.dim() == 2}
    odd["bias"] = values["bias"][:, None].repeat(1, 2)[:, 1]
    torch.testing.assert_close(lora_merged_linear(**odd, scaling=0.5, **options), expected)
    folded = {**values, "x": values["x"].view(3, 4, 24)}
    scaling = torch.tensor(0.5, device=device)
    y = lora_merged_linear(**folded, scaling=scaling, **options)
    assert torch.equal(y, expected.view(3, 4, 48))
    empty = {**values, "x": values["x"][:0]}
    assert lora_merged_linear(**empty, **options).shape == (0, 48)


def test_no_double_backward_through_the_kernels(device):
    pytest.importorskip("triton")
    values, _, options = make(4, 8, (8, 8), (0, 1), 2, F32, device)
    x = values["x"].requires_grad_()
    y = lora_merged_linear(**values, **options)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(dx.sum(), x)


def layer(**options):
    made = LoRAMergedLinear(
        16, 48, 2, 4, enable_lora=[True, False, True], widths=[32, 8, 8], dtype=F64, **options
    )
    nn.init.normal_(made.lora_B)
    return made.eval()


def test_unequal_slices_merge_and_unmerge():
    made = layer()
    frozen = made.weight.detach().clone()
    x = torch.randn(5, 16, dtype=F64)
    unmerged = made(x)
    made.merge()
    assert torch.equal(made.weight[32:40], frozen[32:40])
    torch.testing.assert_close(made(x), unmerged)
    torch.testing.assert_close(
        made.weight[40:].detach(), frozen[40:] + 2 * made.lora_B[32:] @ made.lora_A[2:]
    )
    made.unmerge()
    assert torch.equal(made.weight, frozen)


def test_base_is_shared_and_repr():
    base = nn.Linear(16, 48, bias=False)
    made = LoRAMergedLinear(16, 48, 2, enable_lora=[True, False, True], base=base)
    assert made.weight is base.weight
    assert made.bias is None
    assert not base.weight.requires_grad
    x = torch.randn(3, 16)
    torch.testing.assert_close(made(x), base(x))
    assert repr(made) == (
        "LoRAMergedLinear(in_features=16, out_features=48, bias=False, r=2, lora_alpha=1, "
        "lora_dropout=0.0, widths=[16, 16, 16], enable_lora=[True, False, True])"
    )
    assert enabled_slices([3, 4, 5], [False, True, True]) == ((3, 7), (7, 12))


BAD_LAYER = [
    ({"enable_lora": [1, 0]}, TypeError, r"enable_lora must be a list of bool, got \[1, 0\]"),
    ({"enable_lora": [False] * 3}, ValueError, "enable_lora must enable a slice"),
    ({"enable_lora": [True] * 5}, ValueError, "multiple of the 5 slices.*got 48"),
    ({"widths": [24, 24]}, ValueError, "one entry a slice, 3, got 2"),
    ({"widths": [24, 24, 1]}, ValueError, "widths must add up to out_features=48, got 49"),
    ({"widths": [48, 0, 0]}, ValueError, "widths must be above 0"),
    ({"widths": [16.0] * 3}, TypeError, "widths must be a list of int"),
    ({"base": nn.Linear(16, 40)}, ValueError, "base must be 16 -> 48, got 16 -> 40"),
    ({"base": nn.Conv1d(1, 1, 1)}, TypeError, "base must be a torch.nn.Linear, got Conv1d"),
    (
        {"base": nn.Linear(16, 48), "fan_in_fan_out": True},
        ValueError,
        "base must be None with fan_in",
    ),
    ({"fan_in_fan_out": 1}, TypeError, "fan_in_fan_out must be a bool, got 1"),
    ({"r": 0}, ValueError, "r must be from 1 to 256, got 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LAYER, ids=lambda _: "")
def test_bad_arguments_of_the_layer_are_named(change, error, message):
    good = {"r": 2, "enable_lora": [True, False, True]}
    with pytest.raises(error, match=message):
        LoRAMergedLinear(16, 48, **{**good, **change})


BAD_CALL = [
    ({"widths": (40, 9)}, ValueError, "widths must add up to 48 outputs, got 49"),
    ({"lora_B": torch.ones(8, 3)}, ValueError, r"lora_B must be .*=\(48, r\), got \(8, 3\)"),
    ({"lora_A": torch.ones(3, 24)}, ValueError, r"lora_A must have r rows a slice, 2 \* 3, got 3"),
    ({"lora_A": torch.ones(6, 23)}, ValueError, r"lora_A must be \(r, in_features\)=\(6, 24\)"),
    ({"lora_B": None}, TypeError, "lora_B must be a Tensor, got NoneType"),
    ({"bias": torch.ones(3)}, ValueError, "bias must be"),
    ({"dropout_p": 2.0}, ValueError, r"dropout_p must be in \[0, 1\], got 2.0"),
    ({"x": torch.ones(4, 24).half()}, TypeError, "weight must have the dtype of x"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALL, ids=lambda _: "")
def test_bad_arguments_of_the_function_are_named(change, error, message):
    values, _, options = make(4, 24, (40, 8), (1, 1), 3, F32, "cpu")
    with pytest.raises(error, match=message):
        lora_merged_linear(**{**values, **options, **change})
