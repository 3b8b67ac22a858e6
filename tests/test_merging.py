"""Merging: values rounded once, the frozen weight back bit for bit, and what may happen meanwhile."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlora
from fastlora import LoRALinear, reference

KEEPS = ["device", "host"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def make(k=40, n=24, r=4, dtype=torch.float32, **options):
    layer = LoRALinear(nn.Linear(k, n, dtype=dtype).eval(), r, 8, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def make_model(dtype=torch.float32, n=2, **options):
    model = nn.Sequential(*(nn.Linear(16, 16, dtype=dtype) for _ in range(n)))
    fastlora.inject(model, [str(i) for i in range(n)], r=4, lora_alpha=8, **options)
    for layer in model:
        nn.init.normal_(layer.lora_B)
    return model.eval()


def exact(layer, frozen):
    product = layer.lora_B.double() @ layer.lora_A.double()
    return (frozen.double() + layer.scaling * product).detach()


def bits(t):
    return t.detach().clone().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_merged_weight_is_the_exact_sum_rounded_once(dtype, adapter_dtype):
    layer = make(dtype=dtype, adapter_dtype=adapter_dtype)
    frozen = layer.weight.detach().clone()
    layer.merge()
    expected = exact(layer, frozen)
    # Half an ulp for the rounding (a whole one in the interpreter, which truncates bf16), and the
    # order of fp32 sums.
    unit = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 0.5)
    limit = unit * expected.abs() + 2.0**-20 if dtype != torch.float64 else 1e-12
    assert ((layer.weight.double() - expected).abs() <= limit).all()
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize(
    ("n", "k", "r"), [(24, 40, 4), (1, 1, 1), (67, 130, 3), (130, 257, 64), (64, 48, 200)]
)
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")])
def test_kernel_agrees_with_the_reference(n, k, r, dtypes, device):
    pytest.importorskip("triton")
    from fastlora.kernels.lora_merge import lora_merge

    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype, adapter_dtype = (names[d] for d in dtypes)
    weight = torch.randn(k, n, device=device).to(dtype).t()  # columns dense
    a = torch.randn(r, k, device=device).to(adapter_dtype)
    b = torch.randn(n, r, device=device).to(adapter_dtype)
    out = torch.full((n, k), torch.nan, dtype=dtype, device=device)
    lora_merge(weight, a, b, 0.5, out)
    truth = weight.double() + 0.5 * (b.double() @ a.double())
    twin = reference.lora_merge(weight, a, b, 0.5, torch.full_like(out, torch.nan))
    unit = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 0.5)
    for got in (out, twin):
        assert ((got.double() - truth).abs() <= unit * truth.abs() + r * 2.0**-20).all()
    assert lora_merge(weight, a, b, 0.5, weight) is weight
    torch.testing.assert_close(weight, out, rtol=0, atol=0)


def test_reference_goes_down_the_rows_in_blocks(monkeypatch):
    monkeypatch.setattr(reference, "MERGE_BLOCK", 3 * 40)
    layer = make(dtype=torch.float64)
    frozen = layer.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer.weight.detach(), exact(layer, frozen))


@pytest.mark.parametrize("keep", KEEPS)
def test_a_thousand_rounds_in_bf16_leave_the_weights_bit_identical(keep):
    model = make_model(torch.bfloat16)
    before = [bits(layer.weight) for layer in model]
    fastlora.merge(model, keep=keep)
    merged = [bits(layer.weight) for layer in model]
    with fastlora.dispatch.force("eager"):
        fastlora.merge(model, keep=keep)
        eager = [bits(layer.weight) for layer in model]
        for _ in range(1000):
            fastlora.unmerge(model)
            assert all(torch.equal(bits(m.weight), b) for m, b in zip(model, before, strict=True))
            fastlora.merge(model, keep=keep)
            assert all(torch.equal(bits(m.weight), b) for m, b in zip(model, eager, strict=True))
    fastlora.unmerge(model)
    fastlora.merge(model, keep=keep)
    assert all(torch.equal(bits(m.weight), b) for m, b in zip(model, merged, strict=True))
    assert not torch.equal(before[0], merged[0])


@pytest.mark.parametrize("keep", KEEPS)
def test_merged_forward_is_the_plain_linear(keep):
    model = make_model()
    x = torch.randn(5, 16)
    unmerged = model(x)
    fastlora.merge(model, keep=keep)
    expected = x
    for layer in model:
        expected = F.linear(expected, layer.weight, layer.bias)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model(x), unmerged)


def test_no_op_but_the_linear_runs_when_merged():
    layer = make()
    layer.merge()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(torch.randn(3, 40))
    plain = nn.Linear(40, 24)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as expected:
        plain(torch.randn(3, 40))
    names = [[e.key for e in p.key_averages()] for p in (profile, expected)]
    assert sorted(names[0]) == sorted(names[1])


def test_gradient_reaches_x_through_a_merged_layer():
    layer = make(dtype=torch.float64)
    layer.merge()
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 40))


def test_merge_weights_follows_eval_and_train():
    layer = make(merge_weights=True).train()
    frozen = bits(layer.weight)
    layer.eval()
    assert layer.merged
    assert not torch.equal(bits(layer.weight), frozen)
    layer.eval()
    layer.train()
    assert not layer.merged
    assert torch.equal(bits(layer.weight), frozen)
    assert not make(merge_weights=True).merged  # the base was in eval mode: nothing to merge yet


def test_training_while_merged_is_refused():
    layer = make().train()
    layer.merge()
    with pytest.raises(RuntimeError, match="LoRALinear is merged and in training mode"):
        layer(torch.randn(2, 40))
    with torch.no_grad():
        assert torch.isfinite(layer(torch.randn(2, 40))).all()


@pytest.mark.parametrize("keep", KEEPS)
def test_context_manager_leaves_what_was_merged_before(keep):
    model = make_model()
    model[0].merge()
    with fastlora.merged(model, keep=keep):
        assert model[0].merged and model[1].merged
    assert model[0].merged
    assert not model[1].merged
    with pytest.raises(KeyError), fastlora.merged(model):
        raise KeyError
    assert not model[1].merged


@pytest.mark.parametrize("keep", KEEPS)
def test_optimizer_step_while_merged_changes_the_adapter_alone(keep):
    model = make_model().train()
    frozen = bits(model[0].weight)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 16)).square().sum().backward()
    fastlora.merge(model, keep=keep)
    stale = bits(model[0].weight)
    optimizer.step()
    assert torch.equal(bits(model[0].weight), stale)
    fastlora.merge(model, keep=keep)  # takes the step in
    fresh = model[0].weight.detach().clone()
    assert not torch.equal(bits(fresh), stale)
    fastlora.unmerge(model)
    assert torch.equal(bits(model[0].weight), frozen)
    torch.testing.assert_close(fresh.double(), exact(model[0], model[0].weight))


@pytest.mark.parametrize("keep", KEEPS)
def test_state_dict_of_a_merged_model_is_the_unmerged_one(keep):
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fastlora.merge(model, keep=keep)
    for keep_vars in (False, True):
        got = model.state_dict(keep_vars=keep_vars)
        assert list(got) == list(before)
        assert all(torch.equal(got[k], v) for k, v in before.items())
    if keep == "device":  # where the frozen Parameter is still there
        assert got["0.weight"] is model[0]._frozen.values
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make_model()
    other.load_state_dict(torch.load(file))
    x = torch.randn(3, 16)
    fastlora.unmerge(model)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_merged_model_merges_what_was_loaded(keep, assign):
    model, other = make_model(), make_model()
    fastlora.merge(model, keep=keep)
    model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=assign)
    assert model[0].merged
    assert torch.equal(model[0].state_dict()["weight"], other[0].weight)
    fastlora.merge(other)
    x = torch.randn(3, 16)
    assert torch.equal(model(x), other(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.lora_A": torch.zeros(1, 1)}, strict=False)
    assert model[0].merged


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_of_a_merged_model_stand_alone(keep, copied):
    model = make_model()
    frozen = bits(model[0].weight)
    fastlora.merge(model, keep=keep)
    x = torch.randn(3, 16)
    other = copied(model)
    assert torch.equal(other(x), model(x))
    expected = bits(model[0].weight)
    other[0].unmerge()
    assert torch.equal(bits(other[0].weight), frozen)
    assert torch.equal(bits(model[0].weight), expected)
    assert torch.equal(other.state_dict()["0.weight"], model.state_dict()["0.weight"])
    other[0].load_state_dict(model[0].state_dict())


@pytest.mark.parametrize("keep", KEEPS)
def test_to_another_dtype_while_merged(keep):
    model = make_model()
    expected = copy.deepcopy(model).to(torch.bfloat16)
    fastlora.merge(model, keep=keep)
    model.to(torch.bfloat16)
    assert model[0].merged
    fastlora.merge(expected)
    assert torch.equal(bits(model[0].weight), bits(expected[0].weight))
    fastlora.unmerge(model)
    fastlora.unmerge(expected)
    assert torch.equal(bits(model[0].weight), bits(expected[0].weight))
    fastlora.merge(model)
    assert model.to("meta")[0].weight.is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("keep", KEEPS)
def test_to_another_device_while_merged(keep):
    model = make_model()
    frozen = bits(model[0].weight)
    fastlora.merge(model, keep=keep)
    model.cuda()
    if keep == "host":
        assert model[0]._frozen.values.is_pinned()
    x = torch.randn(3, 16, device="cuda")
    assert model(x).is_cuda
    model.cpu()
    fastlora.unmerge(model)
    assert torch.equal(bits(model[0].weight), frozen)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.head = LoRALinear(self.head, 2, 4)
        nn.init.normal_(self.head.lora_B)

    def forward(self, ids):
        return self.head(self.embed(ids))


def test_a_tied_weight_keeps_its_other_user_as_it_was():
    model = Tied().eval()
    ids = torch.arange(12)
    before, expected = model.embed(ids), model(ids)
    fastlora.merge(model)
    assert torch.equal(model.embed(ids), before)
    torch.testing.assert_close(model(ids), expected)
    assert torch.equal(model.state_dict()["head.weight"], before)
    model.to(torch.float64)
    fastlora.unmerge(model)
    assert model.head.weight is model.embed.weight


def test_in_place_merging_refuses_a_shared_weight():
    model = Tied().eval()
    before = bits(model.embed.weight)
    message = r"weight of head shares its memory: embed.weight, head.weight; use keep='device'"
    with pytest.raises(ValueError, match=message):
        fastlora.merge(model, keep="host")
    assert torch.equal(bits(model.embed.weight), before)
    assert not model.head.merged


def test_two_adapters_on_one_weight():
    base = nn.Linear(16, 16)
    model = nn.ModuleList([LoRALinear(base, 2, 4), LoRALinear(base, 4, 4)]).eval()
    for layer in model:
        nn.init.normal_(layer.lora_B)
    frozen = base.weight.detach().clone()
    fastlora.merge(model)
    for layer in model:
        torch.testing.assert_close(layer.weight.double(), exact(layer, frozen))
    fastlora.unmerge(model)
    assert model[0].weight is model[1].weight is base.weight


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("was_merged", [False, True])
def test_safe_refuses_what_is_not_finite_and_changes_nothing(keep, was_merged):
    model = make_model(torch.float16)
    if was_merged:
        fastlora.merge(model, keep=keep)
    before = [bits(layer.weight) for layer in model]
    with torch.no_grad():
        model[0].lora_B.mul_(0.5)
        model[1].lora_B[3] = 60000.0
        model[1].lora_A.fill_(60.0)
    with pytest.raises(ValueError, match="16 of 256 weights that are not finite"):
        fastlora.merge(model, safe=True, keep=keep)
    assert all(torch.equal(bits(m.weight), b) for m, b in zip(model, before, strict=True))
    assert [m.merged for m in model] == [was_merged] * 2
    with pytest.raises(ValueError, match="not finite"):
        model[1].merge(safe=True)
    assert torch.equal(bits(model[1].weight), before[1])
    fastlora.merge(model, keep=keep)
    assert torch.isinf(model[1].weight).any()


def test_a_failure_half_way_unmerges_again(monkeypatch):
    model = make_model()

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(model[1], "_products", fail)
    with pytest.raises(MemoryError):
        fastlora.merge(model)
    assert not model[0].merged


def test_merging_inside_inference_mode():
    model = make_model()
    with torch.inference_mode():
        fastlora.merge(model)
    x = torch.randn(2, 16, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    fastlora.merge(model)


def test_bad_arguments_are_named():
    layer = make()
    with pytest.raises(TypeError, match="safe must be a bool, got 1"):
        layer.merge(1)
    with pytest.raises(TypeError, match="merge_weights must be a bool, got 1"):
        make(merge_weights=1)
    with pytest.raises(ValueError, match="keep must be 'device' or 'host', got 'disk'"):
        fastlora.merge(make_model(), keep="disk")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fastlora.unmerge(3)
    with pytest.raises(ValueError, match="model has no LoRA layer"):
        fastlora.merge(nn.Linear(2, 2))
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight must be frozen to be merged"):
        layer.merge()


def test_the_page_about_layers_runs():
    page = Path(__file__).parents[1].joinpath("docs", "layers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    scope = {"__name__": "page"}
    exec("\n".join(blocks), scope)
    assert scope["model"].qkv.merged


@pytest.mark.parametrize(
    "again", [lambda model: model[0].merge(), fastlora.merge], ids=["layer", "model"]
)
def test_merging_anew_before_the_backward_of_a_forward_is_noticed(again):
    model = make_model(n=1)
    fastlora.merge(model)
    y = model(torch.randn(3, 16, requires_grad=True))
    nn.init.normal_(model[0].lora_B)
    again(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_training_lora_B_alone_while_merged_is_refused():
    layer = make().train()
    layer.lora_A.requires_grad_(False)
    layer.merge()
    with pytest.raises(RuntimeError, match="merged and in training mode"):
        layer(torch.randn(3, 40))


def test_a_weight_that_was_replaced_while_merged_is_not_taken_for_the_merged_one():
    """As FSDP does, which would go on to install its own: the adapter would count twice."""
    layer = make()
    layer.merge()
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    with pytest.raises(RuntimeError, match="was replaced while it was merged"):
        layer.unmerge()
    assert layer.merged
