"""`fastlora.accelerate` on PEFT's embedding: values, gradients, what goes back to PEFT, whole models."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora

pytest.importorskip("peft")

import peft_cases as cases
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from safetensors.torch import load_file

from fastlora.integrations import peft_embedding

V, N = 23, 40
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


class Net(nn.Module):
    """An embedding and a linear, both of which PEFT wraps."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, N, **options)
        self.lin = nn.Linear(N, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.emb(x))


def make(
    device: str,
    base: torch.dtype = fp32,
    *,
    adapters_fp32: bool = True,
    emb: dict[str, Any] | None = None,
    **config: Any,
) -> nn.Module:
    options = {"r": 5, "lora_alpha": 9, "target_modules": ["emb", "lin"]} | config
    model = get_peft_model(
        Net(**(emb or {})).to(device, base),
        LoraConfig(init_lora_weights=False, **options),
        autocast_adapter_dtype=adapters_fp32,
    )
    cases.randomize(model)
    return model


def emb(model: nn.Module) -> PeftEmbedding:
    return model.base_model.model.emb


def make_ids(device: str, *shape: int) -> Tensor:
    return torch.randint(0, V, shape or (3, 11), device=device)  # some of them repeat


@contextlib.contextmanager
def only(which: str) -> Iterator[None]:
    """Make the other forward of the embedding fail."""
    owner, name = (
        (PeftEmbedding, "forward") if which == "fused" else (peft_embedding, "lora_embedding")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, cases.forbidden)
        yield


