"""switch_adapter: what a fresh model would compute, bit for bit, or nothing changed at all."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import switch_adapter

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


class Model(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(16, 24, dtype=dtype)
        self.down = nn.Linear(24, 16, dtype=dtype)

    def forward(self, x):
        return self.down(self.up(x).relu())


def fresh(seed=None, r=4, alpha=8, **options):
    model = Model(**{k: options.pop(k) for k in ("dtype",) if k in options})
    fastlora.inject(model, ("up", "down"), r=r, lora_alpha=alpha, **options)
    if seed is not None:
        torch.manual_seed(seed)
        for layer in (model.up, model.down):
            nn.init.normal_(layer.lora_A)
            nn.init.normal_(layer.lora_B)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters: two of the model's own rank, one of another rank, alpha and scaling rule."""
    made = []
    for seed, options in ((1, {}), (2, {}), (3, {"r": 7, "alpha": 3, "use_rslora": True})):
        made.append(tmp_path_factory.mktemp("adapter"))
        fastlora.save_adapter(fresh(seed, **options), made[-1])
    return made


def snapshot(model):
    values = {name: t.detach().clone() for name, t in model.named_parameters()}
    settings = [
        (m.r, m.lora_alpha, m.use_rslora, m.scaling, m.merged) for m in (model.up, model.down)
    ]
    return values, settings


def same(a, b):
    equal = a[0].keys() == b[0].keys() and all(
        torch.equal(t.view(torch.uint8), b[0][name].view(torch.uint8)) for name, t in a[0].items()
    )
    return equal and a[1] == b[1]


def prepare(model, state):
    if state != "unmerged":
        fastlora.merge(model, keep=state)
    return model


STATES = pytest.mark.parametrize("state", ["unmerged", "device", "host"])


@STATES
@pytest.mark.parametrize("which", [1, 2])
def test_equals_a_model_loaded_fresh(folders, state, which):
    options = {} if which < 2 else {"r": 7, "alpha": 3, "use_rslora": True}
    expected = prepare(fresh(**options), "unmerged")
    fastlora.load_adapter(expected, folders[which])
    if state != "unmerged":
        fastlora.merge(expected)
    model = prepare(fresh(5), state)
    for folder in (folders[0], folders[2], folders[which]):
        switch_adapter(model, folder)
    assert same(snapshot(model), snapshot(expected))
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("state", ["device", "host"])
def test_a_thousand_switches_leave_the_weights_bit_identical(folders, state):
    model = fresh(4)
    unmerged = snapshot(model)
    tasks = [{n: t for n, t in fresh(s).named_parameters() if "lora_" in n} for s in (1, 2)]
    prepare(model, state)
    with fastlora.dispatch.force("eager"):
        expected = []
        for task in tasks:
            switch_adapter(model, task)
            expected.append(snapshot(model))
        for i in range(1000):
            switch_adapter(model, tasks[i % 2])
            assert same(snapshot(model), expected[i % 2])
    fastlora.unmerge(model)
    after = snapshot(model)
    for name in ("up.weight", "down.weight"):
        assert torch.equal(after[0][name], unmerged[0][name])


def test_state_dicts_in_both_namings(folders):
    expected = fresh()
    fastlora.load_adapter(expected, folders[0])
    own = {n: t for n, t in expected.state_dict().items() if "lora_" in n}
    for adapter in (load_file(folders[0] / "adapter_model.safetensors"), own):
        model = fresh(9)
        switch_adapter(model, adapter)
        assert same(snapshot(model), snapshot(expected))
    config = json.loads((folders[2] / "adapter_config.json").read_text())
    model = fresh(9)
    switch_adapter(model, load_file(folders[2] / "adapter_model.safetensors"), config=config)
    assert model.up.r == 7
    assert model.up.scaling == pytest.approx(3 / 7**0.5)


def test_parameters_stay_where_the_rank_does(folders):
    model = fresh(9)
    before = model.up.lora_A
    switch_adapter(model, folders[0])
    assert model.up.lora_A is before
    switch_adapter(model, folders[2])
    assert model.up.lora_A is not before
    assert model.up.lora_A.requires_grad
    model.up.lora_A.requires_grad_(False)
    switch_adapter(model, folders[0])
    assert not model.up.lora_A.requires_grad
    assert model.up.lora_B.requires_grad


def test_own_tensors_and_dtype_casts():
    model = fresh(9, adapter_dtype=torch.float32)
    before = snapshot(model)
    switch_adapter(model, {n: t for n, t in model.named_parameters() if "lora_" in n})
    assert same(snapshot(model), before)
    own = dict(model.named_parameters())
    swapped = {"up.lora_A": own["up.lora_A"], "down.lora_B": own["down.lora_B"]}
    swapped |= {"up.lora_B": own["up.lora_B"].flip(0), "down.lora_A": own["up.lora_B"].t()}
    expected = {n: t.detach().clone() for n, t in swapped.items()}
    switch_adapter(model, swapped)
    assert all(torch.equal(model.get_parameter(n), t) for n, t in expected.items())
    task = {n: t.double() for n, t in fresh(3).named_parameters() if "lora_" in n}
    switch_adapter(model, task)
    assert model.up.lora_A.dtype == torch.float32
    assert torch.equal(model.up.lora_A.double(), task["up.lora_A"])


def test_load_adapter_merges_a_merged_model_anew(folders):
    model, expected = prepare(fresh(5), "device"), fresh()
    fastlora.load_adapter(model, folders[0])
    fastlora.load_adapter(expected, folders[0])
    fastlora.merge(expected)
    assert same(snapshot(model), snapshot(expected))


