"""Adapter files: round trips, exchange with PEFT both ways, and refusals that change nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora import LoRALinear, inject, load_adapter, merge, save_adapter, unmerge

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
X = torch.linspace(-2, 2, 48, dtype=torch.float64).reshape(6, 8).sin()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.k_proj = nn.Linear(8, 8, bias=False)
        self.v_proj = nn.Linear(8, 12)
        self.out = nn.Linear(12, 8)

    def forward(self, x):
        return self.out(self.v_proj(torch.tanh(self.q_proj(x)) + self.k_proj(x)))


def base_model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Tanh(), Block(), nn.Linear(8, 8)).double()


def randomise(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def injected(targets=("q_proj", "v_proj"), seed=1, r=3, lora_alpha=5, **options):
    model = base_model()
    inject(model, targets, r=r, lora_alpha=lora_alpha, **options)
    return randomise(model, seed).eval()


def mixed():
    """Layers of several ranks, alphas and kinds of scaling."""
    model = injected(("q_proj",))
    inject(model, ("0.v_proj",), r=5, lora_alpha=20)
    inject(model, ("2.v_proj",), r=4, lora_alpha=6, use_rslora=True)
    inject(model, ("3",), r=3, lora_alpha=7)
    return randomise(model).eval()


def adapter_values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MODELS = [
    pytest.param(injected, id="plain"),
    pytest.param(lambda: injected(use_rslora=True), id="rslora"),
    pytest.param(lambda: injected(("0.q_proj", "3")), id="full-names"),
    pytest.param(mixed, id="mixed"),
]


@pytest.mark.parametrize("make", MODELS)
def test_round_trip(make, tmp_path):
    model = make()
    save_adapter(model, tmp_path / "new" / "folder")
    twin = randomise(copy.deepcopy(model), seed=2)
    assert not torch.allclose(twin(X), model(X))
    load_adapter(twin, tmp_path / "new" / "folder")
    torch.testing.assert_close(twin(X), model(X), rtol=1e-6, atol=1e-6)
    for name, value in adapter_values(model).items():
        assert torch.equal(adapter_values(twin)[name], value), name
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("make", MODELS)
def test_peft_loads_our_file(make, tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path).eval()
    layers = {
        n
        for n, m in loaded.base_model.model.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
    assert layers == {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    torch.testing.assert_close(loaded(X), model(X))
    assert not torch.allclose(loaded(X), base_model()(X))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param({"init_lora_weights": "gaussian", "lora_dropout": 0.1}, id="gaussian"),
        pytest.param({"target_modules": r".*\.(q|v)_proj"}, id="regex"),
    ],
)
def test_we_load_pefts_file(options, tmp_path):
    peft = pytest.importorskip("peft")
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **options}
    theirs = randomise(peft.get_peft_model(base_model(), peft.LoraConfig(**settings))).eval()
    theirs.save_pretrained(tmp_path)
    ours = injected(seed=3, use_rslora=settings.get("use_rslora", False))
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(X), theirs(X))


def test_we_load_pefts_patterns(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"0.v_proj": 6, "q_proj": 2},
        alpha_pattern={"v_proj": 9},
    )
    theirs = randomise(peft.get_peft_model(base_model(), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = base_model()
    inject(ours, ("q_proj",), r=2, lora_alpha=5)
    inject(ours, ("0.v_proj",), r=6, lora_alpha=9)
    inject(ours, ("2.v_proj",), r=3, lora_alpha=9)
    load_adapter(ours.eval(), tmp_path)
    torch.testing.assert_close(ours(X), theirs(X))


def test_file_contents(tmp_path):
    model = injected(lora_dropout=0.25)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    expected = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "lora_dropout": 0.25, "bias": "none"}
    assert expected.items() <= config.items()
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / WEIGHTS)
    assert set(tensors) == {
        f"base_model.model.{i}.{part}_proj.lora_{ab}.weight"
        for i in (0, 2)
        for part in "qv"
        for ab in "AB"
    }
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without
    key = "base_model.model.2.v_proj.lora_B.weight"
    assert torch.equal(tensors[key], model[2].v_proj.lora_B)


def test_mixed_file_lists_only_the_exceptions(tmp_path):
    save_adapter(mixed(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 5, False)
    assert config["rank_pattern"] == {r"^0\.v_proj": 5, r"^2\.v_proj": 4}
    # 6 / sqrt(4) = 12 / 4: the one rsLoRA layer is written with the plain alpha that equals it.
    assert config["alpha_pattern"] == {r"^0\.v_proj": 20, r"^2\.v_proj": 12.0, "^3": 7}


def test_names_that_end_alike_are_told_apart(tmp_path):
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(0)
        # "0" is also the end of "1.0", so neither names nor their ends single it out.
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))).double()

    model = make()
    inject(model, r"0", r=2, lora_alpha=3)
    save_adapter(randomise(model), tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert "1.0.weight" in loaded.base_model.model.state_dict()
    torch.testing.assert_close(loaded(X), model(X))


def test_changed_scaling_is_saved(tmp_path):
    peft = pytest.importorskip("peft")
    model = injected()
    model[0].q_proj.scaling = 0.125
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path).eval()
    torch.testing.assert_close(loaded(X), model(X))
    with pytest.raises(ValueError, match=r"0\.q_proj has scaling 1\.66667.*with 0\.125"):
        load_adapter(injected(), tmp_path)
    save_adapter(injected(), tmp_path)
    with pytest.raises(ValueError, match=r"has scaling 1\.668.*with 1\.66667"):
        load_adapter(injected(lora_alpha=5.004), tmp_path)


def test_changed_scaling_of_rslora_is_saved(tmp_path):
    model, other = injected(use_rslora=True), injected(use_rslora=True, seed=2)
    for each in (model, other):
        each[0].q_proj.scaling = 0.125
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)  # which compares the scalings
    torch.testing.assert_close(other(X), model(X))


def test_dtypes_are_kept_in_the_file_and_cast_on_load(tmp_path):
    model = injected(adapter_dtype=torch.bfloat16)
    save_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    wide = injected(seed=2, adapter_dtype=torch.float32)
    load_adapter(wide, tmp_path)
    for name, value in adapter_values(model).items():
        got = adapter_values(wide)[name]
        assert got.dtype == torch.float32
        assert torch.equal(got, value.float())


def test_shared_module_is_saved_once_with_a_warning(tmp_path):
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    inject(model, ("a", "b"), r=2, lora_alpha=3)
    randomise(model)
    with pytest.warns(UserWarning, match="b share"):
        save_adapter(model, tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == 2
    before = adapter_values(model)
    load_adapter(randomise(model, seed=2), tmp_path)
    assert all(torch.equal(v, before[n]) for n, v in adapter_values(model).items())


def test_layers_that_share_a_parameter_are_saved_each(tmp_path):
    model = injected()
    model[2].q_proj.lora_A = model[0].q_proj.lora_A
    save_adapter(model, tmp_path)
    other = injected(seed=2)
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(X), model(X))


def test_a_failed_write_leaves_the_files_as_they_were(monkeypatch, tmp_path):
    save_adapter(injected(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def breaks_off(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("fastlora.adapter_io.save_file", breaks_off)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(injected(seed=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_differing_dropout_is_warned_about(tmp_path):
    model = injected(("q_proj",), lora_dropout=0.1)
    inject(model, ("3",), r=3, lora_alpha=5)
    with pytest.warns(UserWarning, match="lora_dropout"):
        save_adapter(model, tmp_path)


def test_compiled_model_is_saved_under_plain_names(tmp_path):
    model = injected()
    save_adapter(torch.compile(model, backend="eager"), tmp_path)
    load_adapter(injected(seed=2), tmp_path)


def rename(tensors):
    tensors["base_model.model.9.q_proj.lora_A.weight"] = torch.ones(3, 8)


def drop(tensors):
    del tensors["base_model.model.2.v_proj.lora_B.weight"]


def reshape(tensors):
    tensors["base_model.model.2.v_proj.lora_B.weight"] = torch.ones(12, 4)


def to_int(tensors):
    tensors["base_model.model.2.v_proj.lora_B.weight"] = torch.ones(12, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(rename, r"no LoRA layer.*model\.9\.q_proj\.lora_A\.weight$", id="surplus"),
        pytest.param(drop, r"lacks.*model\.2\.v_proj\.lora_B\.weight$", id="missing"),
        pytest.param(
            reshape, r"2\.v_proj\.lora_B\.weight must be \(12, 3\), got \(12, 4\)", id="shape"
        ),
        pytest.param(to_int, r"2\.v_proj\.lora_B\.weight.*got torch\.int32", id="dtype"),
    ],
)
def test_bad_tensors_are_named_and_nothing_is_loaded(change, message, tmp_path):
    save_adapter(injected(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    model = injected(seed=2)
    before = adapter_values(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert all(torch.equal(v, before[n]) for n, v in adapter_values(model).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'", id="type"),
        pytest.param({"use_dora": True}, "use_dora=True", id="dora"),
        pytest.param({"modules_to_save": ["head"]}, "modules_to_save", id="modules-to-save"),
        pytest.param({"bias": "all"}, "bias must be 'none', got 'all'", id="bias"),
        pytest.param({"init_lora_weights": "pissa"}, "'pissa' changes the base", id="pissa"),
        pytest.param({"lora_alpha": 50}, r"0\.q_proj has scaling 1\.66667.*16\.6667", id="alpha"),
        pytest.param({"use_rslora": True}, "use_rslora=True", id="rslora"),
        pytest.param({"alpha_pattern": {"(": 2}}, r"bad pattern '\('", id="pattern"),
        pytest.param({"alpha_pattern": [1]}, "alpha_pattern must be", id="pattern-list"),
        pytest.param({"lora_alpha": "5"}, "lora_alpha of .* got '5'", id="alpha-str"),
    ],
)
def test_unfit_configs_are_refused_and_nothing_is_loaded(changes, message, tmp_path):
    save_adapter(injected(), tmp_path)
    edit_config(tmp_path, **changes)
    model = injected(seed=2)
    before = adapter_values(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert all(torch.equal(v, before[n]) for n, v in adapter_values(model).items())


def test_unreadable_files_are_named(tmp_path):
    model = injected()
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_adapter(model, tmp_path)
    save_adapter(model, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_adapter(model, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="only safetensors"):
        load_adapter(model, tmp_path)
    for text, message in (("{", "no readable JSON"), ("[]", "JSON object, got list")):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)


@pytest.mark.parametrize("function", [save_adapter, load_adapter])
def test_models_without_adapters_are_refused(function, tmp_path):
    with pytest.raises(ValueError, match="no LoRALinear"):
        function(base_model(), tmp_path)
    with pytest.raises(ValueError, match="itself a LoRALinear"):
        function(LoRALinear(nn.Linear(4, 4), 2, 4), tmp_path)
    with pytest.raises(TypeError, match="got str"):
        function("model", tmp_path)
    assert not list(tmp_path.iterdir())


def test_meta_layers_are_refused(tmp_path):
    save_adapter(injected(), tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        save_adapter(injected().to("meta"), tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        load_adapter(injected().to("meta"), tmp_path)


def test_the_frozen_head_that_peft_saves_is_checked_and_left_alone(tmp_path):
    peft = pytest.importorskip("peft")
    from peft_cases import llama as base

    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    plain = base()
    trained = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    trained.save_pretrained(tmp_path)
    model = plain
    inject(model, ("q_proj", "lm_head"), r=4, lora_alpha=8)
    load_adapter(model, tmp_path)
    ids = torch.tensor([[1, 5, 7]])
    torch.testing.assert_close(model.eval()(ids).logits, trained(ids).logits)
    load_adapter(copy.deepcopy(model).bfloat16(), tmp_path)  # rounded, it is the same head
    merge(model)  # the frozen values count, not the merged ones
    load_adapter(model, tmp_path)
    unmerge(model)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight differs from the model's"):
        load_adapter(model, tmp_path)
