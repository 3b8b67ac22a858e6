"""`fastlora.accelerate` on whole models: their losses and gradients, and everything else that PEFT does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peft_cases  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from peft.utils.hotswap import (  # noqa: E402
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from peft_cases import SMALL, llama  # noqa: E402

from fastlora.integrations.peft_layers import AcceleratedLinear  # noqa: E402

pytestmark = pytest.mark.usefixtures("same_masks")

VOCAB, LENGTH = SMALL["vocab_size"], 6
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def qwen2() -> nn.Module:
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return model


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "Llama": (llama, LLAMA, 14),
    "Qwen2, with bias": (qwen2, LLAMA, 14),
    "GPT-2, Conv1D": (gpt2, ["c_attn", "c_proj", "c_fc"], 8),
}


def wrap(model: nn.Module, **config: Any) -> PeftModel:
    options: dict[str, Any] = {"r": 4, "target_modules": LLAMA, "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(options | config)))


def make_ids(device: str, rows: int = 2) -> Tensor:
    return torch.randint(1, VOCAB, (rows, LENGTH), device=device)


def step(model: nn.Module, ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """The logits, the loss and every gradient of one training step."""
    model.zero_grad()
    torch.manual_seed(5)
    out = model(input_ids=ids, labels=ids, **kwargs)
    out.loss.backward()
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients(model)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = torch.linalg.vector_norm(got[name] - value)
        assert error <= rtol * torch.linalg.vector_norm(value) + 1e-12, f"{name}: {error}"
        assert got[name].dtype == value.dtype


def accelerate_all(model: nn.Module) -> fastlora.AccelerationReport:
    report = fastlora.accelerate(model)
    assert not report.left, str(report)
    assert {m.forward for m in report.modules} == {"fused"}, str(report)
    return report


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_families(family: tuple[Callable[[], nn.Module], list[str], int], device: str):
    build, targets, count = family
    model = wrap(
        build(), target_modules=targets, lora_dropout=0.1, fan_in_fan_out=build is gpt2
    ).to(device)
    ids = make_ids(device)
    expected = step(model, ids)
    report = accelerate_all(model)
    assert len(report.accelerated) == count
    assert f"accelerated {count} of {count} LoRA layers" in str(report)
    with peft_cases.count_peft_forwards() as slow:
        got = step(model, ids)
    assert not slow
    assert sum("lora_" in name for name in got) == 2 * count
    assert_same(got, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_replays_the_masks(use_reentrant: bool, device: str):
    model = wrap(llama(), lora_dropout=0.2).to(device).train()
    model.enable_input_require_grads()
    ids = make_ids(device)
    plain = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    expected = step(model, ids)
    assert_same(expected, plain)
    accelerate_all(model)
    with peft_cases.count_peft_forwards() as slow:
        got = step(model, ids)
    assert not slow
    assert_same(got, expected)


def test_adapters_that_transformers_holds_itself(device: str):
    """Its `model.add_adapter` wraps linears without a PeftModel around them."""
    model = llama(num_hidden_layers=1).to(device)
    torch.manual_seed(3)
    try:
        model.add_adapter(LoraConfig(r=4, target_modules=LLAMA, init_lora_weights=False))
    except ValueError as error:  # 5.23 asks for PEFT 0.20 here, 5.24 for 0.22
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    ids = make_ids(device)
    expected = step(model, ids)
    assert len(accelerate_all(model).accelerated) == 7
    with peft_cases.count_peft_forwards() as slow:
        got = step(model, ids)
    assert not slow
    assert_same(got, expected)


def test_accumulated_gradients(device: str):
    model = wrap(llama(num_hidden_layers=1), lora_dropout=0.1).to(device)
    ids = make_ids(device, rows=4)

    def accumulate() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        for half in ids.chunk(2):
            (model(input_ids=half, labels=half).loss / 2).backward()
        return gradients(model)

    expected = accumulate()
    accelerate_all(model)
    assert_same(accumulate(), expected)


# What PEFT does to a model


@pytest.fixture
def pair(device: str) -> tuple[PeftModel, PeftModel, Tensor]:
    """The same model twice, the second one accelerated, and tokens."""
    plain = wrap(llama(num_hidden_layers=1), target_modules=["q_proj", "down_proj"]).to(device)
    fast = copy.deepcopy(plain)
    accelerate_all(fast)
    return plain, fast, make_ids(device)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_agree(plain: nn.Module, fast: nn.Module, ids: Tensor, fused: bool = True) -> None:
    with peft_cases.count_peft_forwards() as slow:
        got = logits(fast, ids)
    assert bool(slow) is not fused
    torch.testing.assert_close(got, logits(plain, ids), atol=2e-5, rtol=1e-4)


def add_second(model: PeftModel, **changes: Any) -> None:
    torch.manual_seed(9)
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | changes
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", **config))


def test_adapters_come_and_go(pair: tuple[PeftModel, PeftModel, Tensor]):
    plain, fast, ids = pair
    start = logits(plain, ids)
    for model in pair[:2]:
        add_second(model)
    assert_agree(plain, fast, ids)
    for model in (plain, fast):
        model.set_adapter("second")
    assert not torch.allclose(logits(plain, ids), start, atol=1e-3)
    # down_proj has no second adapter: that layer is PEFT's plain base then
    assert_agree(plain, fast, ids, fused=False)
    for model in (plain, fast):
        model.base_model.set_adapter(["default", "second"])
    assert_agree(plain, fast, ids)
    for model in (plain, fast):
        model.delete_adapter("second")
        model.set_adapter("default")
    assert_agree(plain, fast, ids)
    torch.testing.assert_close(logits(fast, ids), start, atol=2e-5, rtol=1e-4)


def test_a_layer_that_add_adapter_makes_is_picked_up_by_a_second_accelerate(
    pair: tuple[PeftModel, PeftModel, Tensor],
):
    plain, fast, ids = pair
    for model in (plain, fast):
        add_second(model, target_modules=["o_proj"])
        model.base_model.set_adapter(["default", "second"])
    assert_agree(plain, fast, ids, fused=False)
    assert len(accelerate_all(fast).accelerated) == 3
    assert_agree(plain, fast, ids)


def test_disable_adapter(pair: tuple[PeftModel, PeftModel, Tensor]):
    plain, fast, ids = pair
    with plain.disable_adapter(), fast.disable_adapter():
        assert torch.equal(logits(fast, ids), logits(plain, ids))
        reason = fastlora.accelerate(fast).modules[0].now
        assert reason == "adapters are disabled"
    assert_agree(plain, fast, ids)


def test_merge_unmerge_and_unload(pair: tuple[PeftModel, PeftModel, Tensor]):
    plain, fast, ids = pair
    for model in (plain, fast):
        model.merge_adapter()
    assert torch.equal(logits(fast, ids), logits(plain, ids))
    for model in (plain, fast):
        model.unmerge_adapter()
    assert_agree(plain, fast, ids)
    merged = [model.merge_and_unload(safe_merge=True) for model in (plain, fast)]
    assert torch.equal(logits(merged[1], ids), logits(merged[0], ids))
    assert not any(isinstance(module, PeftLinear) for module in merged[1].modules())


def test_unload_gives_the_base_model(pair: tuple[PeftModel, PeftModel, Tensor]):
    plain, fast, ids = pair
    assert torch.equal(logits(fast.unload(), ids), logits(plain.unload(), ids))


def test_copies_and_pickles_stay_accelerated(pair: tuple[PeftModel, PeftModel, Tensor]):
    plain, fast, ids = pair
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert sum(type(m) is AcceleratedLinear for m in again.modules()) == 2
        assert_agree(plain, again, ids)
        nn.init.zeros_(
            again.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
        )
    assert_agree(plain, fast, ids)


def test_state_dict_and_files_are_byte_for_byte_the_same(
    pair: tuple[PeftModel, PeftModel, Tensor], tmp_path: Path
):
    plain, fast, ids = pair
    before, after = plain.state_dict(), fast.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert str(fast).replace("Accelerated", "") == str(plain)
    # One model both times: PEFT writes sets, whose order may differ between equal ones.
    fast.save_pretrained(tmp_path / "fast")
    fastlora.restore(fast)
    fast.save_pretrained(tmp_path / "plain")
    fastlora.accelerate(fast)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "fast").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names)
    for name in names:
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("plain", "fast"))
        assert one == other, name
    fast.load_adapter(str(tmp_path / "plain"), "again")
    fast.set_adapter("again")
    assert_agree(plain, fast, ids)
    fast.load_state_dict(before, strict=False)
    plain.load_state_dict(before)
    fast.set_adapter("default")
    assert_agree(plain, fast, ids)


def test_hotswap_of_another_rank(
    pair: tuple[PeftModel, PeftModel, Tensor], tmp_path: Path, device: str
):
    plain, fast, ids = pair
    other = wrap(
        llama(num_hidden_layers=1), r=7, lora_alpha=3, target_modules=["q_proj", "down_proj"]
    )
    other.save_pretrained(tmp_path)
    for model in (plain, fast):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(
        fast.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"], Tensor
    )
    assert_agree(plain, fast, ids)
    start = logits(plain, ids)
    for model in (plain, fast):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device=device)
    assert not torch.allclose(logits(plain, ids), start, atol=1e-3)
    assert_agree(plain, fast, ids)


def test_generate(pair: tuple[PeftModel, PeftModel, Tensor]):
    plain, fast, ids = pair
    options = {"max_new_tokens": 4, "do_sample": False}
    with peft_cases.count_peft_forwards() as slow:
        got = fast.generate(input_ids=ids, **options)
    assert not slow
    assert torch.equal(got, plain.generate(input_ids=ids, **options))


# Mixed batches

NAMES = ["default", "__base__", "second", "default"]


@pytest.fixture
def mixed(device: str) -> tuple[PeftModel, PeftModel, Tensor]:
    """Like `pair`, with a second adapter that lacks one layer, both trainable, and a row for each name."""
    plain = wrap(llama(), target_modules=["q_proj", "down_proj"]).to(device)
    add_second(plain)
    plain.base_model.set_adapter(["default", "second"])
    fast = copy.deepcopy(plain)
    accelerate_all(fast)
    return plain, fast, make_ids(device, rows=len(NAMES))


def test_mixed_batch_in_eval(mixed: tuple[PeftModel, PeftModel, Tensor]):
    plain, fast, ids = mixed
    plain.eval(), fast.eval()
    with peft_cases.count_peft_forwards() as slow, torch.no_grad():
        got = fast(input_ids=ids, adapter_names=NAMES).logits
    assert not slow
    with torch.no_grad():
        expected = plain(input_ids=ids, adapter_names=NAMES).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert not any(layer._forward_pre_hooks for layer in fast.modules())


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_for_a_mixed_batch(mixed: tuple[PeftModel, PeftModel, Tensor], num_beams: int):
    if num_beams > 1 and peft.__version__.startswith("0.18."):
        pytest.skip(
            "PEFT 0.18 takes a decoder of transformers 5 for an encoder and names too few rows"
        )
    plain, fast, ids = mixed
    plain.eval(), fast.eval()
    options = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "adapter_names": NAMES,
        "max_new_tokens": 3, "num_beams": num_beams, "do_sample": False,
    }  # fmt: skip
    with peft_cases.count_peft_forwards() as slow:
        got = fast.generate(**options)
    assert not slow
    assert got.shape == (len(NAMES), LENGTH + 3)
    assert torch.equal(got, plain.generate(**options))


def test_names_are_checked_in_training_too(mixed: tuple[PeftModel, PeftModel, Tensor]):
    plain, fast, ids = mixed
    with pytest.raises(ValueError, match="in training mode"):
        plain.train()(input_ids=ids, adapter_names=NAMES)
    with pytest.raises(ValueError, match="non-existing adapter"):
        fast.train()(input_ids=ids, adapter_names=["typo"] * len(NAMES))
    assert fast.base_model.training
    fastlora.restore(fast)
    with pytest.raises(ValueError, match="in training mode"):
        fast(input_ids=ids, adapter_names=NAMES)
    assert type(fast.base_model) is type(plain.base_model)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_mixed_batch_in_training(
    mixed: tuple[PeftModel, PeftModel, Tensor], use_reentrant: bool | None
):
    """The gradients are those of each row alone; checkpointing runs each layer again with its names."""
    plain, fast, ids = mixed
    plain.train(), fast.train()
    dlogits = torch.randn(*ids.shape, VOCAB, device=ids.device)
    for row, name in enumerate(NAMES):
        if name == "__base__":
            continue
        plain.set_adapter(name)
        plain(input_ids=ids[row : row + 1]).logits.backward(dlogits[row : row + 1])
    expected = gradients(plain)
    assert any(".second." in name for name in expected)

    if use_reentrant is not None:
        fast.enable_input_require_grads()
        fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with peft_cases.count_peft_forwards() as slow:
        out = fast(input_ids=ids, adapter_names=NAMES).logits
        fast(
            input_ids=ids, adapter_names=NAMES[::-1]
        )  # another batch before the backward of this one
        out.backward(dlogits)
    assert not slow
    assert_same(gradients(fast), expected)
    assert not any(layer._forward_pre_hooks for layer in fast.modules() if hasattr(layer, "lora_A"))


def test_mixed_batch_in_training_with_layers_that_peft_runs(
    mixed: tuple[PeftModel, PeftModel, Tensor],
):
    """A layer that is not accelerated gets its names again in recomputation as well."""
    _, fast, ids = mixed
    dlogits = torch.randn(*ids.shape, VOCAB, device=ids.device)
    for layer in fast.modules():
        if type(layer) is AcceleratedLinear and layer.out_features == 32:
            layer.__class__ = PeftLinear
    fast.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            fast.gradient_checkpointing_enable({"use_reentrant": False})
        fast.zero_grad()
        with peft_cases.count_peft_forwards() as slow:
            fast(input_ids=ids, adapter_names=NAMES).logits.backward(dlogits)
        assert slow
        found.append(gradients(fast))
    assert_same(found[1], found[0])
