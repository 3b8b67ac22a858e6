"""DoRA: against its formula, and PEFT's layers side by side, with dropout and without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from fastlora import dora_linear, reference
from fastlora.dora import dora_norm
from fastlora.kernels.config import keep_scale

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = ("x", "lora_A", "lora_B", "magnitude", "bias")
SEED = 11


def make(M=9, K=40, N=24, R=4, dtype=F64, device="cpu", adapter_dtype=None, bias=True):
    adapter = adapter_dtype or dtype

    def draw(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    values = {
        "x": draw(M, K),
        "weight": draw(N, K, scale=K**-0.5),
        "lora_A": draw(R, K, scale=K**-0.5, dtype=adapter),
        "lora_B": draw(N, R, scale=R**-0.5, dtype=adapter),
        "magnitude": draw(N, dtype=adapter).abs() + 0.1,
    }
    if bias:
        values["bias"] = draw(N)
    return values, draw(M, N)


def plain(x, weight, lora_A, lora_B, magnitude, bias=None, *, scaling):
    """PEFT's arithmetic without dropout, in the dtype of x."""
    a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
    g = magnitude / torch.linalg.norm(weight + scaling * b @ a, dim=1).to(weight.dtype).detach()
    base = x @ weight.t()
    y = base + (g - 1) * base + g * (x @ a.t() @ b.t()) * scaling
    return (y if bias is None else y + bias).to(x.dtype)


def run(call, values, dy, wanted=NAMES, **options):
    names = [n for n in wanted if n in values]
    leaves = {n: t.detach().requires_grad_(n in names) for n, t in values.items()}
    y = call(**leaves, **options)
    assert y.requires_grad
    grads = torch.autograd.grad(y, [leaves[n] for n in names], dy)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize(("N", "K", "R"), [(24, 40, 4), (1, 1, 1), (67, 130, 33)])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_norm_without_building_the_product(N, K, R, dtype, device, monkeypatch):
    monkeypatch.setattr(reference, "MERGE_BLOCK", 5 * K)
    values, _ = make(2, K, N, R, dtype, device)
    w, a, b = (values[n].double() for n in ("weight", "lora_A", "lora_B"))
    expected = torch.linalg.norm(w + 0.7 * b @ a, dim=1)
    got = dora_norm(values["weight"], values["lora_A"], values["lora_B"], 0.7)
    assert got.dtype == (F64 if dtype == F64 else F32)
    # W A^T is rounded to the dtype of the weight, relative to |w| |A|: a part of the sum.
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-5) if dtype != F64 else 1e-12
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def assert_fused(values):
    decision = fastlora.explain(*(values[n] for n in ("x", "weight", "lora_A", "lora_B")))
    assert decision.fused, str(decision)


def one_rounding(values, dy):
    """The error of dA where each dz is off by half a unit, at random: large terms may make a small ds."""
    v = {n: t.double() for n, t in values.items()}
    dz = dy.double() * v["magnitude"] / dora_norm(v["weight"], v["lora_A"], v["lora_B"], 1.5)
    ds = 1.5 * torch.finfo(dy.dtype).eps / 2 * (dz.square() @ v["lora_B"].square()).sqrt()  # [M, R]
    return (ds.square().t() @ v["x"].square()).sqrt()  # [R, K]


def check(values, dy, oracle, wanted=NAMES):
    """The kernels run, and y and every gradient are as exact as PEFT's arithmetic in the same dtype."""
    assert_fused(values)
    double = {n: t.double() for n, t in values.items()}
    truth = run(reference.dora_linear, double, dy.double(), wanted, scaling=1.5)
    baseline = run(plain, values, dy, wanted, scaling=1.5)
    got = run(dora_linear, values, dy, wanted, scaling=1.5)
    one_number = values["lora_A"].shape[0] == dy.shape[0] == 1  # ds
    for name in truth:
        assert got[name].dtype == (dy if name == "y" else values[name]).dtype
        chance = one_rounding(values, dy) if one_number and name == "lora_A" else None
        oracle.assert_close(
            got[name], baseline[name], truth[name], values["x"].dtype, name, chance=chance
        )
    return got


EACH_DTYPE = pytest.mark.parametrize("dtype", [BF16, F16, F32])


