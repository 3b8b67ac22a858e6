"""fastlora.lora_linear_group: values and every gradient against fp64, one mask, what is made, and errors.

The criterion is that of tests/oracle.py: no further from fp64 than plain eager in the same dtype.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

import fastlora
from fastlora import dispatch, reference
from fastlora.kernels.config import dropout_threshold, keep_scale

lora_shrink = pytest.importorskip("fastlora.kernels.lora_shrink", reason="needs Triton").lora_shrink
autograd_group = pytest.importorskip("fastlora.autograd_group", reason="needs Triton")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
KINDS = ("weights", "lora_As", "lora_Bs", "biases")
QKV = (40, 24, 24), (8, 8, 8)
SEED = 77


def make_group(M, K, widths, ranks, dtype, device, adapter=None, bias=(), requires=None):
    """x, the tensors of the projections by kind, and dy of each; unit variance, as oracle.make_case."""

    def draw(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    adapter = adapter or dtype
    tensors = {
        "weights": [draw(n, K, scale=K**-0.5) for n in widths],
        "lora_As": [draw(r, K, scale=K**-0.5, dtype=adapter) for r in ranks],
        "lora_Bs": [
            draw(n, r, scale=r**-0.5, dtype=adapter) for n, r in zip(widths, ranks, strict=True)
        ],
        "biases": [draw(n) if i in bias else None for i, n in enumerate(widths)],
    }
    return draw(M, K), tensors, [draw(M, n) for n in widths]


def named(x, tensors):
    """Every tensor by name: ``x``, ``weights.0``, ..."""
    found = {f"{k}.{i}": t for k in KINDS for i, t in enumerate(tensors[k]) if t is not None}
    return {"x": x, **found}


def run(call, x, tensors, dys, wanted=None, **options):
    """Outputs and gradients by name. ``wanted`` names what needs one; a dy of None leaves an output."""
    leaf = {}
    for name, t in named(x, tensors).items():
        leaf[name] = t.detach().requires_grad_(wanted is None or name in wanted)
    grouped = {k: [leaf.get(f"{k}.{i}") for i in range(len(tensors["weights"]))] for k in KINDS}
    ys = call(leaf["x"], **grouped, **options)
    asked = [n for n in leaf if leaf[n].requires_grad]
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None and y.requires_grad]
    grads = ()
    if asked and pairs:
        outputs, dys = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, [leaf[n] for n in asked], dys, allow_unused=True)
    made = {f"y.{i}": y.detach() for i, y in enumerate(ys)}
    return made | dict(zip(asked, grads, strict=False))


def dropped_out(x, dropout_p, seed):
    """What the adapters see of x."""
    if dropout_p == 0:
        return x
    keep = reference.dropout_keep_mask(seed, *x.shape, dropout_p, x.device)
    return torch.where(keep, x * keep_scale(dropout_p), 0)


def plain(x, weights, lora_As, lora_Bs, biases, scaling, dropout_p=0.0, seed=None):
    """Eager LoRA in the dtype of x, with the shared mask."""
    dropped = dropped_out(x, dropout_p, seed)
    return tuple(
        F.linear(x, w, bias) + f * F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
        for w, a, b, bias, f in zip(weights, lora_As, lora_Bs, biases, scaling, strict=True)
    )


def depth_of(name, x, dys):
    """As oracle.depth_of: the length of the longest sum of a result."""
    (M, K), widths = x.shape, [dy.shape[1] for dy in dys if dy is not None]
    depths = {"y": K, "x": sum(widths), "weights": M, "biases": M}
    depths |= {"lora_As": max([M, *widths]), "lora_Bs": max(M, K)}
    return depths[name.partition(".")[0]]


def one_rounding(name, x, tensors, dys, scaling, dropped):
    """A rounding of each summand, where the gradient of a lora_B is one number: it may all but cancel."""
    kind, _, index = name.partition(".")
    i = int(index or 0)
    if kind != "lora_Bs" or tensors[kind][i].numel() > 1 or dys[i] is None:
        return None
    s = scaling[i] * (dropped.double() @ tensors["lora_As"][i].double().t())  # [M, 1]
    return torch.finfo(x.dtype).eps * (s * dys[i].double()).norm()


def check(oracle, x, tensors, dys, scaling, p=0.0, wanted=None):
    """The fused path runs, and is as exact as plain eager; give what it made."""
    decision = fastlora.explain_group(x, **tensors, dropout_p=p)
    assert decision.fused, str(decision)
    seed = torch.tensor(SEED, device=x.device) if p else None
    options = {"scaling": scaling, "dropout_p": p, "seed": seed}
    got = run(fastlora.lora_linear_group, x, tensors, dys, wanted, **options)
    baseline = run(plain, x, tensors, dys, wanted, **options)
    exact = {k: [None if t is None else t.double() for t in v] for k, v in tensors.items()}
    truth = run(
        reference.lora_linear_group,
        x.double(),
        exact,
        [None if dy is None else dy.double() for dy in dys],
        wanted,
        **options,
    )
    assert got.keys() == truth.keys()
    given = named(x, tensors)
    for name, t in truth.items():
        if t is None:
            assert got[name] is None, name
            continue
        depth = depth_of(name, x, dys)
        chance = one_rounding(name, x, tensors, dys, scaling, dropped_out(x, p, seed))
        oracle.assert_close(got[name], baseline[name], t, x.dtype, name, depth, chance)
        assert got[name].dtype == (x.dtype if name.startswith("y") else given[name].dtype), name
    return got


GROUPS = [
    # M, K, widths, ranks, projections with a bias
    pytest.param(35, 40, *QKV, (0, 2), id="qkv"),
    pytest.param(19, 24, (56, 56), (16, 16), (), id="gate-up"),
    pytest.param(33, 37, (51, 1, 30), (3, 1, 12), (1,), id="odd"),
    pytest.param(1, 16, (24, 8), (1, 4), (0, 1), id="one-token"),
    pytest.param(9, 1, (8, 17), (2, 5), (), id="one-column"),
    pytest.param(20, 72, (64, 40), (136, 120), (), id="ranks-256"),
    pytest.param(17, 16, (8, 16, 24, 32), (8, 4, 2, 6), (3,), id="four"),
]
if torch.cuda.is_available():
    GROUPS += [
        pytest.param(8192, 4096, (4096, 1024, 1024), (16, 16, 16), (), id="llama-qkv"),
        pytest.param(2048, 4096, (14336, 14336), (16, 16), (), id="llama-gate-up"),
        pytest.param(4097, 4099, (1025, 515), (8, 33), (0,), id="odd-4097"),
        pytest.param(300, 1000, (1032, 264), (64, 40), (1,), id="aligned-not-tile"),
    ]


@pytest.mark.parametrize("p", [0.0, 0.2])
@DTYPES
@pytest.mark.parametrize(("M", "K", "widths", "ranks", "bias"), GROUPS)
def test_values_and_gradients(oracle, device, M, K, widths, ranks, bias, dtype, p):
    x, tensors, dys = make_group(M, K, widths, ranks, dtype, device, bias=bias)
    scaling = [1.5, 0.5, -2.0, 1.0][: len(widths)]
    check(oracle, x, tensors, dys, scaling, p)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("which", ["all", "one"])
def test_fp32_adapters_beside_bf16_x(oracle, device, which, p):
    x, tensors, dys = make_group(35, 40, *QKV, BF16, device, adapter=F32)
    if which == "one":
        tensors["lora_As"][0] = tensors["lora_As"][0].to(BF16)
        tensors["lora_Bs"][2] = tensors["lora_Bs"][2].to(BF16)
    got = check(oracle, x, tensors, dys, [2.0] * 3, p)
    for name in ("lora_As.1", "lora_As.2"):  # not rounded to bf16 on the way, whatever lora_As.0 is
        assert not torch.equal(got[name], got[name].to(BF16).to(F32))


NAMES = ["x", *(f"{k}.{i}" for k in KINDS for i in range(3))]
WANTED = [
    ("lora_As.0", "lora_Bs.0", "lora_As.1", "lora_Bs.1", "lora_As.2", "lora_Bs.2"),
    ("x",),
    ("lora_As.1",),
    ("lora_Bs.2",),
    ("lora_As.0", "lora_Bs.2"),
    ("x", "lora_As.2"),
    ("weights.1", "biases.0"),
    ("weights.0", "weights.2", "x", "lora_Bs.0"),
    (),
]


@pytest.mark.parametrize("wanted", ["biases.1", "biases.2"])
def test_one_bias_of_two(oracle, device, wanted):
    x, tensors, dys = make_group(9, 16, *QKV, F32, device, bias=(1, 2))
    check(oracle, x, tensors, dys, [1.0] * 3, wanted=(wanted,))


@pytest.mark.parametrize("wanted", WANTED, ids="-".join)
def test_only_wanted_gradients(oracle, device, wanted):
    x, tensors, dys = make_group(20, 40, *QKV, F16, device, bias=(0, 1, 2))
    got = check(oracle, x, tensors, dys, [1.0, 2.0, 0.5], 0.2, wanted)
    assert got.keys() == {"y.0", "y.1", "y.2", *wanted}


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("tensor_scaling", [False, True], ids=["floats", "tensors"])
def test_outputs_that_nothing_uses(oracle, device, used, tensor_scaling):
    x, tensors, dys = make_group(20, 40, *QKV, F32, device, bias=(0, 1, 2))
    dys = [dy if i in used else None for i, dy in enumerate(dys)]
    scaling = [1.5, 0.5, -2.0]
    if tensor_scaling:
        scaling = [torch.tensor(s, device=device) for s in scaling]
    got = check(oracle, x, tensors, dys, scaling, 0.2)
    for name in NAMES[1:]:
        assert (got[name] is not None) == (int(name[-1]) in used), name


def test_every_projection_sees_the_mask_of_lora_linear(device):
    x, tensors, dys = make_group(35, 40, *QKV, F32, device)
    seed = torch.tensor(SEED, device=device)
    options = {"dropout_p": 0.4, "seed": seed}
    got = run(fastlora.lora_linear_group, x, tensors, dys, scaling=[1.5, 0.5, 1.0], **options)

    def apart(x, weights, lora_As, lora_Bs, biases):
        members = zip(weights, lora_As, lora_Bs, [1.5, 0.5, 1.0], strict=True)
        return [fastlora.lora_linear(x, w, a, b, scaling=f, **options) for w, a, b, f in members]

    expected = run(apart, x, tensors, dys)
    for name, t in expected.items():
        torch.testing.assert_close(got[name], t, rtol=1e-4, atol=1e-4, msg=name)


def test_the_seed_is_drawn_once(device):
    x, tensors, _ = make_group(9, 16, *QKV, F32, device)
    torch.manual_seed(5)
    drawn = fastlora.lora_linear_group(x, **tensors, dropout_p=0.5)
    after = torch.rand(1, device=device)
    torch.manual_seed(5)
    seed = reference.draw_seed(x.device)
    assert torch.equal(after, torch.rand(1, device=device))
    again = fastlora.lora_linear_group(x, **tensors, dropout_p=0.5, seed=seed)
    twin = reference.lora_linear_group(x, **tensors, dropout_p=0.5, seed=seed)
    for y, z, t in zip(drawn, again, twin, strict=True):
        assert torch.equal(y, z)
        torch.testing.assert_close(y, t)


def test_x_is_read_once_and_one_mask_is_kept(device, monkeypatch):
    calls = []
    for name in ("lora_shrink", "lora_grad_a", "lora_grad_ab", "lora_dx"):
        kernel = getattr(autograd_group, name)
        monkeypatch.setattr(
            autograd_group,
            name,
            lambda t, *args, _k=kernel, _n=name, **kw: calls.append((_n, t)) or _k(t, *args, **kw),
        )
    x, tensors, dys = make_group(9, 16, *QKV, F32, device)
    masks = []

    def pack(t):
        if t.dtype == torch.uint8:
            masks.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(fastlora.lora_linear_group, x, tensors, dys, dropout_p=0.5)
    assert len(masks) == 1
    reads = [name for name, t in calls if t.data_ptr() == x.data_ptr()]
    assert reads == ["lora_shrink", "lora_grad_ab"]  # s of all three, dA of all three
    assert [name for name, _ in calls].count("lora_dx") == 1


@pytest.mark.parametrize("p", [0.0, 0.3])
@DTYPES
def test_shrink_with_a_factor_for_each_rank(device, dtype, p):
    x, tensors, _ = make_group(35, 40, (8,), (13,), dtype, device)
    (a,) = tensors["lora_As"]
    seed = torch.tensor(SEED, device=device) if p else None
    factors = torch.randn(13, device=device)
    wide = x.new_full((35, 20), 7.0)
    s, mask = lora_shrink(x, a, factors, p, seed, factor=0.5, out=wide[:, 3:16])
    assert s.data_ptr() == wide[:, 3:].data_ptr()
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 16:] == 7).all()
    for r, factor in enumerate(factors):
        # Where it allocates s itself, that may be a sum of parts.
        alone = torch.empty(35, 13, dtype=dtype, device=device)
        expected, same = lora_shrink(x, a, factor, p, seed, factor=0.5, out=alone)
        assert torch.equal(s[:, r], expected[:, r])
        assert mask is same is None or torch.equal(mask, same)


def test_eval_drops_nothing(device):
    x, tensors, dys = make_group(9, 16, *QKV, BF16, device)
    got = run(fastlora.lora_linear_group, x, tensors, dys, dropout_p=0.5, training=False)
    for name, t in run(fastlora.lora_linear_group, x, tensors, dys).items():
        assert torch.equal(got[name], t), name


def test_a_p_that_rounds_to_zero_drops_nothing(device):
    assert dropout_threshold(1e-6) == 0
    x, tensors, dys = make_group(9, 16, *QKV, F32, device)
    got = run(fastlora.lora_linear_group, x, tensors, dys, dropout_p=1e-6)
    for name, t in run(fastlora.lora_linear_group, x, tensors, dys).items():
        assert torch.equal(got[name], t), name


def test_scaling_as_floats_and_as_tensors(device):
    x, tensors, dys = make_group(20, 40, *QKV, F16, device)

    def made(scaling):
        return run(fastlora.lora_linear_group, x, tensors, dys, scaling=scaling)

    expected, same = made([1.5, 0.5, -2.0]), made(0.75)
    for where in {"cpu", device}:
        tensor = [torch.tensor(s, device=where) for s in (1.5, 0.5, -2.0)]
        for got, values in (
            (made(tensor), expected),
            (made([1.5, tensor[1], -2]), expected),
            (made(torch.tensor(0.75, device=where)), same),
            (made((0.75,) * 3), same),
        ):
            for name, t in values.items():
                assert torch.equal(got[name], t), (where, name)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
def test_leading_dimensions_are_kept(device, leading):
    x, tensors, _ = make_group(torch.Size(leading).numel(), 16, *QKV, F32, device)
    flat = fastlora.lora_linear_group(x, **tensors)
    ys = fastlora.lora_linear_group(x.view(*leading, 16), **tensors)
    for y, f in zip(ys, flat, strict=True):
        assert y.shape == (*leading, f.shape[1])
        assert torch.equal(y.reshape(f.shape), f)


def test_layouts(oracle, device):
    x, tensors, dys = make_group(24, 40, *QKV, F16, device, bias=(0,))
    x = x.t().contiguous().t()
    tensors["biases"][0] = tensors["biases"][0][:, None].repeat(1, 2)[:, 1]
    tensors["weights"][1] = tensors["weights"][1].t().contiguous().t()
    tensors["lora_As"][2] = tensors["lora_As"][2].t().contiguous().t()
    tensors["lora_Bs"][0] = tensors["lora_Bs"][0].t().contiguous().t()
    dys[0] = dys[0].new_ones(()).expand_as(dys[0])
    dys[1] = dys[1].t().contiguous().t()
    check(oracle, x, tensors, dys, [1.5, 0.5, 1.0], 0.2)


def test_two_runs_are_bit_identical(device):
    x, tensors, dys = make_group(130, 48, (40, 24), (16, 40), BF16, device)
    options = {"dropout_p": 0.1, "seed": torch.tensor(3, device=device)}
    first = run(fastlora.lora_linear_group, x, tensors, dys, **options)
    second = run(fastlora.lora_linear_group, x, tensors, dys, **options)
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("widths", "ranks", "words"),
    [((24,), (8,), "rank 8, one projection"), ((8, 12), (200, 60), "200 \\+ 60 are above 256")],
    ids=["one", "many-ranks"],
)
def test_each_by_itself(oracle, device, widths, ranks, words, p):
    x, tensors, dys = make_group(9, 16, widths, ranks, F32, device)
    assert re.search(words, fastlora.explain_group(x, **tensors).reason)
    check(oracle, x, tensors, dys, [1.5, 0.5][: len(widths)], p)


def test_explain(device):
    x, tensors, _ = make_group(9, 16, *QKV, F32, device)
    assert "rank 24 in one pass over x: 8 + 8 + 8" in str(fastlora.explain_group(x, **tensors))
    with dispatch.force("eager"):
        decision = fastlora.explain_group(x, **tensors)
    assert decision.path == "eager"
    assert "projection 0: fastlora.dispatch.force('eager') is active" in decision.reason
    tensors["lora_Bs"][1] = tensors["lora_Bs"][1].to(BF16)
    decision = fastlora.explain_group(x, **tensors)
    assert decision.path == "eager"
    assert "projection 1: an adapter is torch.bfloat16" in decision.reason


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_eager_twin_runs_where_kernels_cannot(device, p):
    x, tensors, dys = make_group(9, 16, (8, 12), (300, 4), F32, device)
    options = {"dropout_p": p, "seed": torch.tensor(3, device=device), "scaling": [1.5, 0.5]}
    assert fastlora.explain_group(x, **tensors).reason == "projection 0: rank 300 is above 256"
    got = run(fastlora.lora_linear_group, x, tensors, dys, **options)
    for name, t in run(reference.lora_linear_group, x, tensors, dys, **options).items():
        assert torch.equal(got[name], t), name


def test_empty_x_runs_eagerly(device):
    x, tensors, _ = make_group(0, 16, *QKV, F32, device)
    assert "empty" in fastlora.explain_group(x, **tensors).reason
    assert [y.shape for y in fastlora.lora_linear_group(x, **tensors)] == [(0, n) for n in QKV[0]]


def test_autocast(device):
    x, tensors, dys = make_group(9, 16, *QKV, F32, device, bias=(1,))
    with torch.autocast(device, BF16):
        got = run(fastlora.lora_linear_group, x, tensors, [dy.to(BF16) for dy in dys])
    cast = {k: [None if t is None else t.to(BF16) for t in v] for k, v in tensors.items()}
    expected = fastlora.lora_linear_group(
        x.to(BF16), **{**cast, "lora_As": tensors["lora_As"], "lora_Bs": tensors["lora_Bs"]}
    )
    for i, y in enumerate(expected):
        assert torch.equal(got[f"y.{i}"], y)
    assert all(got[name].dtype == F32 for name in ("x", "weights.0", "lora_As.1", "biases.1"))


def test_double_backward_is_refused(device):
    x, tensors, _ = make_group(9, 16, *QKV, F32, device)
    x.requires_grad_()
    ys = fastlora.lora_linear_group(x, **tensors)
    (dx,) = torch.autograd.grad(sum(y.square().sum() for y in ys), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        dx.sum().backward()


def test_torch_func_grad(device):
    x, tensors, _ = make_group(9, 16, *QKV, F32, device)

    def loss(x, lora_As):
        ys = fastlora.lora_linear_group(x, **{**tensors, "lora_As": lora_As})
        return sum(y.square().sum() for y in ys)

    dx, das = torch.func.grad(loss, argnums=(0, 1))(x, tensors["lora_As"])
    with dispatch.force("eager"):
        expected = torch.func.grad(loss, argnums=(0, 1))(x, tensors["lora_As"])
    torch.testing.assert_close((dx, das), expected, rtol=1e-4, atol=1e-4)


def test_a_signature_is_checked_once(device, monkeypatch):
    x, tensors, _ = make_group(9, 16, *QKV, F32, device, bias=(1,))
    first = fastlora.lora_linear_group(x, **tensors, scaling=2.0)
    monkeypatch.setattr("fastlora.group.check_tensors", None)
    again = fastlora.lora_linear_group(x, **tensors, scaling=(2.0, 2.0, 2.0))
    for y, z in zip(first, again, strict=True):
        assert torch.equal(y, z)
    with pytest.raises(ValueError, match="scaling must have one entry for each of 3"):
        fastlora.lora_linear_group(x, **tensors, scaling=[2.0])
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        fastlora.lora_linear_group(x[:8], **tensors)
    with dispatch.force("eager"), pytest.raises(TypeError, match="not callable"):
        fastlora.lora_linear_group(x, **tensors)


def arguments(device, **changes):
    _, tensors, _ = make_group(5, 16, (12, 8), (4, 2), F32, device)
    return {"x": torch.randn(5, 16, device=device), **tensors, **changes}


def two(device, *shapes):
    return [torch.randn(*s, device=device) for s in shapes]


WRONG = [
    (lambda d: {"weights": torch.randn(2, 12, 16, device=d)}, TypeError, "weights must be a list"),
    (lambda d: {"lora_As": None}, TypeError, "lora_As must be a list or tuple .*, got NoneType"),
    (lambda d: {"biases": torch.randn(2, 12)}, TypeError, "biases must be a list or tuple"),
    (
        lambda d: {k: [] for k in KINDS},
        ValueError,
        "weights must hold at least one tensor, got none",
    ),
    (
        lambda d: {"lora_Bs": two(d, (12, 4))},
        ValueError,
        "lora_Bs must have one entry for each of 2 weights, got 1",
    ),
    (lambda d: {"scaling": [1.0]}, ValueError, "scaling must have one entry for each of 2 weights"),
    (lambda d: {"scaling": [1.0, "2"]}, TypeError, "projection 1: scaling must be a float"),
    (
        lambda d: {"scaling": torch.ones(2, device=d)},
        ValueError,
        "projection 0: scaling must be a float or a 0-dim float tensor",
    ),
    (
        lambda d: {"lora_As": two(d, (4, 16), (2, 17))},
        ValueError,
        r"projection 1: lora_A must be .*\(2, 16\), got \(2, 17\)",
    ),
    (
        lambda d: {"weights": [*two(d, (12, 16)), torch.randn(8, 16, device=d).half()]},
        TypeError,
        "projection 1: weight must have the dtype of x, torch.float32, got torch.float16",
    ),
    (lambda d: {"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    (lambda d: {"dropout_p": 0.5, "seed": 3}, TypeError, "seed must be a Tensor, got int"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[w[2][:30] for w in WRONG])
def test_errors(device, change, error, message):
    with pytest.raises(error, match=message):
        fastlora.lora_linear_group(**arguments(device, **change(device)))
