"""loralib run beside fastlora: same parameters in; outputs, gradients and state dicts out, merged or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRAConv1d, LoRAConv2d, LoRAConv3d, LoRAEmbedding, LoRALinear, LoRAMergedLinear

loralib = pytest.importorskip("loralib")

# fastlora sums in another order, and its interpreted kernels in fp32 too.
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.float64: {}}


def linear(dtype):
    theirs = loralib.Linear(24, 20, r=4, lora_alpha=8, dtype=dtype)
    mine = LoRALinear(nn.Linear(24, 20, dtype=dtype), 4, 8, merge_weights=True)
    return theirs, mine, torch.randn(3, 5, 24, dtype=dtype)


def linear_rank_one(dtype):
    theirs = loralib.Linear(7, 5, r=1, lora_alpha=3, bias=False, dtype=dtype)
    mine = LoRALinear(nn.Linear(7, 5, bias=False, dtype=dtype), 1, 3, merge_weights=True)
    return theirs, mine, torch.randn(4, 7, dtype=dtype)


def embedding(dtype):
    theirs = loralib.Embedding(30, 16, r=4, lora_alpha=8, padding_idx=2, dtype=dtype)
    base = nn.Embedding(30, 16, padding_idx=2, dtype=dtype)
    return theirs, LoRAEmbedding(base, 4, 8, merge_weights=True), torch.randint(0, 30, (3, 9))


def embedding_scaled(dtype):
    theirs = loralib.Embedding(6, 16, r=4, lora_alpha=8, scale_grad_by_freq=True, dtype=dtype)
    base = nn.Embedding(6, 16, scale_grad_by_freq=True, dtype=dtype)
    return theirs, LoRAEmbedding(base, 4, 8, merge_weights=True), torch.randint(0, 6, (40,))


def embedding_max_norm(dtype):
    theirs = loralib.Embedding(30, 16, r=4, lora_alpha=8, max_norm=1.0, dtype=dtype)
    base = nn.Embedding(30, 16, max_norm=1.0, dtype=dtype)
    return theirs, LoRAEmbedding(base, 4, 8, merge_weights=True), torch.arange(30)


def merged(enable, bias=True):
    def make(dtype):
        n = 8 * len(enable)
        theirs = loralib.MergedLinear(
            24, n, r=4, lora_alpha=8, enable_lora=enable, bias=bias, dtype=dtype
        )
        mine = LoRAMergedLinear(
            24, n, 4, 8, enable_lora=enable, bias=bias, dtype=dtype, merge_weights=True
        )
        return theirs, mine, torch.randn(3, 5, 24, dtype=dtype)

    return make


def stored_as_gpt2(enable):
    """loralib's ``Linear`` is the ``MergedLinear`` of one slice: the same formula, keys and shapes."""

    def make(dtype):
        options = {"fan_in_fan_out": True, "dtype": dtype}
        if len(enable) == 1:
            theirs = loralib.Linear(24, 16, r=4, lora_alpha=8, **options)
        else:
            theirs = loralib.MergedLinear(24, 16, r=4, lora_alpha=8, enable_lora=enable, **options)
        mine = LoRAMergedLinear(24, 16, 4, 8, enable_lora=enable, merge_weights=True, **options)
        return theirs, mine, torch.randn(3, 5, 24, dtype=dtype)

    return make


def conv(cls, mine_cls, base_cls, k, shape, **options):
    def make(dtype):
        theirs = cls(4, 6, k, r=2, lora_alpha=3, **options).to(dtype)
        base = base_cls(4, 6, k, dtype=dtype, **options)
        return theirs, mine_cls(base, 2, 3, merge_weights=True), torch.randn(shape, dtype=dtype)

    return make


L = [
    pytest.param(linear, id="linear"),
    pytest.param(linear_rank_one, id="linear-r1-nobias"),
    pytest.param(embedding, id="embedding-padding"),
    pytest.param(embedding_scaled, id="embedding-scale-grad"),
    pytest.param(embedding_max_norm, id="embedding-max-norm"),
    pytest.param(merged([True, False, True]), id="merged-q-v"),
    pytest.param(merged([True, True, True], bias=False), id="merged-all-nobias"),
    pytest.param(merged([False, True]), id="merged-second"),
    pytest.param(stored_as_gpt2([True]), id="linear-fan-in-fan-out"),
    pytest.param(stored_as_gpt2([True, False]), id="merged-fan-in-fan-out"),
    pytest.param(conv(loralib.Conv2d, LoRAConv2d, nn.Conv2d, 3, (2, 4, 8, 7)), id="conv2d"),
    pytest.param(
        conv(
            loralib.Conv2d, LoRAConv2d, nn.Conv2d, 3, (2, 4, 8, 7),
            groups=2, stride=2, padding=1, padding_mode="reflect",
        ),
        id="conv2d-grouped",
    ),
    pytest.param(
        conv(loralib.Conv2d, LoRAConv2d, nn.Conv2d, 1, (2, 4, 8, 7), bias=False), id="conv2d-1x1"
    ),
    pytest.param(conv(loralib.Conv1d, LoRAConv1d, nn.Conv1d, 1, (2, 4, 9)), id="conv1d"),
    pytest.param(conv(loralib.Conv3d, LoRAConv3d, nn.Conv3d, 1, (2, 4, 5, 4, 3)), id="conv3d"),
]  # fmt: skip
EACH = pytest.mark.parametrize("make", L)