def task(change=None, seed=3):
    tensors = {n: t.detach() for n, t in fresh(seed).named_parameters() if "lora_" in n}
    if change is not None:
        change(tensors)
    return tensors


BAD = [
    pytest.param(
        lambda: task(lambda t: t.pop("up.lora_A")), {}, ValueError, "lacks.*up.lora_A", id="missing"
    ),
    pytest.param(
        lambda: task(lambda t: t.update({"up.bias": torch.zeros(24)})),
        {},
        ValueError,
        "no LoRA layer of the model takes: up.bias",
        id="surplus",
    ),
    pytest.param(
        lambda: task(lambda t: t.update({"down.lora_B": torch.zeros(16, 5)})),
        {},
        ValueError,
        r"down.lora_B must be \(16, 4\), got \(16, 5\)",
        id="shape",
    ),
    pytest.param(
        lambda: task(lambda t: t.update({"down.lora_B": torch.zeros(16, 4, dtype=torch.int8)})),
        {},
        ValueError,
        "down.lora_B must have a floating point dtype",
        id="dtype",
    ),
    pytest.param(
        lambda: task(lambda t: t.update({"down.lora_B": [1.0]})),
        {},
        ValueError,
        "down.lora_B must be a tensor, got list",
        id="no-tensor",
    ),
    pytest.param(
        task, {"config": {**CONFIG, "r": 3}}, ValueError, r"must be \(3, 16\), got", id="config-r"
    ),
    pytest.param(
        task,
        {"config": {k: v for k, v in CONFIG.items() if k != "r"}},
        ValueError,
        r"must be \(8, 16\), got",
        id="config-default-r",
    ),
    pytest.param(
        task, {"config": {**CONFIG, "r": 0}}, ValueError, "r of up must be an int", id="config-r0"
    ),
    pytest.param(
        task, {"config": {**CONFIG, "use_dora": True}}, ValueError, "use_dora=True", id="dora"
    ),
    pytest.param(task, {"config": 3}, TypeError, "config must be a mapping", id="config-type"),
    pytest.param(lambda: 3, {}, TypeError, "adapter must be a folder or a state dict", id="type"),
    pytest.param(lambda: "/nowhere", {}, FileNotFoundError, "adapter_config.json", id="folder"),
]


@STATES
@pytest.mark.parametrize(("adapter", "options", "error", "message"), BAD)
def test_a_bad_adapter_leaves_the_model_as_it_was(adapter, options, error, message, state):
    model = prepare(fresh(5), state)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        switch_adapter(model, adapter(), **options)
    assert same(snapshot(model), before)


@STATES
def test_safe_refuses_and_rolls_back_rank_changes_too(state, tmp_path):
    model = prepare(fresh(5), state)
    fastlora.save_adapter(fresh(3, r=2), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.down.lora_B.weight"].fill_(torch.inf)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    before, parameters = snapshot(model), list(model.parameters())
    with pytest.raises(ValueError, match="not finite"):
        switch_adapter(model, tmp_path, safe=True)
    assert same(snapshot(model), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("at_once", [1, 32])
@pytest.mark.parametrize("state", ["device", "host"])
def test_a_failure_while_merging_rolls_back(state, at_once, monkeypatch):
    monkeypatch.setattr(fastlora.switching, "_FIRST", at_once)
    model = prepare(fresh(5), state)
    before = snapshot(model)
    calls = []
    write = type(model.down)._write_merged

    def fail_once(self, source, target):
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        write(self, source, target)

    monkeypatch.setattr(type(model.down), "_write_merged", fail_once)
    with pytest.raises(MemoryError):
        switch_adapter(model, task())
    assert len(calls) == 4, "one layer was merged, and both were again"
    assert same(snapshot(model), before)


def test_a_failure_restores_a_parameter_that_layers_share(monkeypatch):
    monkeypatch.setattr(fastlora.switching, "_FIRST", 1)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))).eval()
    fastlora.inject(model, ("0", "1", "2"), r=2, lora_alpha=4)
    model[1].lora_A = model[2].lora_A = model[0].lora_A
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    fastlora.merge(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    write, calls = type(model[0])._write_merged, []

    def fail_at_the_last(self, source, target):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        write(self, source, target)

    monkeypatch.setattr(type(model[0]), "_write_merged", fail_at_the_last)
    new = {f"{i}.{part}": torch.randn(2, 8) if part == "lora_A" else torch.randn(8, 2)
           for i in range(3) for part in ("lora_A", "lora_B")}  # fmt: skip
    with pytest.raises(MemoryError):
        switch_adapter(model, new)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], p) for n, p in before.items())


def test_safe_asks_the_device_once(monkeypatch):
    model = prepare(fresh(5), "device")
    asked = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: pytest.fail("a sync for a layer"))
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: asked.append(t) or tolist(t))
    switch_adapter(model, task(), safe=True)
    assert [len(t) for t in asked] == [2]


def test_config_is_refused_beside_a_folder(folders):
    with pytest.raises(TypeError, match="config must be None for a folder"):
        switch_adapter(fresh(1), folders[0], config=CONFIG)


def test_peft_writes_and_fastlora_switches(tmp_path):
    peft = pytest.importorskip("peft")
    base = Model(torch.float32)
    model = fresh(5, dtype=torch.float32)
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["up", "down"], rank_pattern={"down": 2},
            alpha_pattern={"down": 5}, init_lora_weights=False,
        ),
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    switch_adapter(model, tmp_path)
    assert (model.up.scaling, model.down.scaling, model.down.r) == (1.5, 2.5, 2)
    x = torch.randn(5, 16)
    torch.testing.assert_close(model(x), theirs(x))
    fastlora.merge(model)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)
