"""The embedding with LoRA: kernels and layer against fp64, torch's own options, merging, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlora
from fastlora import LoRAEmbedding, lora_embedding, reference

HAS_CUDA = torch.cuda.is_available()
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = ("y", "weight", "lora_A", "lora_B")

# ids, V, N, R: what each row is there for is its id.
SHAPES = [
    pytest.param((1,), 1, 1, 1, id="one-of-one"),
    pytest.param((3, 7), 50, 72, 3, id="odd-2d"),
    pytest.param((40,), 11, 33, 64, id="repeated-r64"),
    pytest.param((2, 5, 9), 300, 264, 16, id="3d-two-column-blocks"),
]
if HAS_CUDA:
    SHAPES += [
        pytest.param((8192,), 32000, 4096, 16, id="8192-llama"),
        pytest.param((8192,), 128256, 1024, 16, id="8192-large-vocabulary"),
        pytest.param((4097,), 1003, 1001, 256, id="odd-r256"),
    ]


def tensors(shape, V, N, R, dtype, device, adapter_dtype=None):
    adapter = adapter_dtype or dtype
    return (
        torch.randint(0, V, shape, device=device),
        {
            "weight": torch.randn(V, N, device=device).to(dtype),
            "lora_A": (torch.randn(R, V, device=device)).to(adapter),
            "lora_B": (torch.randn(N, R, device=device) * R**-0.5).to(adapter),
        },
    )


def run(call, ids, values, dy, wanted=NAMES[1:], **options):
    leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in values.items()}
    for name, t in values.items():  # clone makes expanded tensors dense, keep odd strides
        if not t.is_contiguous():
            leaves[name] = t.detach().requires_grad_(name in wanted)
    y = call(ids, leaves["weight"], leaves["lora_A"], leaves["lora_B"], **options)
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], dy) if wanted else ()
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def plain(ids, weight, lora_A, lora_B, *, scaling=1.0, **options):
    """What loralib and PEFT compute, in the dtypes as they come; with sparse they have no backward."""
    options = {k: v for k, v in options.items() if k != "sparse"}
    a = F.embedding(ids, lora_A.t(), **options)
    y = F.embedding(ids, weight, **options) + (a @ lora_B.t()).to(weight.dtype) * scaling
    return y.to(weight.dtype)


def compare(ids, values, oracle, dtype, **options):
    assert fastlora.explain_embedding(ids, **values).fused
    dy = torch.randn(*ids.shape, values["weight"].shape[1], device=ids.device).to(dtype)
    double = {n: t.double() for n, t in values.items()}
    truth = run(plain, ids, double, dy.double(), **options)
    baseline = run(plain, ids, values, dy, **options)
    got = run(lora_embedding, ids, values, dy, **options)
    twin = run(reference.lora_embedding, ids, values, dy, **options)
    for name in NAMES:
        assert got[name].dtype == (values[name] if name != "y" else dy).dtype
        for mine in (got, twin):
            oracle.assert_close(
                mine[name].to_dense(), baseline[name].to_dense(), truth[name].to_dense(), dtype,
                name,
            )  # fmt: skip
    return got


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(("shape", "V", "N", "R"), SHAPES)
def test_values_and_gradients(shape, V, N, R, dtype, device, oracle):
    pytest.importorskip("triton")
    ids, values = tensors(shape, V, N, R, dtype, device)
    compare(ids, values, oracle, dtype, scaling=1.5)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_fp32_adapters_beside_a_16_bit_table(dtype, device, oracle):
    pytest.importorskip("triton")
    ids, values = tensors((31,), 20, 40, 5, dtype, device, adapter_dtype=F32)
    compare(ids, values, oracle, dtype, scaling=0.5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"padding_idx": 3}, id="padding"),
        pytest.param({"padding_idx": -2}, id="padding-negative"),
        pytest.param({"scale_grad_by_freq": True}, id="scale-grad"),
        pytest.param({"sparse": True}, id="sparse"),
        pytest.param({"sparse": True, "padding_idx": 0}, id="sparse-padding"),
    ],
)
@pytest.mark.parametrize("dtype", [F16, F32])
def test_options_of_torchs_embedding(options, dtype, device, oracle):
    pytest.importorskip("triton")
    ids, values = tensors((6, 8), 7, 24, 4, dtype, device)
    got = compare(ids, values, oracle, dtype, **options)
    padding = options.get("padding_idx")
    if padding is not None:
        assert not got["lora_A"].to_dense()[:, padding].any()
        assert not got["weight"].to_dense()[padding].any()
    assert got["lora_A"].is_sparse == options.get("sparse", False)


@pytest.mark.parametrize("path", ["fused", "eager"])
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_max_norm_limits_both_tables_in_place(path, norm_type, device):
    ids, values = tensors((30,), 20, 12, 4, F32, device)
    ids[0] = 3
    unused = sorted(set(range(20)) - set(ids.tolist()))
    mine = {n: t.clone() for n, t in values.items()}
    with fastlora.dispatch.force("eager") if path == "eager" else torch.enable_grad():
        y = lora_embedding(ids, **mine, max_norm=1.5, norm_type=norm_type)
    options = {"max_norm": 1.5, "norm_type": norm_type}
    theirs = {n: t.clone() for n, t in values.items()}
    torch.testing.assert_close(y, plain(ids, **theirs, **options))
    for name in ("weight", "lora_A"):
        torch.testing.assert_close(mine[name], theirs[name])
        assert not torch.equal(mine[name], values[name])
    assert torch.equal(mine["weight"][unused], values["weight"][unused])
    assert (mine["weight"][ids].norm(p=norm_type, dim=1) <= 1.5 + 1e-4).all()


LAYOUTS = {
    "weight-columns": ("weight", lambda t: t.t().contiguous().t()),
    "weight-rows-apart": ("weight", lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]),
    "A-columns": ("lora_A", lambda t: t.t().contiguous().t()),
    "B-columns": ("lora_B", lambda t: t.t().contiguous().t()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, device, oracle):
    pytest.importorskip("triton")
    ids, values = tensors((2, 9), 15, 40, 6, F32, device)
    name, change = LAYOUTS[layout]
    compare(ids.t(), {**values, name: change(values[name])}, oracle, F32, scaling=2.0)


def test_int32_ids_and_tensor_scaling(device, oracle):
    pytest.importorskip("triton")
    ids, values = tensors((17,), 9, 20, 3, F32, device)
    expected = compare(ids, values, oracle, F32, scaling=1.25)
    dy = torch.ones(17, 20, device=device)
    for scaling in (1.25, torch.tensor(1.25, device=device), torch.tensor(1.25)):
        y = lora_embedding(ids.int(), **values, scaling=scaling)
        assert torch.equal(y, expected["y"])
    got = run(lora_embedding, ids.int(), values, dy, scaling=torch.tensor(1.25))
    again = run(lora_embedding, ids, values, dy, scaling=1.25)
    assert all(torch.equal(got[name], again[name]) for name in NAMES)


@pytest.mark.parametrize("wanted", [(), ("lora_A",), ("lora_B",), ("weight",)])
def test_only_wanted_gradients_are_made(wanted, device):
    ids, values = tensors((17,), 9, 20, 3, F32, device)
    dy = torch.randn(17, 20, device=device)
    got = run(lora_embedding, ids, values, dy, wanted=wanted)
    expected = run(plain, ids, values, dy, wanted=wanted)
    for name in got:
        torch.testing.assert_close(got[name], expected[name])


def test_gradients_are_bit_identical_from_run_to_run(device):
    ids, values = tensors((500,), 7, 24, 4, BF16, device)
    dy = torch.randn(500, 24, device=device).to(BF16)
    first, second = (run(lora_embedding, ids, values, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_gradient_of_many_equal_ids_is_summed_in_fp32(device):
    # 1024 ones: a running sum in bf16 stops at 256.
    ids = torch.zeros(1024, dtype=torch.int64, device=device)
    values = {
        "weight": torch.zeros(2, 16, dtype=BF16, device=device),
        "lora_A": torch.ones(1, 2, dtype=BF16, device=device),
        "lora_B": torch.eye(16, 1, dtype=BF16, device=device),
    }
    dy = torch.ones(1024, 16, dtype=BF16, device=device)
    for call in (lora_embedding, reference.lora_embedding):
        got = run(call, ids, values, dy, wanted=("lora_A", "lora_B"))
        assert got["lora_A"].tolist() == [[1024.0, 0.0]]
        assert (got["lora_B"] == 1024).all()
    got = run(lora_embedding, ids, values, dy, wanted=("lora_A",), scale_grad_by_freq=True)
    assert got["lora_A"].tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("R", [1, 5, 64, 200])
def test_the_scatter_to_lora_a(R, ids_dtype, device):
    """Runs longer than a block of rows, a run at either end, a padding id, rows of any strides."""
    pytest.importorskip("triton")
    from fastlora.kernels.lora_embedding import lora_embedding_grad_a

    ids = torch.tensor([0] * 150 + [8] * 90 + [3, 5, 3, 4] * 2, device=device, dtype=ids_dtype)
    ids = ids[torch.randperm(len(ids), device=device)]
    ds = torch.randn(R, len(ids), device=device).t()
    for padding_idx in (-1, 3):
        kept = (ids != padding_idx).double()[:, None]
        exact = torch.zeros(9, R, dtype=F64, device=device)
        exact.index_add_(0, ids.long(), ds.double() * kept)
        for rows in (ds, ds.contiguous()):
            got = lora_embedding_grad_a(ids, rows, 9, padding_idx, F32)
            assert got.shape == (R, 9)
            assert got.is_contiguous(), "as the Parameter is, so that autograd takes it as it is"
            torch.testing.assert_close(got.double(), exact.t(), rtol=1e-5, atol=1e-5)
            assert not got[:, [1, 2, 6, 7]].any()
            assert got[:, 3].any() == (padding_idx != 3)
        # fp16, as the interpreter cuts bf16 off
        rounded = lora_embedding_grad_a(ids, ds.contiguous(), 9, padding_idx, F16)
        assert torch.equal(rounded, got.to(F16))


def test_no_ids(device):
    _, values = tensors((1,), 9, 20, 3, F32, device)
    ids = torch.empty(2, 0, dtype=torch.int64, device=device)
    got = run(lora_embedding, ids, values, torch.empty(2, 0, 20, device=device))
    assert got["y"].shape == (2, 0, 20)
    assert not any(got[name].any() for name in NAMES[1:])
    assert fastlora.explain_embedding(ids, **values).reason.startswith(
        "a dimension is empty" if HAS_CUDA or fastlora.dispatch.INTERPRETED else "the kernels run"
    )


def test_no_double_backward_through_the_kernels(device):
    pytest.importorskip("triton")
    ids, values = tensors((5,), 9, 20, 3, F32, device)
    b = values["lora_B"].requires_grad_()
    y = lora_embedding(ids, values["weight"], values["lora_A"], b)
    (grad,) = torch.autograd.grad(y.square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()


def test_torch_func_grad(device):
    ids, values = tensors((2, 5), 9, 20, 3, F32, device)

    def loss(a):
        return lora_embedding(ids, values["weight"], a, values["lora_B"]).square().sum()

    found = torch.func.grad(loss)(values["lora_A"])
    a = values["lora_A"].clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(loss(a), a)[0])


def test_reason_names_the_table(device):
    ids, values = tensors((5,), 9, 20, 3, F64, device)
    decision = fastlora.explain_embedding(ids, **values)
    assert decision.path == "eager"
    if HAS_CUDA or fastlora.dispatch.INTERPRETED:
        assert decision.reason.startswith("weight is torch.float64")
    with fastlora.dispatch.force("eager"):
        assert "force" in fastlora.explain_embedding(ids, **values).reason
    y = lora_embedding(ids, **values)
    torch.testing.assert_close(y, plain(ids, **values))


T = torch.randn
BAD = [
    ({"ids": T(3)}, TypeError, "ids must be int32 or int64, got torch.float32"),
    ({"ids": [1]}, TypeError, "ids must be a Tensor, got list"),
    ({"weight": T(9)}, ValueError, r"weight must be 2-D, got shape \(9,\)"),
    ({"weight": torch.ones(9, 20).long()}, TypeError, "weight must be a float tensor"),
    ({"lora_A": T(3, 8)}, ValueError, r"\(r, num_embeddings\)=\(3, 9\), got \(3, 8\)"),
    ({"lora_B": T(3, 20)}, ValueError, r"\(embedding_dim, r\)=\(20, 3\), got \(3, 20\)"),
    ({"lora_A": T(0, 9), "lora_B": T(20, 0)}, ValueError, "rank of at least 1"),
    ({"weight": T(9, 20, device="meta")}, ValueError, "on the device of ids, cpu, got meta"),
    ({"scaling": "2"}, TypeError, "scaling must be a float or a Tensor, got str"),
    ({"padding_idx": 9}, ValueError, "padding_idx must be from -9 to 8, got 9"),
    ({"padding_idx": 1.0}, TypeError, "padding_idx must be an int or None, got 1.0"),
    ({"max_norm": "1"}, TypeError, "max_norm must be a number, got '1'"),
    ({"norm_type": None}, TypeError, "norm_type must be a number, got None"),
    ({"sparse": 1}, TypeError, "sparse must be a bool, got 1"),
    ({"sparse": True, "scale_grad_by_freq": True}, ValueError, "sparse must be False with"),
    ({"ids": torch.tensor([0, 9])}, IndexError, "out of range|from 0 to 8, got 9"),
    ({"ids": torch.tensor([-1, 0])}, IndexError, "out of range|from 0 to 8, got -1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda value: "")
def test_bad_arguments_are_named(change, error, message):
    ids, values = tensors((5,), 9, 20, 3, F32, "cpu")
    with pytest.raises(error, match=message):
        lora_embedding(**{"ids": ids, **values, **change})


def make(dtype=F64, **options):
    base = nn.Embedding(30, 16, dtype=dtype, **options)
    layer = LoRAEmbedding(base, 4, 8)
    nn.init.normal_(layer.lora_A)
    return base, layer


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("padding_idx", 1, True),
        ("sparse", False, 0),
        ("scale_grad_by_freq", True, 1),
        ("norm_type", 2.0, "2"),
        ("max_norm", None, [1.0]),
    ],
)
def test_a_call_that_was_checked_vouches_for_no_other(option, good, bad, device):
    """Equal to what came before, or nothing to look up by: still named."""
    ids, values = tensors((5,), 6, 8, 2, F32, device)
    for _ in range(2):
        lora_embedding(ids, **values, **{option: good})
    with pytest.raises(TypeError, match=f"{option} must be a"):
        lora_embedding(ids, **values, **{option: bad})


def test_a_negative_padding_idx_counts_in_every_call(device):
    pytest.importorskip("triton")
    ids, values = torch.tensor([0, 5, 5, 2], device=device), tensors((4,), 6, 8, 2, F32, device)[1]
    for _ in range(2):  # the second is not checked anew
        got = run(lora_embedding, ids, values, torch.ones(4, 8, device=device), padding_idx=-1)
        assert not got["lora_A"][:, 5].any() and not got["weight"][5].any()
        assert got["lora_A"][:, 2].any() and got["weight"][2].any()


@pytest.mark.parametrize("shape", [(9,), (3, 3)])
def test_without_grad_mode_the_values_are_the_same(shape, device):
    pytest.importorskip("triton")
    ids, values = tensors(shape, 6, 8, 2, F32, device)
    values["lora_A"].requires_grad_()
    scaling = torch.tensor(0.5, device=device)
    expected = lora_embedding(ids, **values, scaling=scaling)
    with torch.no_grad():
        got = lora_embedding(ids, **values, scaling=scaling)
        assert torch.equal(got, expected)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(
                values["lora_B"], torch.ones_like(values["lora_B"])
            )
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                lora_embedding(ids, **{**values, "lora_B": dual})
    assert expected.requires_grad
    assert not got.requires_grad


def test_new_layer_computes_what_the_base_does():
    base = nn.Embedding(30, 16, padding_idx=2).eval()
    layer = LoRAEmbedding(base, 4, 8)
    ids = torch.tensor([[1, 2, 2, 29]])
    assert torch.equal(layer(ids), base(ids))
    assert layer.weight is base.weight
    assert not layer.training
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert list(layer.state_dict()) == ["weight", "lora_A", "lora_B"]
    assert layer.lora_B.std() > 0.5
    assert repr(layer) == "LoRAEmbedding(30, 16, r=4, lora_alpha=8, padding_idx=2)"


def test_padding_column_is_never_trained():
    _, layer = make(padding_idx=2)
    before = layer.lora_A.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.tensor([1, 2, 2, 3])).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.lora_A[:, 2], before[:, 2])
    assert not torch.equal(layer.lora_A[:, 1], before[:, 1])


def test_sparse_gradient_trains_with_sparse_adam():
    _, layer = make(sparse=True)
    before = layer.lora_A.detach().clone()
    optimizer = torch.optim.SparseAdam([layer.lora_A])
    layer(torch.tensor([1, 5])).sum().backward()
    optimizer.step()
    changed = (layer.lora_A != before).any(0).nonzero().flatten()
    assert changed.tolist() == [1, 5]


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_merge_and_unmerge(dtype):
    base, layer = make(dtype)
    layer.eval()
    ids = torch.arange(30)
    frozen, unmerged = layer.weight.detach().clone(), layer(ids)
    layer.merge()
    expected = frozen.double() + 2 * (layer.lora_A.double().t() @ layer.lora_B.double().t())
    torch.testing.assert_close(layer.weight.double(), expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(layer(ids), unmerged, rtol=0.02, atol=0.02)
    assert torch.equal(layer(ids), layer.weight)
    assert torch.equal(base.weight, frozen)
    assert torch.equal(layer.state_dict()["weight"], frozen)
    layer.unmerge()
    assert layer.weight is base.weight


@pytest.mark.parametrize("bad", [nn.Linear(3, 4), nn.EmbeddingBag(3, 4)])
def test_bases_that_are_no_embedding(bad):
    with pytest.raises(TypeError, match=f"base must be a .*Embedding, got {type(bad).__name__}"):
        LoRAEmbedding(bad, 2, 4)


def test_adapters_travel_in_pefts_format(tmp_path):
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 8))
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1"], init_lora_weights=False)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    frozen = [m.base_layer for m in theirs.modules() if hasattr(m, "base_layer")]
    model = nn.Sequential(LoRAEmbedding(frozen[0], 4, 8), fastlora.LoRALinear(frozen[1], 4, 8))
    fastlora.load_adapter(model.eval(), tmp_path / "theirs")
    ids = torch.randint(0, 30, (3, 5))
    torch.testing.assert_close(model(ids), theirs(ids))
    fastlora.save_adapter(model, tmp_path / "mine")
    other = nn.Sequential(LoRAEmbedding(frozen[0], 2, 8), fastlora.LoRALinear(frozen[1], 2, 8))
    fastlora.switch_adapter(other.eval(), tmp_path / "mine")
    assert torch.equal(other(ids), model(ids))