def pair(make, dtype=torch.float64):
    """The two layers with the same values, and an input."""
    torch.manual_seed(0)
    theirs, mine, x = make(dtype)
    assert [n for n, p in mine.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    for parameter in (theirs.lora_A, theirs.lora_B):
        nn.init.normal_(parameter)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine, x


def step(layer, x, dy=None):
    """The output and the gradients of x and of the adapter."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_(x.is_floating_point())
    y = layer(leaf)
    dy = torch.randn_like(y) if dy is None else dy
    y.backward(dy)
    grads = [leaf.grad] if leaf.requires_grad else []
    return dy, [y.detach(), *grads, layer.lora_A.grad, layer.lora_B.grad]


def assert_same(mine, theirs, dtype=torch.float64):
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m, t, **TOLERANCE[dtype])


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_in_training(make, dtype):
    theirs, mine, x = pair(make, dtype)
    dy, expected = step(theirs, x)
    assert_same(step(mine, x, dy)[1], expected, dtype)


@EACH
def test_state_dicts_have_the_same_names_shapes_and_initial_values(make):
    torch.manual_seed(0)
    theirs, mine, _ = make(torch.float64)
    a, b = theirs.state_dict(), mine.state_dict()
    assert sorted((k, tuple(v.shape)) for k, v in a.items()) == sorted(
        (k, tuple(v.shape)) for k, v in b.items()
    )
    for name in ("lora_A", "lora_B"):
        assert a[name].any() == b[name].any()  # which of the two starts at zero
        if a[name].any() and a[name].numel() >= 16:
            assert 0.5 < a[name].std() / b[name].std() < 2


@EACH
def test_eval_merges_and_train_unmerges(make):
    theirs, mine, x = pair(make)
    theirs.eval()
    assert_same([mine.eval()(x)], [theirs(x)])
    assert mine.merged and theirs.merged
    holder, other = (getattr(m, "conv", m) for m in (mine, theirs))
    torch.testing.assert_close(holder.weight.detach(), other.weight.detach())
    theirs.train()
    mine.train()
    assert not mine.merged
    fresh, _, _ = pair(make)
    frozen = getattr(fresh, "conv", fresh).weight
    assert torch.equal(holder.weight, frozen)
    if make is not embedding_max_norm:  # loralib subtracts from weights that have been scaled
        dy, expected = step(theirs, x)
        assert_same(step(mine, x, dy)[1], expected)


@EACH
def test_a_few_training_steps_give_the_same_checkpoint(make):
    theirs, mine, x = pair(make)
    for layer in (theirs, mine):
        optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    a, b = loralib.lora_state_dict(theirs), fastlora.lora_state_dict(mine)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-6, atol=1e-6)


def models(bias=True):
    """loralib's model and fastlora's, of every kind of layer and a plain one."""

    class Net(nn.Module):
        def __init__(self, emb, qkv, out, conv, norm):
            super().__init__()
            self.emb, self.qkv, self.out, self.conv, self.norm = emb, qkv, out, conv, norm

    enable = [True, False, True]
    theirs = Net(
        loralib.Embedding(20, 8, r=2),
        loralib.MergedLinear(8, 24, r=2, enable_lora=enable),
        loralib.Linear(8, 6, r=2, bias=bias),
        loralib.Conv2d(4, 6, 3, r=2),
        nn.LayerNorm(8),
    )
    mine = Net(
        LoRAEmbedding(nn.Embedding(20, 8), 2, 1),
        LoRAMergedLinear(8, 24, 2, enable_lora=enable),
        LoRALinear(nn.Linear(8, 6, bias=bias), 2, 1),
        LoRAConv2d(nn.Conv2d(4, 6, 3), 2),
        nn.LayerNorm(8),
    )
    return theirs, mine


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_what_is_trained_and_saved(bias, has_bias):
    theirs, mine = models(has_bias)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    fastlora.mark_only_lora_as_trainable(mine, bias)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (theirs, mine)]
    assert trained[0] == trained[1]
    a, b = loralib.lora_state_dict(theirs, bias), fastlora.lora_state_dict(mine, bias)
    assert {k: tuple(v.shape) for k, v in a.items()} == {k: tuple(v.shape) for k, v in b.items()}
    with fastlora.merged(mine.eval()):
        again = fastlora.lora_state_dict(mine, bias)
    assert all(torch.equal(again[k], v) for k, v in b.items())


@pytest.mark.parametrize("state", ["unmerged", "merged"])
@pytest.mark.parametrize("how", ["load_lora_state_dict", "load_state_dict"])
def test_loralibs_checkpoints_load(how, state, tmp_path):
    theirs, mine = models()
    for name, p in theirs.named_parameters():
        if "lora_" in name or name.endswith("bias"):
            nn.init.normal_(p)
    mine.load_state_dict({k: v for k, v in theirs.state_dict().items() if "lora_" not in k}, False)
    torch.save(loralib.lora_state_dict(theirs, "all"), tmp_path / "lora.pt")
    if state == "merged":
        fastlora.merge(mine.eval())
    saved = torch.load(tmp_path / "lora.pt")
    if how == "load_state_dict":
        mine.load_state_dict(saved, strict=False)
    else:
        fastlora.load_lora_state_dict(mine, saved)
    x, ids, image = torch.randn(3, 8), torch.arange(20), torch.randn(1, 4, 5, 5)
    for name, value in (("emb", ids), ("qkv", x), ("out", x), ("conv", image)):
        a, b = (getattr(m, name)(value) for m in (mine, theirs))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert getattr(mine, name).merged == (state == "merged")


def test_adapters_are_switched_in_loralibs_format():
    theirs, mine = models()
    for p in theirs.parameters():
        nn.init.normal_(p)
    task = loralib.lora_state_dict(theirs)
    fastlora.merge(mine.eval())
    fastlora.switch_adapter(mine, task)
    for name in task:
        assert torch.equal(mine.state_dict()[name], task[name])
    frozen = mine.state_dict()["qkv.weight"]
    assert torch.equal(mine.qkv.weight[8:16], frozen[8:16])
    delta = task["qkv.lora_B"][8:] @ task["qkv.lora_A"][2:] * 0.5
    torch.testing.assert_close(mine.qkv.weight[16:], frozen[16:] + delta)
    with pytest.raises(ValueError, match="is a LoRAMergedLinear, which PEFT's files"):
        fastlora.save_adapter(mine, "nowhere")


BAD = [
    pytest.param(lambda s: s.pop("out.lora_A"), "lacks adapters of the model: out.lora_A"),
    pytest.param(lambda s: s.update({"out.weight": torch.ones(6, 8)}), "alone, got out.weight"),
    pytest.param(lambda s: s.update({"nix.lora_A": torch.ones(6, 8)}), "nix.lora_A, which the"),
    pytest.param(
        lambda s: s.update({"out.lora_A": torch.ones(3, 8)}), r"must be \(2, 8\), as in.*\(3, 8\)"
    ),
    pytest.param(
        lambda s: s.update({"out.lora_A": torch.ones(2, 8).int()}), "float tensor, got torch.int32"
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda _: "")
def test_bad_checkpoints_are_named_and_nothing_is_loaded(change, message):
    theirs, mine = models()
    state = loralib.lora_state_dict(theirs)
    change(state)
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fastlora.load_lora_state_dict(mine, state)
    assert all(torch.equal(v, before[k]) for k, v in mine.state_dict().items())


def test_bad_arguments_are_named():
    _, mine = models()
    for call in (fastlora.mark_only_lora_as_trainable, fastlora.lora_state_dict):
        with pytest.raises(ValueError, match=r"bias must be one of 'none', 'all', .* got 'some'"):
            call(mine, "some")
        with pytest.raises(TypeError, match=r"model must be a .*Module, got int"):
            call(3)
    with pytest.raises(TypeError, match="state_dict must be a mapping, got list"):
        fastlora.load_lora_state_dict(mine, [])


def test_only_a_part_of_a_name_makes_an_adapter():
    model = nn.ModuleDict({"explora_net": nn.Linear(2, 2)})
    fastlora.mark_only_lora_as_trainable(model)
    assert not model["explora_net"].weight.requires_grad
    assert not fastlora.lora_state_dict(model)


@pytest.mark.no_poison  # which knows nothing of a device for all
def test_a_model_without_values_and_values_without_a_copy_are_refused():
    def model():
        made = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        fastlora.inject(made, ("0", "1"), r=2, lora_alpha=4)
        return made

    state = {k: torch.ones(v.shape) for k, v in fastlora.lora_state_dict(model()).items()}
    with torch.device("meta"):
        empty = model()
    with pytest.raises(ValueError, match=r"0\.lora_A cannot be loaded: .* meta device"):
        fastlora.load_lora_state_dict(empty, state)
    for value in (state["1.lora_B"].to_sparse(), state["1.lora_B"].to("meta")):
        loaded = model()
        with pytest.raises(ValueError, match=r"1\.lora_B must be a dense tensor with values"):
            fastlora.load_lora_state_dict(loaded, {**state, "1.lora_B": value})
        assert not loaded[0].lora_B.any()
