"""Many layers merged by one launch: each bit as a launch for each layer gives it, whatever they share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora import (
    LoRAConv1d,
    LoRAEmbedding,
    LoRALinear,
    LoRAMergedLinear,
    merge_products,
    reference,
)
from fastlora.merge_products import Product, write, write_all

pytest.importorskip("triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(BF16, BF16, BF16), (FP16, FP32, FP32), (FP32, FP32, FP32), (BF16, FP32, BF16)]


def bits(t):
    return t.detach().clone().contiguous().view(torch.uint8)


def draw(rows, columns, dtype, device, turned=False, inside=False):
    """Random, its columns dense if ``turned``, in the middle of something larger if ``inside``."""
    if turned:
        return draw(columns, rows, dtype, device, inside=inside).t()
    if inside:
        return torch.randn(rows + 16, columns + 16, device=device).to(dtype)[8:-8, 8:-8]
    return torch.randn(rows, columns, device=device).to(dtype)


def product(n, k, r, dtypes, device, turned=False, inside=False, out=None):
    dtype, *adapter = dtypes
    weight = draw(n, k, dtype, device, turned, inside)
    a, b = draw(r, k, adapter[0], device, turned), draw(n, r, adapter[1], device, turned)
    if out is None:
        out = torch.full((n, k), torch.nan, dtype=dtype, device=device)
    return Product(weight, out, a, b, float(torch.randn(())))


def elsewhere(products):
    """The same products, each with an ``out`` of its own that holds NaN."""
    return [p._replace(out=torch.full_like(p.out, torch.nan)) for p in products]


@pytest.fixture
def launches(monkeypatch):
    """How many products each launch took, by the table or by itself."""

    class Everything(set):
        def __contains__(self, key):
            return True

    monkeypatch.setattr(merge_products, "_compiled_for", Everything())
    found = {"many": [], "one": 0}
    many, one = merge_products.lora_merge_many, merge_products.lora_merge

    def spy_many(groups):
        found["many"] += map(len, groups)
        many(groups)

    def spy_one(*args):
        found["one"] += 1
        return one(*args)

    monkeypatch.setattr(merge_products, "lora_merge_many", spy_many)
    monkeypatch.setattr(merge_products, "lora_merge", spy_one)
    return found


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("turned", "inside"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("n", "k", "r"), [(24, 40, 4), (1, 1, 1), (67, 130, 3), (72, 136, 72)])
def test_kernel_gives_the_bits_of_a_launch_a_layer(n, k, r, turned, inside, dtypes, device):
    from fastlora.kernels.lora_merge import lora_merge
    from fastlora.kernels.lora_merge_many import lora_merge_many

    groups = [
        [product(n, k, r, dtypes, device, turned, inside) for _ in range(count)] for count in (3, 1)
    ]
    in_place = [product(n, k, r, dtypes, device, turned) for _ in range(2)]
    groups.append([p._replace(out=p.part) for p in in_place])
    expected = []
    for p in [p for group in groups for p in group]:
        out = torch.full((n, k), torch.nan, dtype=dtypes[0], device=device)
        expected.append(lora_merge(p.part, p.lora_A, p.lora_B, p.scaling, out))
        truth = p.part.double() + p.scaling * (p.lora_B.double() @ p.lora_A.double())
        # The interpreter truncates bf16.
        unit = torch.finfo(out.dtype).eps * (1 if out.dtype == BF16 else 0.5)
        limit = unit * truth.abs() + abs(p.scaling) * (r + 4) * 2.0**-18
        assert ((out.double() - truth).abs() <= limit).all()
    lora_merge_many(groups)
    got = [p.out for group in groups for p in group]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, expected, strict=True))


def test_many_shapes_and_kinds_in_one_call(device, launches):
    shapes = {(24, 40): 5, (40, 24): 4, (24, 48): 3}
    products = [
        product(n, k, 4, dtypes, device)
        for dtypes in DTYPES[:3]
        for (n, k), count in shapes.items()
        for _ in range(count)
    ]
    products += [product(24, 40, 8, DTYPES[0], device) for _ in range(6)]  # another rank
    products += [product(24, 40, 4, DTYPES[0], device, turned=True) for _ in range(4)]
    by_table = [5, 4] * 3 + [6, 4]
    products += [product(16, 16, 4, (torch.float64,) * 3, device) for _ in range(4)]  # eager
    nothing = product(24, 40, 4, DTYPES[0], device)._replace(lora_A=None, lora_B=None)
    products += elsewhere([nothing] * 5)
    flat = torch.randn(5 * 24 * 40 + 1, device=device).to(BF16)
    unaligned = [flat[1 + i * 960 :][:960].view(24, 40) for i in range(5)]
    products += [product(24, 40, 4, DTYPES[0], device)._replace(part=w) for w in unaligned]
    products = [products[i] for i in torch.randperm(len(products))]
    expected = elsewhere(products)
    for p in expected:
        write(p)
    launches["one"] = 0
    write_all(products)
    assert all(
        torch.equal(bits(p.out), bits(e.out)) for p, e in zip(products, expected, strict=True)
    )
    assert sorted(launches["many"]) == sorted(by_table)
    assert launches["one"] == 3 * 3 + len(unaligned)


@pytest.mark.parametrize(
    "kind", ["same out", "part of out", "out is read", "out is A", "in place and read"]
)
def test_order_is_kept_where_memory_is_shared(kind, device, launches):
    made = [product(24, 24, 24, DTYPES[0], device) for _ in range(8)]
    if kind == "same out":
        made[6] = made[6]._replace(out=made[2].out)
    elif kind == "part of out":
        flat = torch.full((25 * 24,), torch.nan, dtype=BF16, device=device)
        made[1] = made[1]._replace(out=flat[:576].view(24, 24))
        made[5] = made[5]._replace(out=flat[8:584].view(24, 24))
    elif kind == "out is read":
        made[5] = made[5]._replace(part=made[3].out)
    elif kind == "out is A":
        made[5] = made[5]._replace(lora_A=made[3].out)
    else:
        made[2] = made[2]._replace(out=made[2].part)
        made[4] = made[4]._replace(part=made[2].part)
    expected = copy.deepcopy(made)
    for p in expected:
        write(p)
    write_all(made)
    assert launches["many"] == []
    assert all(torch.equal(bits(p.out), bits(e.out)) for p, e in zip(made, expected, strict=True))


def test_what_is_only_read_may_be_shared(device, launches):
    first = product(24, 40, 4, DTYPES[0], device)
    products = elsewhere([first._replace(scaling=i / 7) for i in range(6)])
    expected = elsewhere(products)
    for p in expected:
        write(p)
    write_all(products)
    assert launches["many"] == [6]
    assert all(
        torch.equal(bits(p.out), bits(e.out)) for p, e in zip(products, expected, strict=True)
    )


def test_neighbours_in_one_buffer_are_not_shared(device, launches):
    buffer = torch.full((6, 24, 40), torch.nan, dtype=BF16, device=device)
    products = [product(24, 40, 4, DTYPES[0], device, out=out) for out in buffer]
    write_all(products)
    assert launches["many"] == [6]
    assert torch.isfinite(buffer).all()


def test_the_first_time_both_kernels_are_launched(device, launches, monkeypatch):
    monkeypatch.setattr(merge_products, "_compiled_for", set())
    for expected in ([5], [5, 6]):
        products = [product(24, 40, 4, DTYPES[0], device) for _ in range(6)]
        write_all(products)
        assert launches == {"many": expected, "one": 1}
        assert all(torch.isfinite(p.out).all() for p in products)


def test_meta_tensors_and_few_products_take_no_table(device, launches):
    write_all([product(24, 40, 4, DTYPES[0], "meta") for _ in range(6)])
    write_all([product(24, 40, 4, DTYPES[0], device) for _ in range(3)])
    assert launches == {"many": [], "one": 3}
    with fastlora.dispatch.force("eager"):
        products = [product(24, 40, 4, DTYPES[0], device) for _ in range(6)]
        write_all(products)
    assert launches == {"many": [], "one": 3}
    for p in products:
        twin = reference.lora_merge(p.part, p.lora_A, p.lora_B, p.scaling, torch.empty_like(p.out))
        assert torch.equal(p.out, twin)


def model_of_many_kinds():
    base = nn.Linear(16, 24, dtype=BF16)
    layers = [LoRALinear(nn.Linear(16, 24, dtype=BF16), 4, 8 + i % 3) for i in range(9)]
    layers += [LoRALinear(base, 4, 8), LoRALinear(base, 4, 6)]
    layers += [LoRALinear(nn.Linear(16, 24), 4, 8) for _ in range(5)]
    layers += [LoRALinear(nn.Linear(16, 24, dtype=torch.float64), 4, 8) for _ in range(2)]
    layers.append(LoRAConv1d(nn.Conv1d(4, 8, 3), 2, 4))
    layers += [LoRAEmbedding(nn.Embedding(24, 16, dtype=BF16), 4, 8) for _ in range(4)]
    layers += [
        LoRAMergedLinear(16, 48, 4, 8, enable_lora=(True, False, True), dtype=BF16)
        for _ in range(3)
    ]
    model = nn.ModuleList([layers[i] for i in torch.randperm(len(layers))]).eval()
    for layer in model:
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return model


def weights(model):
    return [bits(layer._weight_holder().weight) for layer in model]


def new_task(model):
    return {n: torch.randn_like(p) for n, p in model.named_parameters() if "lora_" in n}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("keep", ["device", "host"])
def test_a_model_of_many_kinds(keep, device, launches):
    model = model_of_many_kinds().to(device)
    if keep == "host":  # where no two layers may share a weight
        unique = {layer._weight_holder().weight: layer for layer in model}
        model = nn.ModuleList(unique.values()).eval()
    frozen = weights(model)
    alone = copy.deepcopy(model)
    for layer in alone:
        layer._merge(False, keep == "host")
    launches["many"].clear()
    fastlora.merge(model, keep=keep)
    assert bool(launches["many"]) == (keep == "device")
    assert same(weights(model), weights(alone))
    assert not same(weights(model), frozen)
    task = new_task(model)
    launches["many"].clear()
    fastlora.switch_adapter(model, task)
    assert bool(launches["many"]) == (keep == "device")
    for name, value in task.items():
        alone.get_parameter(name).data.copy_(value)
    for layer in alone:
        layer.merge()
    assert same(weights(model), weights(alone))
    fastlora.merge(model)  # anew, from the frozen weights
    assert same(weights(model), weights(alone))
    fastlora.unmerge(model)
    assert same(weights(model), frozen)


def linears(count, seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleList([nn.Linear(16, 24, bias=False, dtype=BF16) for _ in range(count)])
    fastlora.inject(model, [str(i) for i in range(count)], r=4, lora_alpha=8)
    for layer in model:
        nn.init.normal_(layer.lora_B)
    return model.eval()


def test_merged_weights_that_are_tied_are_merged_in_their_order(device, launches):
    model = linears(8).to(device)
    fastlora.merge(model)
    model[2].weight = model[6].weight
    expected = copy.deepcopy(model)
    launches["many"].clear()
    fastlora.merge(model)
    assert launches["many"] == []
    for layer in expected:
        layer.merge()
    assert same(weights(model), weights(expected))


def test_merging_many_anew_before_the_backward_of_a_forward_is_noticed(device, launches):
    model = linears(8).to(device)
    fastlora.merge(model)
    y = model[0](torch.randn(3, 16, dtype=BF16, device=device, requires_grad=True))
    launches["many"].clear()
    fastlora.merge(model)
    assert launches["many"] == [8]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("at", [1, 2])
def test_a_failed_launch_of_many_rolls_back(at, device, monkeypatch):
    monkeypatch.setattr(fastlora.switching, "_FIRST", 4)
    model = linears(12).to(device)
    fastlora.merge(model)
    before = {n: bits(p) for n, p in model.named_parameters()}
    many, calls = merge_products.lora_merge_many, []

    def fail(groups):
        calls.append(groups)
        many(groups)
        if len(calls) == at:
            raise MemoryError

    monkeypatch.setattr(merge_products, "lora_merge_many", fail)
    task = new_task(model)
    with pytest.raises(MemoryError):
        fastlora.switch_adapter(model, task)
    after = dict(model.named_parameters())
    assert all(torch.equal(bits(after[n]), b) for n, b in before.items())
    assert all(layer.merged for layer in model)


def test_a_failed_launch_of_many_leaves_all_unmerged(device, monkeypatch):
    def fail(groups):
        raise MemoryError

    monkeypatch.setattr(merge_products, "lora_merge_many", fail)
    model = linears(6).to(device)
    before = weights(model)
    with pytest.raises(MemoryError):
        fastlora.merge(model)
    assert not any(layer.merged for layer in model)
    assert same(weights(model), before)


def test_a_trainable_weight_among_many_leaves_all_unmerged(device):
    model = linears(6).to(device)
    model[4].weight.requires_grad_(True)
    before = weights(model)
    with pytest.raises(ValueError, match="weight must be frozen to be merged"):
        fastlora.merge(model)
    assert not any(layer.merged for layer in model)
    assert same(weights(model), before)


def test_switches_by_the_table_end_where_they_began(device, launches):
    model = linears(5).to(device)
    frozen = weights(model)
    fastlora.merge(model)
    tasks = [new_task(model) for _ in range(2)]
    expected = []
    for task in tasks:
        fastlora.switch_adapter(model, task)
        expected.append(weights(model))
    launches["many"].clear()
    rounds = 1000 if device == "cuda" else 100
    for i in range(rounds):
        fastlora.switch_adapter(model, tasks[i % 2])
        assert same(weights(model), expected[i % 2])
    assert launches["many"] == [5] * rounds
    fastlora.unmerge(model)
    assert same(weights(model), frozen)


@pytest.mark.gpu
def test_a_captured_switch_takes_no_table(launches, monkeypatch):
    monkeypatch.setattr(merge_products, "_compiled_for", set())
    model = linears(9).cuda()
    fastlora.merge(model)
    task = new_task(model)
    fastlora.switch_adapter(model, task)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fastlora.switch_adapter(model, task)
    torch.cuda.synchronize()
    launches["many"].clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastlora.switch_adapter(model, task)
    assert launches["many"] == []
    for value in task.values():
        value.normal_()
    graph.replay()
    replayed = weights(model)
    fastlora.switch_adapter(model, task)
    assert launches["many"] == [9]
    assert same(replayed, weights(model))


@pytest.mark.gpu
def test_switches_in_a_row_read_tables_of_their_own():
    """The GPU is behind: a table must not be overwritten before it is read."""
    model = linears(64).cuda()
    fastlora.merge(model)
    tasks = [new_task(model) for _ in range(3)]
    expected = []
    for task in tasks:
        fastlora.switch_adapter(model, task)
        expected.append(weights(model))
    for last in range(3):
        torch.cuda._sleep(200_000_000)
        for i in range(20):
            fastlora.switch_adapter(model, tasks[(last + i) % 3])
        assert same(weights(model), expected[(last + 19) % 3])
