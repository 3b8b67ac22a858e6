"""Adapters that nobody vouches for: right values, or an error that says what is wrong with what."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import struct
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

import fastlora
from fastlora import AdapterBank

LAYERS = {"block.q": (6, 8), "block.v": (4, 8)}
PREFIX = "base_model.model."
A, B = f"{PREFIX}block.q.lora_A.weight", f"{PREFIX}block.q.lora_B.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]}


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        f"{PREFIX}{name}.{part}.weight": torch.randn(shape, generator=generator)
        for name, (N, K) in LAYERS.items()
        for part, shape in (("lora_A", (2, K)), ("lora_B", (N, 2)))
    }


def write(folder, changed=None, config=None, dropped=()):
    folder.mkdir(exist_ok=True)
    kept = {k: v for k, v in (tensors() | (changed or {})).items() if k not in dropped}
    save_file(kept, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {})))
    return folder


def new_bank(**options):
    return AdapterBank(LAYERS, 2, 4, **options)


def refused(folder, error, message):
    """Adding fails with this message, and the bank with its one adapter is as it was."""
    bank = new_bank()
    bank.add("good", tensors(), config=CONFIG)
    slot = bank.load("good")
    before = [t.clone() for name in LAYERS for t in vars(bank.layer(name)).values()]
    stats = bank.stats()
    with pytest.raises(error, match=message):
        bank.add("bad", folder)
    assert bank.names == ("good",) and bank.resident == {"good": slot}
    after = [t for name in LAYERS for t in vars(bank.layer(name)).values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert bank.stats() == stats


def slot_values(bank, name, layer):
    slot = bank.load(name)
    stack = bank.layer(layer)
    r = int(stack.ranks[slot])
    return stack.lora_A[slot, :r], stack.lora_B[slot, :, :r], float(stack.scaling[slot])


K, E = A.replace("block.q", "block.k"), f"{PREFIX}../../etc/passwd.lora_A.weight"
TENSORS = [
    pytest.param({A: torch.zeros(8, 2)}, (), rf"{A} must be \(2, 8\), got \(8, 2\)", id="shape-A"),
    pytest.param({B: torch.zeros(6, 3)}, (), rf"{B} must be \(6, 2\), got \(6, 3\)", id="shape-B"),
    pytest.param({A: torch.zeros(16)}, (), rf"{A} must be \(2, 8\), got \(16,\)", id="flat"),
    pytest.param({A: torch.zeros(2, 8).int()}, (), f"{A} must be float16.* got torch.int32", id="int"),
    pytest.param({B: torch.zeros(6, 2).to(torch.float8_e4m3fn)}, (), f"{B} must be float16.* got", id="fp8"),
    pytest.param({A: torch.full((2, 8), math.nan)}, (), f"{A} holds NaN or Inf", id="nan"),
    pytest.param({B: torch.full((6, 2), -math.inf)}, (), f"{B} holds NaN or Inf", id="inf"),
    pytest.param({B: torch.ones(6, 2).double() * 1e300}, (), f"{B} holds NaN or Inf", id="overflow"),
    pytest.param({}, (B,), f"lacks {B}, the counterpart of {A}", id="no-B"),
    pytest.param({}, (A,), f"lacks {A}, the counterpart of {B}", id="no-A"),
    pytest.param({}, (A, B), r"lacks block.q.lora_A.weight: target_modules", id="no-layer"),
    pytest.param({}, tuple(tensors()), "holds no lora_A and lora_B", id="nothing"),
    pytest.param({K: torch.zeros(2, 8)}, (), f"{K} is for a layer", id="extra"),
    pytest.param({E: torch.zeros(2, 8)}, (), "etc/passwd.lora_A.weight is for", id="path"),
    pytest.param({A.removeprefix(PREFIX): torch.zeros(2, 8)}, (), "are the same matrix", id="twice"),
    pytest.param({"block.q.lora_magnitude_vector": torch.zeros(6)}, (), "belongs to DoRA", id="dora"),
    pytest.param({B.replace("weight", "bias"): torch.zeros(6)}, (), "belongs to lora_bias", id="bias"),
    pytest.param({"e.lora_embedding_A": torch.zeros(2, 9)}, (), "belongs to an adapter", id="embedding"),
    pytest.param({"lm_head.weight": torch.zeros(2, 9)}, (), "is neither a lora_A nor a lora_B", id="full"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "dropped", "message"), TENSORS)
def test_wrong_tensors(tmp_path, changed, dropped, message):
    folder = write(tmp_path / "bad", changed, dropped=dropped)
    refused(folder, ValueError, f"adapter_model.safetensors.*{message}")


CONFIGS = [
    ({"use_dora": True}, "use_dora=True is not supported"),
    ({"lora_bias": True}, "lora_bias=True is not supported"),
    ({"bias": "all"}, "bias must be 'none'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* is not supported"),
    ({"target_parameters": ["x"]}, "target_parameters=.* is not supported"),
    ({"layer_replication": [[0, 2]]}, "layer_replication=.* is not supported"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices=.* is not supported"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens=.* is not supported"),
    ({"use_qalora": True}, "use_qalora=True is not supported"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.* is not supported"),
    ({"arrow_config": {"top_k": 1}}, "arrow_config=.* is not supported"),
    ({"kasa_config": {"beta": 1}}, "kasa_config=.* is not supported"),
    ({"monteclora_config": {"n": 1}}, "monteclora_config=.* is not supported"),
    ({"velora_config": {"n": 1}}, "velora_config=.* is not supported"),
    ({"init_lora_weights": "pissa"}, "'pissa' changes the base weights"),
    ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
    ({"r": 3}, r"lora_A.weight must be \(3, 8\), got \(2, 8\)"),
    ({"r": None}, "the rank of block.q must be a positive int, got None"),
    ({"r": -2}, "the rank of block.q must be a positive int, got -2"),
    ({"r": 10**400}, "must be"),
    ({"rank_pattern": {"v": 1}}, r"block.v.lora_A.weight must be \(1, 8\)"),
    ({"rank_pattern": ["q"]}, "rank_pattern must be an object of patterns"),
    ({"rank_pattern": {"(": 1}}, "safetensors: rank_pattern holds the bad pattern"),
    ({"alpha_pattern": {"(a+)+b": 1}}, "alpha_pattern holds the pattern"),
    ({"rank_pattern": {".*" * 9 + "z": 1}}, "rank_pattern holds the pattern"),
    ({"rank_pattern": {"(a|a)" * 40 + "z": 1}}, "rank_pattern holds the pattern"),
    ({"rank_pattern": {"a?" * 40 + "a" * 40: 1}}, "rank_pattern holds the pattern"),
    ({"rank_pattern": {"x" * 513: 1}}, "rank_pattern holds the pattern"),
    ({"rank_pattern": {f"x{i}": 1 for i in range(5000)}}, "has 5000 patterns"),
    ({"alpha_pattern": {f".*x{i}": 1 for i in range(65)}}, "more than 64 patterns that are more"),
    ({"lora_alpha": "4"}, "lora_alpha of block.q must be a number"),
    ({"lora_alpha": math.nan}, "lora_alpha of block.q gives the scaling nan"),
    ({"lora_alpha": 1e300}, "lora_alpha of block.q gives the scaling"),
    ({"lora_alpha": 10**400}, "lora|int|float|large"),
    ({"use_rslora": "no"}, "use_rslora must be true or false, got 'no'"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS, ids=lambda value: str(value)[:30])
def test_wrong_settings(tmp_path, config, message):
    folder = write(tmp_path / "bad", config=config)
    began = time.perf_counter()
    refused(folder, ValueError, message)
    assert time.perf_counter() - began < 20


def test_patterns_match_the_end_of_a_name_whole(tmp_path):
    patterns = {r"k\+\+\+": 1, "k|q": 8}  # what is escaped is no repetition
    bank = new_bank()
    bank.add("a", write(tmp_path / "a", config={"alpha_pattern": patterns}))
    assert slot_values(bank, "a", "block.q")[2] == 4
    assert slot_values(bank, "a", "block.v")[2] == 2


@pytest.mark.parametrize("config", [{"layers_to_transform": [0]}, {"exclude_modules": ["q"]}])
def test_an_adapter_of_some_layers_need_not_hold_all_targets(tmp_path, config):
    bank = new_bank()
    bank.add("a", write(tmp_path / "a", config=config, dropped=(A, B)))
    assert bank.load("a") == 0
    assert int(bank.layer("block.q").ranks[0]) == 0
    assert int(bank.layer("block.v").ranks[0]) == 2


def test_a_file_without_rank_or_alpha_means_pefts_defaults(tmp_path):
    folder = write(tmp_path / "a")
    for name in ("lora_alpha", "r"):
        config = {key: value for key, value in CONFIG.items() if key != name}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if name == "r":
            refused(folder, ValueError, r"block.q.lora_A.weight must be \(8, 8\), got \(2, 8\)")
            continue
        bank = new_bank()
        bank.add("a", folder)
        assert slot_values(bank, "a", "block.q")[2] == 4


def test_rank_above_what_the_bank_holds(tmp_path):
    changed = {A: torch.zeros(5, 8), B: torch.zeros(6, 5)}
    folder = write(tmp_path / "bad", changed, {"rank_pattern": {"q": 5}})
    refused(folder, ValueError, f"{A} has rank 5, the bank holds up to 4")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_value_that_is_not_finite_is_found_wherever_it_is(dtype, value):
    bank = AdapterBank({"q": (301, 211)}, 1, 4, dtype=dtype)
    values = {"q.lora_A": torch.randn(3, 211), "q.lora_B": torch.randn(301, 3)}
    for key, position in (("q.lora_A", 0), ("q.lora_A", 317), ("q.lora_B", 640), ("q.lora_B", 902)):
        wrong = values[key].clone()
        wrong.view(-1)[position] = value
        with pytest.raises(ValueError, match=f"{key} holds NaN or Inf"):
            bank.add("bad", values | {key: wrong}, config={"lora_alpha": 1})
    bank.add("good", values, config={"lora_alpha": 1})


LONG = struct.pack("<Q", 1 << 62)
FILES = [
    pytest.param(lambda data: b"", "no readable safetensors", id="empty"),
    pytest.param(lambda data: data[:100], "safetensors file", id="header-cut"),
    pytest.param(lambda data: data[:-1], "no readable safetensors", id="data-cut"),
    pytest.param(lambda data: data + b"\0", "no readable safetensors", id="data-long"),
    pytest.param(lambda data: LONG + data[8:], "no readable safetensors", id="header-length"),
    pytest.param(lambda data: pickle.dumps({"x": print}), "no readable safetensors", id="pickle"),
    pytest.param(lambda data: data.replace(b'"F32"', b'"F99"'), "safetensors file", id="dtype"),
    pytest.param(lambda data: struct.pack("<Q", 2) + b"{}", "holds no lora_A", id="no-tensors"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FILES)
def test_broken_weights(tmp_path, change, message):
    folder = write(tmp_path / "bad")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    refused(folder, ValueError, f"{weights}.*{message}")


def test_a_dtype_that_torch_lacks(tmp_path):
    folder = write(tmp_path / "bad")
    header = json.dumps({A: {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    data = struct.pack("<Q", len(header)) + header + b"\0\0"
    (folder / "adapter_model.safetensors").write_bytes(data)
    refused(folder, ValueError, "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no readable JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("[" * 100_000, "no readable JSON"),
        ('{"r": ' + "1" * 5000 + "}", "no readable JSON"),
        (b"\xff\xfe", "no readable JSON"),
        (" " * (1 << 20) + "{}", "more than the"),
    ],
)
def test_broken_configuration(tmp_path, text, message):
    folder = write(tmp_path / "bad")
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "adapter_config.json").write_bytes(data)
    refused(folder, ValueError, f"adapter_config.json.*{message}")


def test_missing_files_and_pickles(tmp_path):
    folder = write(tmp_path / "bad")
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    refused(folder, FileNotFoundError, "no adapter_model.safetensors in")
    torch.save(tensors(), folder / "adapter_model.bin")
    refused(folder, ValueError, "adapter_model.bin is a pickle, which can run code")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.bin").unlink()
    refused(folder, FileNotFoundError, "no adapter_config.json in")


POSIX = pytest.mark.skipif(os.name != "posix", reason="FIFOs and /dev/zero are POSIX's")


@POSIX
def test_what_is_no_regular_file_neither_hangs_nor_is_read(tmp_path):
    folder = write(tmp_path / "bad")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = folder / name
        data = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        refused(folder, ValueError, f"{path} is no regular file")
        path.unlink()
        path.symlink_to("/dev/zero")
        refused(folder, ValueError, f"{path} is no regular file")
        path.unlink()
        path.mkdir()
        refused(folder, ValueError, f"{path} cannot be read")
        path.rmdir()
        path.symlink_to(path)  # a loop
        refused(folder, (ValueError, FileNotFoundError), name)
        path.unlink()
        path.write_bytes(data)
    blob = tmp_path / "blob"  # the hub's cache links to files elsewhere: that is no trick
    (folder / "adapter_model.safetensors").rename(blob)
    (folder / "adapter_model.safetensors").symlink_to(blob)
    new_bank().add("linked", folder)
    os.truncate(blob, 1 << 40)  # sparse: no more than a size
    refused(folder, ValueError, "has 1099511627776 bytes, more than")


@POSIX
def test_nothing_that_the_configuration_names_is_opened(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # opening it would hang
    config = {"base_model_name_or_path": str(fifo), "revision": "../../x", "auto_mapping": {"x": 1}}
    bank = new_bank()
    bank.add("mine", write(tmp_path / "mine", config=config))
    assert torch.equal(slot_values(bank, "mine", "block.q")[0], tensors()[A])


VALID = save(tensors())


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    cut=st.none() | st.integers(0, len(VALID)),
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6),
    header_only=st.booleans(),
)
def test_any_bytes_give_the_values_of_the_file_or_a_clear_error(
    tmp_path_factory, cut, edits, header_only
):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    write(folder)
    data = bytearray(VALID)
    header = 8 + struct.unpack("<Q", VALID[:8])[0]
    for position, value in edits:
        data[position % header if header_only else position] = value
    (folder / "adapter_model.safetensors").write_bytes(data[:cut])
    bank = new_bank()
    try:
        bank.add("fuzzed", folder)
    except ValueError as error:
        assert "adapter_model.safetensors" in str(error)
        assert bank.names == ()
    else:
        lora_A, lora_B, _ = slot_values(bank, "fuzzed", "block.q")
        assert lora_A.isfinite().all() and lora_B.isfinite().all()
        assert lora_A.shape == (2, 8) and lora_B.shape == (6, 2)


def test_state_dicts_in_every_spelling():
    values = tensors()
    for strip, end in ((PREFIX, ""), ("", ".weight"), (PREFIX, ".weight")):
        named = {k.removeprefix(strip).removesuffix(end): v for k, v in values.items()}
        bank = new_bank()
        bank.add("mine", named, config={"lora_alpha": 6})  # the rank is the tensors'
        lora_A, lora_B, scaling = slot_values(bank, "mine", "block.q")
        assert torch.equal(lora_A, values[A]) and torch.equal(lora_B, values[B])
        assert scaling == 3.0
        values[A].mul_(2)  # the bank has its own copy
        assert torch.equal(slot_values(bank, "mine", "block.q")[0] * 2, values[A])


def test_state_dict_errors():
    bank = new_bank()
    with pytest.raises(TypeError, match=f"adapter 'x': {A} must be a Tensor, got list"):
        bank.add("x", tensors() | {A: [1.0]}, config=CONFIG)
    with pytest.raises(ValueError, match="adapter 'x': use_dora=True is not supported"):
        bank.add("x", tensors(), config=CONFIG | {"use_dora": True})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"q": nn.Linear(8, 6), "v": nn.Linear(8, 4)})
        self.head = nn.Linear(4, 3)

    def get_output_embeddings(self):
        return self.head


def test_layers_of_a_model():
    model = Net().double()
    bank = AdapterBank(model, 2, 4)
    assert bank.layers == ("block.q", "block.v")  # the head only when it is asked for
    assert bank.dtype == torch.float64
    assert AdapterBank(model, 2, 4, target_modules=["v", "head"]).layers == ("block.v", "head")
    with pytest.raises(ValueError, match="names no linear"):
        AdapterBank(model, 2, 4, target_modules=["block"])
    model.half_precision = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"half_precision cannot be served: base\.weight must be"):
        AdapterBank(model, 2, 4, target_modules=["half_precision"])
    model.hooked = nn.Linear(2, 2)
    model.hooked.forward = lambda x: x
    with pytest.raises(ValueError, match="hooked cannot be served: base must compute"):
        AdapterBank(model, 2, 4, target_modules=["hooked"])


def test_what_save_adapter_writes_is_what_the_bank_serves(tmp_path):
    model = Net()
    fastlora.inject(model, ("q",), r=3, lora_alpha=5, use_rslora=True)
    fastlora.inject(model, ("v",), r=2, lora_alpha=7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    fastlora.save_adapter(model, tmp_path / "mine")
    bank = new_bank()
    bank.add("mine", tmp_path / "mine")
    for name in LAYERS:
        layer = model.get_submodule(name)
        lora_A, lora_B, scaling = slot_values(bank, "mine", name)
        assert torch.equal(lora_A, layer.lora_A) and torch.equal(lora_B, layer.lora_B)
        assert scaling == pytest.approx(layer.scaling, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q", "v"], "r": 2, "lora_alpha": 3},
        {"target_modules": "all-linear", "r": 2, "lora_alpha": 3, "exclude_modules": ["head"]},
        {"target_modules": r".*\.(q|v)", "r": 4, "lora_alpha": 3, "use_rslora": True},
        {
            "target_modules": ["q", "v"],
            "r": 2,
            "lora_alpha": 3,
            "rank_pattern": {r"block\.v": 4, ".*q": 1},
            "alpha_pattern": {"^block.q": 9},
        },
    ],
    ids=["plain", "all-linear", "regex-rslora", "patterns"],
)
def test_what_peft_writes_is_what_the_bank_serves(tmp_path, options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(Net()), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "mine")
    bank = new_bank()
    bank.add("mine", tmp_path / "mine")
    bank.add(
        "again",
        peft.get_peft_model_state_dict(model),
        config=model.peft_config["default"].to_dict(),
    )
    for name in LAYERS:
        layer = model.base_model.model.get_submodule(name)
        for adapter in ("mine", "again"):
            lora_A, lora_B, scaling = slot_values(bank, adapter, name)
            assert torch.equal(lora_A, layer.lora_A["default"].weight)
            assert torch.equal(lora_B, layer.lora_B["default"].weight)
            assert scaling == pytest.approx(layer.scaling["default"], rel=1e-6)
