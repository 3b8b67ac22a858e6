"""torch.compile of the decoder layers of a PEFT model that `fastlora.accelerate` took."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch

import fastlora

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("fastlora.ops", reason="needs Triton", exc_type=ImportError)

import peft_cases  # noqa: E402

LAYERS, LINEARS = 3, 7
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def llama(device, dtype, dropout):
    """A small Llama with fp32 adapters on its linears; rank 4, B not zero."""
    torch.manual_seed(0)
    base = peft_cases.llama(num_hidden_layers=LAYERS, use_cache=False).to(device, dtype)
    settings = peft.LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear")
    model = peft.get_peft_model(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    report = fastlora.accelerate(model)
    assert [m.forward for m in report.modules] == ["fused"] * LAYERS * LINEARS, str(report)
    return model


def compile_layers(model):
    """Compile each decoder layer for itself; give what the graphs of the layers call, and how often."""
    graphs = []

    def note(graph, _):
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    for layer in model.get_base_model().model.layers:
        layer.compile(backend=note, fullgraph=True)
    return graphs


def training_step(model, ids, autocast):
    """The loss and every gradient."""
    model.zero_grad()
    torch.manual_seed(1)
    mode = torch.autocast(ids.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    with mode:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("dtype", "autocast", "dropout"),
    [(torch.float32, False, 0.3), (torch.bfloat16, False, 0.0), (torch.bfloat16, True, 0.3)],
    ids=["fp32", "bf16", "autocast"],
)
def test_layers_share_graphs_that_hold_the_ops(device, dtype, autocast, dropout):
    """Two graphs for all layers, since the first one's input needs no gradient; an op for each linear."""
    model = llama(device, dtype, dropout)
    ids = torch.randint(64, (2, 9), device=device)
    loss, grads = training_step(model, ids, autocast)
    graphs = compile_layers(model)
    got, got_grads = training_step(model, ids, autocast)
    assert [graph["fastlora.lora_linear.default"] for graph in graphs] == [LINEARS] * 2
    assert len(grads) == LAYERS * LINEARS * 2
    torch.testing.assert_close(got, loss)
    assert got_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(got_grads[name], grad, msg=lambda m, n=name: f"{n}: {m}")
    training_step(model, ids, autocast)
    assert len(graphs) == 2


def test_another_adapter_and_another_scale_are_read(device):
    model = llama(device, torch.float32, 0.0)
    ids = torch.randint(64, (2, 9), device=device)
    compile_layers(model)
    before, _ = training_step(model, ids, False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.neg_()
    changed, _ = training_step(model, ids, False)
    assert not torch.allclose(before, changed)
    with model.disable_adapter():
        frozen = model(input_ids=ids, labels=ids).loss
    assert not torch.allclose(frozen, changed)
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.0)
    torch.testing.assert_close(training_step(model, ids, False)[0], frozen.detach())