@EACH_DTYPE
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapter_dtype", [None, F32])
def test_values_and_gradients(dtype, bias, adapter_dtype, device, oracle):
    values, dy = make(33, 40, 24, 5, dtype, device, adapter_dtype, bias)
    check(values, dy, oracle)


# M, K, N, R. TMA takes rows of a multiple of 16 bytes.
SHAPES = [
    pytest.param(1, 40, 24, 1, id="one-token-r1"),
    pytest.param(129, 67, 45, 3, id="odd-r3"),
    pytest.param(129, 72, 264, 8, id="two-tiles-r8"),
    pytest.param(20, 300, 35, 64, id="r64"),
    pytest.param(18, 136, 72, 200, id="r200"),
]


@EACH_DTYPE
@pytest.mark.parametrize(("M", "K", "N", "R"), SHAPES)
def test_shapes(M, K, N, R, dtype, device, oracle):
    values, dy = make(M, K, N, R, dtype, device, F32)
    check(values, dy, oracle)


@pytest.mark.parametrize("magnitude", [0.0, 1e-6, -0.5])
@EACH_DTYPE
def test_any_magnitude(magnitude, dtype, device, oracle):
    """A factor of 0, or one so small that y is all bias, still has a gradient of the magnitude."""
    values, dy = make(33, 40, 24, 5, dtype, device, F32)
    values["magnitude"][3:11] = magnitude
    values["bias"] *= 100
    got = check(values, dy, oracle)
    assert got["magnitude"][3:11].abs().min() > 0
    if magnitude == 0:
        assert torch.equal(got["y"][:, 3:11], values["bias"][3:11].expand(33, 8))


@pytest.mark.parametrize(
    "wanted",
    [("x",), ("lora_A",), ("lora_B",), ("magnitude",), ("bias",), ("weight",), NAMES[1:]],
    ids=lambda wanted: wanted[0] if len(wanted) == 1 else "parameters",
)
def test_only_what_is_wanted(wanted, device):
    values, dy = make(33, 40, 24, 5, F32, device)
    assert_fused(values)
    expected = run(reference.dora_linear, values, dy, wanted, scaling=1.5)
    got = run(dora_linear, values, dy, wanted, scaling=1.5)
    assert got.keys() == {"y", *wanted}
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(dora_linear(**values, scaling=1.5), got["y"])


def test_layouts(device):
    """x of other strides, a transposed weight, a magnitude that is a column, the gradient of a sum."""
    values, _ = make(32, 40, 24, 5, F32, device)
    one = torch.ones(1, device=device)
    expected = run(dora_linear, values, one.expand(32, 24).contiguous(), scaling=1.5)
    laid = {n: t.t().contiguous().t() for n, t in values.items() if t.dim() == 2}
    for name in ("magnitude", "bias"):
        laid[name] = values[name][:, None].repeat(1, 2)[:, 1]
        assert laid[name].stride() == (2,)
    got = run(dora_linear, values | laid, one.expand(32, 24), scaling=1.5)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)
    values["x"] = values["x"].view(4, 8, 40).transpose(0, 1)
    got = run(dora_linear, values, one.expand(8, 4, 24), scaling=1.5)
    for name in ("y", "x"):
        turned = expected[name].view(4, 8, -1).transpose(0, 1)
        torch.testing.assert_close(got[name], turned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_output_may_be_changed_in_place(p, device):
    values, dy = make(9, 40, 24, 4, F32, device)
    torch.manual_seed(SEED)
    expected = run(lambda **v: dora_linear(**v, dropout_p=p).relu(), values, dy)
    torch.manual_seed(SEED)
    got = run(lambda **v: dora_linear(**v, dropout_p=p).relu_(), values, dy)
    for name in expected:
        assert torch.equal(got[name], expected[name])


def test_graphs_of_the_backward(device):
    values, dy = make(9, 40, 24, 4, F32, device)
    expected = run(dora_linear, values, dy)

    def loss(magnitude, x):
        return (dora_linear(**{**values, "magnitude": magnitude, "x": x}) * dy).sum()

    arguments = values["magnitude"].requires_grad_(), values["x"].requires_grad_()
    found = torch.func.grad(loss, (0, 1))(*arguments)
    again = torch.autograd.grad(loss(*arguments), arguments, create_graph=True)
    for got in (found, again):
        torch.testing.assert_close(got[0], expected["magnitude"])
        torch.testing.assert_close(got[1], expected["x"])
    with pytest.raises(RuntimeError, match="no double backward"):
        again[0].sum().backward()


@pytest.mark.parametrize("path", ["fused", "eager"])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_follows_the_reference(path, p, device):
    values, dy = make(12, 37, 24, 3, F32, device)
    values["x"], dy = values["x"].view(3, 4, 37), dy.view(3, 4, 24)
    torch.manual_seed(SEED)
    seed = reference.draw_seed(values["x"].device)
    expected = run(reference.dora_linear, values, dy, scaling=0.5, dropout_p=p, seed=seed)
    torch.manual_seed(SEED)
    with fastlora.dispatch.force("eager") if path == "eager" else torch.enable_grad():
        got = run(dora_linear, values, dy, scaling=0.5, dropout_p=p)
        still = dora_linear(**values, scaling=0.5, dropout_p=p, training=False)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)
    again = reference.dora_linear(**values, scaling=0.5)
    torch.testing.assert_close(still, again, rtol=1e-4, atol=1e-4)