def measure(
    call: Callable[[Tensor], Tensor],
    layer: nn.Module,
    ids: Tensor,
    dy: Tensor,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    leaves = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    with torch.autocast(ids.device.type, autocast, enabled=autocast is not None):
        y = call(ids)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def peft_forward(layer: PeftEmbedding) -> Callable[[Tensor], Tensor]:
    return lambda ids: PeftEmbedding.forward(layer, ids)


def compare(
    model: nn.Module,
    oracle: ModuleType,
    ids: Tensor,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Accelerate; assert that the fused gather is as exact as PEFT's forward against one in fp64."""
    layer = emb(model)
    dtype = layer.weight.dtype
    dy = torch.randn(*ids.shape, N, device=ids.device).to(dtype)
    # max_norm writes into the tables, so each side gets its own
    peft_layer, exact_layer = copy.deepcopy(layer), copy.deepcopy(layer).double()
    plain = measure(peft_forward(peft_layer), peft_layer, ids, dy, autocast)
    exact = measure(peft_forward(exact_layer), exact_layer, ids, dy.double())
    report = fastlora.accelerate(model)
    assert [m.forward for m in report.modules] == ["fused"] * len(report.modules), str(report)
    assert type(layer) is peft_embedding.AcceleratedEmbedding
    with only("fused"):
        got = measure(layer, layer, ids, dy, autocast)
    assert got.keys() == plain.keys() == exact.keys()
    for name in exact:
        assert got[name].dtype == plain[name].dtype, name
        oracle.assert_close(got[name], plain[name], exact[name], autocast or dtype, name)
    for mine, theirs in zip(layer.parameters(), peft_layer.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    return got


PRECISIONS = {
    "fp32": (fp32, True, None),
    "bf16, fp32 adapters": (bf16, True, None),
    "bf16, bf16 adapters": (bf16, False, None),
    "fp16, fp32 adapters": (fp16, True, None),
    "bf16, fp32 adapters, autocast": (bf16, True, bf16),
    "fp32, autocast bf16": (fp32, True, bf16),
}


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_values_and_gradients(precision: tuple[Any, ...], oracle: ModuleType, device: str):
    base, adapters_fp32, autocast = precision
    model = make(device, base, adapters_fp32=adapters_fp32, use_rslora=True)
    got = compare(model, oracle, make_ids(device), autocast)
    assert got.keys() == {"y", "lora_embedding_A.default", "lora_embedding_B.default"}
    assert got["y"].dtype == base


@pytest.mark.parametrize(
    "options",
    [
        {"padding_idx": 3},
        {"padding_idx": -1},
        {"scale_grad_by_freq": True},
        {"max_norm": 1.5},
        {"max_norm": 2, "norm_type": 1.0, "padding_idx": 0},
    ],
    ids=str,
)
def test_options_of_the_embedding(options: dict[str, Any], oracle: ModuleType, device: str):
    got = compare(make(device, emb=options), oracle, torch.arange(V, device=device).repeat(2))
    if "padding_idx" in options:
        padding = options["padding_idx"]
        assert not got["lora_embedding_A.default"][:, padding].any()
        assert got["lora_embedding_A.default"].any()


@pytest.mark.parametrize("shape", [(1,), (2, 1, 3)])
def test_shapes_and_int32_ids(shape: tuple[int, ...], oracle: ModuleType, device: str):
    model = make(device)
    compare(model, oracle, make_ids(device, *shape).int())
    assert emb(model)(torch.tensor(4, device=device)).shape == (N,)


def test_there_is_no_dropout_in_an_embedding_of_peft(oracle: ModuleType, device: str):
    compare(make(device, lora_dropout=0.7).train(), oracle, make_ids(device))


def test_adapter_scaling_and_choice_are_read_at_each_call(oracle: ModuleType, device: str):
    model, ids = make(device), make_ids(device)
    cases.add_adapter(model, "other", r=2, target_modules=["emb", "lin"])
    fastlora.accelerate(model)
    first = emb(model)(ids)
    emb(model).set_scale("default", 3.0)
    compare(model, oracle, ids)
    emb(model).scaling["default"] = torch.tensor(0.7, device=device)
    compare(model, oracle, ids)
    model.set_adapter("other")
    compare(model, oracle, ids)
    assert not torch.allclose(emb(model)(ids), first)


# Handed back


def several(model: nn.Module) -> None:
    cases.add_adapter(model, "other", r=2, target_modules=["emb"])
    model.base_model.set_adapter(["default", "other"])


def dora(model: nn.Module) -> None:
    cases.add_adapter(model, "dora", r=2, target_modules=["emb"], use_dora=True)
    model.set_adapter("dora")


def resized(model: nn.Module) -> None:
    """More rows than lora_embedding_A has columns, as `resize_token_embeddings` leaves it."""
    base = emb(model).base_layer
    weight = torch.cat([base.weight, base.weight[:2]]).detach()
    base.weight = nn.Parameter(weight, requires_grad=False)


def scaled_output(model: nn.Module) -> None:
    emb(model).base_layer.embed_scale = 2.0


def trained(model: nn.Module) -> None:
    emb(model).base_layer.weight.requires_grad_(True)


def hooked(model: nn.Module) -> None:
    emb(model).base_layer.register_forward_hook(lambda module, args, y: y * 1.5)


def subclass_of_a_table(model: nn.Module) -> None:
    class Table(nn.Parameter):
        pass

    tables = emb(model).lora_embedding_A
    tables["default"] = Table(tables["default"].detach())


def tensor_parallel(model: nn.Module) -> None:
    emb(model).input_fns = {"default": lambda inputs: inputs[0]}
    emb(model).output_fns = {}


def tensor_parallel_output(model: nn.Module) -> None:
    emb(model).input_fns = {}
    emb(model).output_fns = {"default": lambda y: y * 2}


HANDED_BACK: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "disabled": (lambda model: emb(model).enable_adapters(False), "adapters are disabled"),
    "merged": (lambda model: model.merge_adapter(), "merged into the base weight"),
    "no such adapter": (lambda model: emb(model).set_adapter(["absent"]), "no adapter in use"),
    "several": (several, "several adapters of an embedding are active"),
    "DoRA": (dora, "'dora' is a variant of LoRA, Dora"),
    "resized": (resized, "do not fit the base weight"),
    "embed_scale": (scaled_output, "embed_scale"),
    "base trained": (trained, "base weight is trained as well"),
    "hook on the base": (hooked, "the base layer has hooks"),
    "tensor subclass": (subclass_of_a_table, "no plain parameters"),
    "tensor parallel, input": (tensor_parallel, "split by tensor parallelism"),
    "tensor parallel, output": (tensor_parallel_output, "split by tensor parallelism"),
}
CONSTANT = ("disabled", "merged", "no such adapter")  # no parameter is used then


@pytest.mark.parametrize("case", HANDED_BACK)
def test_handed_back(case: str, device: str):
    """Decided at each call: the change comes after accelerate, and shows in the next report."""
    change, reason = HANDED_BACK[case]
    model, ids = make(device), make_ids(device)
    fastlora.accelerate(model)
    change(model)
    layer = emb(model)
    with only("PEFT"):
        plain, got = PeftEmbedding.forward(layer, ids), layer(ids)
        assert torch.equal(got, plain)
        leaves = [p for p in layer.parameters() if p.requires_grad]
        if case not in CONSTANT:
            dy = torch.randn_like(got)
            for mine, theirs in zip(
                torch.autograd.grad(got, leaves, dy),
                torch.autograd.grad(plain, leaves, dy),
                strict=True,
            ):
                assert torch.equal(mine, theirs)
    row = fastlora.accelerate(model).modules[0]
    assert row.accelerated and row.forward == "PEFT" and reason in row.now


def test_sparse_gradients_stay_what_peft_makes_of_them(device: str):
    model, ids = make(device, emb={"sparse": True}), make_ids(device)
    assert "sparse" in fastlora.accelerate(model).modules[0].now
    with only("PEFT"):
        assert torch.equal(emb(model)(ids), PeftEmbedding.forward(emb(model), ids))


def decision(model: nn.Module, ids: Any) -> str:
    found = peft_embedding.operands(emb(model), ids)
    return found if isinstance(found, str) else "fused"


def test_what_depends_on_the_call_is_decided_at_the_call(device: str):
    model, ids = make(device), make_ids(device)
    fastlora.accelerate(model)
    assert decision(model, ids) == "fused"
    assert "no int32 or int64" in decision(model, ids.float())
    assert "no int32 or int64" in decision(model, [1, 2])
    assert "no ids" in decision(model, ids[:0])
    assert "meta" in decision(model, ids.to("meta"))
    assert "subclass" in decision(model, ids.as_subclass(type("Ids", (Tensor,), {})))
    with fastlora.dispatch.force("eager"):
        assert "force('eager')" in decision(model, ids)
    emb(model).lora_embedding_B["default"].data = emb(model).lora_embedding_B["default"].to(bf16)
    assert "lora_A of 'default' is torch.float32 and lora_B" in decision(model, ids)
    with pytest.raises(RuntimeError, match="dtype"):  # PEFT's error
        emb(model)(ids)


def test_errors_are_those_of_peft(device: str):
    model, ids = make(device), make_ids(device)
    fastlora.accelerate(model)
    with pytest.raises(RuntimeError, match="scalar types"):
        emb(model)(ids.float())
    with pytest.raises(TypeError):
        emb(model)(ids, unknown=1)
    if device == "cpu":
        with pytest.raises(IndexError):
            emb(model)(ids + V)


def test_mixed_batch_is_that_of_peft(device: str):
    model, ids = make(device).eval(), make_ids(device)
    cases.add_adapter(model, "other", r=2, target_modules=["emb"])
    names = ["default", "other", "__base__"]
    expected = model(ids, adapter_names=names)
    fastlora.accelerate(model)
    with only("PEFT"):
        torch.testing.assert_close(model(ids, adapter_names=names), expected)


def test_torch_compile_traces_pefts_forward(device: str):
    model, ids = make(device), make_ids(device)
    fastlora.accelerate(model)
    with only("fused"):
        expected = emb(model)(ids)
    try:
        with only("PEFT"):
            got = torch.compile(emb(model), backend="aot_eager", fullgraph=True)(ids)
    finally:
        torch.compiler.reset()
    torch.testing.assert_close(got, expected)


# Left alone, and the whole model


def test_variants_and_scaled_embeddings_are_left_alone():
    model = make("cpu", use_dora=True, target_modules=["emb"])
    reason = fastlora.accelerate(model).left[0][1]
    assert reason == "each of its adapters is a variant of LoRA: Dora"
    assert type(emb(model)) is PeftEmbedding

    class ScaledEmbedding(nn.Embedding):
        embed_scale = 2.0

    model = make("cpu")
    emb(model).base_layer.__class__ = ScaledEmbedding
    report = fastlora.accelerate(model)
    assert "ScaledEmbedding, not exactly torch.nn.Embedding" in report.left[0][1]


def test_report_restore_copies_files_and_merging(tmp_path: Path, device: str):
    model, ids = make(device), make_ids(device)
    plain = copy.deepcopy(model)
    expected = plain(ids)
    report = fastlora.accelerate(model)
    assert report.accelerated == ("base_model.model.emb", "base_model.model.lin")
    assert "accelerated 2 of 2 LoRA layers" in str(report)
    assert fastlora.accelerate(model) == report
    for fast in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model.base_model))):
        with only("fused"):
            torch.testing.assert_close(fast(ids), expected, atol=1e-4, rtol=1e-4)
    assert str(model).replace("Accelerated", "") == str(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    files = []
    for name, which in (("fast", model), ("plain", plain)):
        which.save_pretrained(tmp_path / name)
        files.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert sum("lora_embedding_" in name for name in files[0]) == 2
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])

    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(ids), plain(ids))
    model.merge_adapter(), plain.merge_adapter()
    assert torch.equal(model(ids), plain(ids))
    model.unmerge_adapter(), plain.unmerge_adapter()
    expected = plain(ids)
    with only("fused"):
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)

    restored = copy.deepcopy(model)
    assert fastlora.restore(restored) == report.accelerated
    assert type(emb(restored)) is PeftEmbedding
    assert torch.equal(restored(ids), plain(ids))
    assert fastlora.restore(restored) == ()
    merged = [each.merge_and_unload() for each in (model, plain)]
    assert type(merged[0].emb) is nn.Embedding
    assert torch.equal(merged[0](ids), merged[1](ids))
