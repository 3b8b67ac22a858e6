"""inject: which modules are replaced, what stays, the report and the errors."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn

from fastlora import LoRALinear, inject


class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width // 2)
        self.o_proj = nn.Linear(width // 2, width)

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x))[..., :4] * self.v_proj(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.my_q_proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(self.norm(self.my_q_proj(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().double()


def lora_names(model):
    return sorted(n for n, m in model.named_modules() if isinstance(m, LoRALinear))


def snapshot(model):
    modules = {n: id(m) for n, m in model.named_modules(remove_duplicate=False)}
    return modules, {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}


def randomise(model):
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B)


IDS = torch.tensor([[1, 2, 3, 10], [4, 5, 0, 7]])

MATCHES = [
    pytest.param(
        ("q_proj", "v_proj"),
        ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"],
        id="suffix-not-my_q_proj",
    ),
    pytest.param(["lm_head"], ["lm_head"], id="whole-name"),
    pytest.param({"layers.1.q_proj"}, ["layers.1.q_proj"], id="dotted"),
    pytest.param(("1.q_proj",), ["layers.1.q_proj"], id="dotted-suffix"),
    pytest.param(r"layers\.0\.[qk]_proj", ["layers.0.k_proj", "layers.0.q_proj"], id="regex"),
    pytest.param(
        r".*q_proj", ["layers.0.q_proj", "layers.1.q_proj", "my_q_proj"], id="regex-prefix"
    ),
]


@pytest.mark.parametrize(("targets", "expected"), MATCHES)
def test_matching_is_pefts(model, targets, expected):
    report = inject(model, targets, r=2, lora_alpha=4)
    assert lora_names(model) == expected
    assert sorted(report.replaced) == expected
    assert report.unmatched == ()
    assert report.skipped == ()


@pytest.mark.parametrize(("targets", "expected"), MATCHES)
def test_peft_matches_the_same(model, targets, expected):
    peft = pytest.importorskip("peft")
    targets = targets if isinstance(targets, str) else list(targets)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    names = [
        n
        for n, m in wrapped.base_model.model.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    ]
    assert sorted(names) == expected


def test_outputs_are_unchanged_and_settings_arrive(model):
    before = model(IDS)
    report = inject(
        model,
        r=3,
        lora_alpha=6,
        lora_dropout=0.25,
        use_rslora=True,
        init_lora_weights="gaussian",
        adapter_dtype=torch.float32,
    )
    torch.testing.assert_close(model(IDS), before)
    assert len(report.replaced) == 4
    for name in report.replaced:
        layer = model.get_submodule(name)
        assert (layer.r, layer.lora_dropout, layer.init_lora_weights) == (3, 0.25, "gaussian")
        assert layer.scaling == pytest.approx(6 / 3**0.5)
        assert layer.lora_A.dtype == torch.float32


def test_trained_adapters_change_outputs_by_the_formula(model):
    plain = copy.deepcopy(model)
    inject(model, r=2, lora_alpha=4)
    randomise(model)
    with torch.no_grad():
        for name in lora_names(model):
            layer = model.get_submodule(name)
            plain.get_submodule(name).weight += layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(model(IDS), plain(IDS))


def test_only_lora_parameters_are_trainable_and_counted(model):
    report = inject(model, r=2, lora_alpha=4)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{m}.{part}" for m in report.replaced for part in ("lora_A", "lora_B")}
    assert report.trainable_parameters == 2 * (2 * (8 + 8) + 2 * (8 + 4))
    assert report.total_parameters == sum(p.numel() for p in model.parameters())
    weight = model.layers[0].k_proj.weight.detach().clone()
    a = model.layers[0].q_proj.lora_A.detach().clone()
    randomise(model)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(IDS).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.layers[0].k_proj.weight, weight)
    assert not torch.equal(model.layers[0].q_proj.lora_A, a)


def test_tied_weight_stays_tied(model):
    inject(model, ("lm_head",), r=2, lora_alpha=4)
    assert model.lm_head.weight is model.embed.weight


def test_report_reads_well(model):
    report = inject(model, ("q_proj", "embed", "nothing"), r=2, lora_alpha=4)
    assert report.skipped == (
        ("embed", "it is a Embedding, and only torch.nn.Linear is supported"),
    )
    assert report.unmatched == ("nothing",)
    assert str(report).splitlines() == [
        "replaced 2 linears: q_proj (2)",
        f"trainable parameters: 64 of {report.total_parameters:,} "
        f"({6400 / report.total_parameters:.3g} %)",
        "skipped embed: it is a Embedding, and only torch.nn.Linear is supported",
        "targets that named no module: nothing",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.replaced = ()


def test_second_injection_keeps_the_first(model):
    inject(model, ("q_proj",), r=2, lora_alpha=4)
    first = model.layers[0].q_proj
    report = inject(model, ("q_proj", "k_proj"), r=3, lora_alpha=4)
    assert model.layers[0].q_proj is first
    assert first.lora_A.requires_grad
    assert report.replaced == ("layers.0.k_proj", "layers.1.k_proj")
    assert report.skipped[0] == ("layers.0.q_proj", "it is a LoRALinear already")


def test_module_in_two_places_gets_one_adapter():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    report = inject(model, ("a", "b"), r=2, lora_alpha=4)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], LoRALinear)
    assert type(model["c"]) is nn.Linear
    assert report.replaced == ("a", "b")
    assert report.trainable_parameters == 16


def test_block_in_two_places_is_reported_under_both_names():
    block = Attention()
    model = nn.ModuleList([block, block])
    report = inject(model, ("0.q_proj",), r=2, lora_alpha=4)
    assert report.replaced == ("0.q_proj", "1.q_proj")
    assert model[1].q_proj is model[0].q_proj


class OddLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Conv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))


def with_hook(register="register_forward_hook"):
    layer = nn.Linear(4, 4)
    getattr(layer, register)(lambda *_: None)
    return layer


def with_int_weight():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda: OddLinear(4, 4), "OddLinear, a subclass", id="subclass"),
        pytest.param(Conv1D, "Conv1D, and only", id="conv1d"),
        pytest.param(with_hook, "hooks", id="hook"),
        *(
            pytest.param(functools.partial(with_hook, f"register_{kind}_hook"), "hooks", id=kind)
            for kind in ("forward_pre", "full_backward", "full_backward_pre")
        ),
        pytest.param(with_int_weight, "torch.int8", id="int8"),
        pytest.param(
            lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "Parametrized",
            id="weight-norm",
        ),
    ],
)
def test_odd_layers_are_left_alone_and_named(make, reason):
    model = nn.ModuleDict({"odd": make(), "fine": nn.Linear(4, 4)})
    odd = model["odd"]
    report = inject(model, ("odd", "fine"), r=2, lora_alpha=4)
    assert model["odd"] is odd
    assert report.replaced == ("fine",)
    [(name, got)] = report.skipped
    assert name == "odd"
    assert reason in got


def test_transformer_encoder_layer_is_left_alone():
    # In eval mode torch hands linear1.weight to one fused call, so an adapter would do nothing.
    model = nn.ModuleDict({"enc": nn.TransformerEncoderLayer(8, 2, 16), "out": nn.Linear(8, 8)})
    report = inject(model, ("linear1", "out_proj", "out"), r=2, lora_alpha=4)
    assert report.replaced == ("out",)
    assert {name for name, _ in report.skipped} == {"enc.linear1", "enc.self_attn.out_proj"}


def test_peft_wrapped_model_is_not_wrapped_again(model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    report = inject(wrapped, ("q_proj", "k_proj"), r=2, lora_alpha=4)
    assert {name.rpartition(".")[2] for name in report.replaced} == {"k_proj"}
    assert all("wrapped already" in reason for _, reason in report.skipped)


def test_no_match_lists_what_could(model):
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Linears that could match: q_proj \(2\), k_proj \(2\)"):
        inject(model, ("query", "value"), r=2, lora_alpha=4)
    with pytest.raises(ValueError, match=r"my_q_proj, lm_head.*must match the whole name"):
        inject(model, "q_proj", r=2, lora_alpha=4)
    with pytest.raises(ValueError, match="embed: it is a Embedding"):
        inject(model, ("embed",), r=2, lora_alpha=4)
    with pytest.raises(ValueError, match=r"the model has no torch.nn.Linear"):
        inject(nn.Sequential(nn.ReLU()), r=2, lora_alpha=4)
    with pytest.raises(ValueError, match=r"LoRALinear\(model"):
        inject(nn.Linear(4, 4), r=2, lora_alpha=4)
    assert snapshot(model) == before


BAD = [
    pytest.param({"target_modules": 3}, TypeError, "target_modules.*int", id="targets-int"),
    pytest.param({"target_modules": ("q", 3)}, TypeError, "target_modules.*3", id="target-int"),
    pytest.param({"target_modules": ()}, ValueError, "target_modules", id="targets-empty"),
    pytest.param({"target_modules": ("",)}, ValueError, "target_modules", id="target-empty"),
    pytest.param({"target_modules": ""}, ValueError, "target_modules", id="regex-empty"),
    pytest.param({"target_modules": "(q"}, ValueError, "regular expression", id="regex-bad"),
    pytest.param({"r": 0}, ValueError, "r must be", id="r"),
    pytest.param({"lora_alpha": -1}, ValueError, "lora_alpha", id="alpha"),
    pytest.param({"lora_dropout": 2}, ValueError, "lora_dropout", id="dropout"),
    pytest.param({"init_lora_weights": "zero"}, ValueError, "init_lora_weights", id="init"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_leave_the_model_alone(model, change, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, **{"r": 2, "lora_alpha": 4, **change})
    assert snapshot(model) == before


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        inject({}, r=2, lora_alpha=4)


def test_failure_on_the_way_leaves_the_model_alone(model, monkeypatch):
    before = snapshot(model)
    monkeypatch.setattr(nn.init, "zeros_", _third_call_fails(nn.init.zeros_))
    with pytest.raises(RuntimeError, match="out of memory"):
        inject(model, r=2, lora_alpha=4)
    assert snapshot(model) == before


def _third_call_fails(function):
    calls = []

    def wrapped(tensor):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return function(tensor)

    return wrapped


def test_parametrized_adapters_of_before_stay_trainable():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    inject(model, ("a",), r=2, lora_alpha=2)
    nn.utils.parametrize.register_parametrization(model["a"], "lora_A", nn.Identity())
    inject(model, ("b",), r=2, lora_alpha=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "a.parametrizations.lora_A.original", "a.lora_B", "b.lora_A", "b.lora_B",
    }  # fmt: skip