class Masked(nn.Module):
    """Dropout in PEFT's layer with the mask that fastlora draws."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        torch.manual_seed(SEED)
        keep = reference.dropout_keep_mask(
            reference.draw_seed(x.device), x.numel() // x.shape[-1], x.shape[-1], self.p
        )
        return torch.where(keep.view(x.shape), x * keep_scale(self.p), 0.0)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapter_scale", [1.0, 0.0])
def test_matches_peft(p, bias, adapter_scale):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(40, 24, bias=bias)),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, lora_dropout=p),
    )
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    nn.init.normal_(b, std=0.2 * adapter_scale)
    with torch.no_grad():
        magnitude.mul_(1 + 0.3 * torch.rand_like(magnitude))
    if p:
        layer.lora_dropout["default"] = Masked(p)
    x = torch.randn(2, 5, 40, requires_grad=True)
    dy = torch.randn(2, 5, 24)
    theirs = layer(x)
    expected = torch.autograd.grad(theirs, (x, a, b, magnitude), dy)
    torch.manual_seed(SEED)
    mine = dora_linear(
        x, layer.base_layer.weight.detach(), a, b, magnitude, bias=layer.base_layer.bias,
        scaling=layer.scaling["default"], dropout_p=p,
    )  # fmt: skip
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(mine, (x, a, b, magnitude), dy)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_no_rows_tensor_scaling_and_autocast():
    values, _ = make(dtype=F32)
    assert dora_linear(**{**values, "x": values["x"][:0]}, dropout_p=0.5).shape == (0, 24)
    expected = dora_linear(**values, scaling=0.5)
    torch.testing.assert_close(dora_linear(**values, scaling=torch.tensor(0.5)), expected)
    for p in (0.0, 0.5):
        torch.manual_seed(SEED)
        expected = dora_linear(**values, scaling=0.5, dropout_p=p)
        torch.manual_seed(SEED)
        with torch.autocast("cpu", dtype=BF16):
            y = dora_linear(**values, scaling=0.5, dropout_p=p)
        assert y.dtype == BF16
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_what_the_kernels_cannot_take_stays_eager_in_every_call(device):
    values, _ = make(device=device)
    for _ in range(2):
        y = dora_linear(**values, scaling=0.5)
        torch.testing.assert_close(y, plain(**values, scaling=0.5), rtol=1e-12, atol=1e-12)


BAD = [
    ({"magnitude": torch.ones(23)}, ValueError, r"\(out_features,\)=\(24,\) on cpu, got \(23,\)"),
    (
        {"magnitude": torch.ones(24).long()},
        TypeError,
        "magnitude must be a float Tensor, got torch",
    ),
    ({"magnitude": 1.0}, TypeError, "magnitude must be a float Tensor, got float"),
    ({"dropout_p": -1.0}, ValueError, r"dropout_p must be in \[0, 1\]"),
    ({"lora_A": torch.ones(4, 39)}, ValueError, "lora_A must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda _: "")
def test_bad_arguments_are_named(change, error, message):
    values, _ = make(dtype=F32)
    with pytest.raises(error, match=message):
        dora_linear(**{**values, **change})
