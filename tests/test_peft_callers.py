"""What callers do around accelerated layers: checkpoints, hooks, tracers, outputs changed in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora

peft = pytest.importorskip("peft", minversion="0.18")


def wrap(net: nn.Module, targets: list[str], **options: Any) -> Any:
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(net, config)


class Blocks(nn.Module):
    """Two linears in a block that the model may checkpoint by itself."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(16, 16), nn.Linear(16, 16), way

    def block(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "no_grad":
            with torch.no_grad():
                x = self.block(x)
            return self.block(x)
        if self.way == "plain":
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.way == "reentrant")


def two_adapters(way: str, device: str) -> Any:
    model = wrap(Blocks(way), ["a", "b"])
    model.add_adapter(
        "second", peft.LoraConfig(r=4, target_modules=["a", "b"], init_lora_weights=False)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model = model.to(device)
    fastlora.accelerate(model)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_a_checkpoint_that_forgets_the_names_is_refused(way: str, device: str):
    model = two_adapters(way, device)
    x = torch.randn(4, 16, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"gradient_checkpointing_enable\(\) of transformers"):
        model(x, adapter_names=["second"] * 4)
    model(x).sum().backward()  # without names as ever
    assert gradients(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_the_model_knows_the_names(use_reentrant: bool, device: str):
    model = two_adapters("plain", device)
    x = torch.randn(4, 16, device=device, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return model(x, adapter_names=["second", "default"] * 2)

    run(x).square().sum().backward()
    expected = gradients(model)
    checkpoint(run, x, use_reentrant=use_reentrant).square().sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)


def test_names_without_autograd_for_a_part_of_the_model(device: str):
    model = two_adapters("no_grad", device)
    x = torch.randn(4, 16, device=device)
    model(x, adapter_names=["second", "default"] * 2).sum().backward()
    assert len(gradients(model)) == 8
    with torch.no_grad():
        model(x, adapter_names=["second"] * 4)


def test_a_forward_that_was_bound_before_restore(device: str):
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = wrap(nn.Sequential(nn.Linear(16, 16), nn.Embedding(9, 16)), ["0", "1"]).to(device)
    linear, embedding = model.base_model.model
    x, ids = torch.randn(3, 16, device=device), torch.tensor([1, 3], device=device)
    expected = linear(x), embedding(ids)
    fastlora.accelerate(model)
    for layer in (linear, embedding):
        add_hook_to_module(layer, ModelHook())
    fastlora.restore(model)
    torch.testing.assert_close(linear(x), expected[0])
    torch.testing.assert_close(embedding(ids), expected[1])
    with model.disable_adapter():
        torch.testing.assert_close(linear(x), linear.base_layer(x))
        torch.testing.assert_close(embedding(ids), embedding.base_layer(ids))


def test_make_fx_sees_pefts_operations(device: str):
    from torch.fx.experimental.proxy_tensor import make_fx

    model = wrap(nn.Sequential(nn.Linear(16, 16)), ["0"]).to(device).eval()
    x, other = torch.randn(2, 16, device=device), torch.randn(2, 16, device=device)
    expected = model(other)
    fastlora.accelerate(model)
    with torch.no_grad():
        traced = make_fx(model)(x)
    torch.testing.assert_close(traced(other), expected)
    weights = [torch.randn(shape, device=device) for shape in ((8, 16), (4, 16), (8, 4))]
    for _ in range(3):
        fastlora.lora_linear(x, *weights)
    traced = make_fx(lambda x: fastlora.lora_linear(x, *weights))(x)
    torch.testing.assert_close(traced(other), fastlora.lora_linear(other, *weights))


def test_dora_drops_where_peft_does(device: str):
    model = wrap(nn.Sequential(nn.Linear(16, 16)), ["0"], use_dora=True, lora_dropout=0.5)
    model = model.to(device).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    x = torch.randn(3, 16, device=device)
    expected = model(x)
    fastlora.accelerate(model)
    torch.testing.assert_close(model(x), expected)
    row = x[0]
    assert model(row).shape == (1, 16)  # as PEFT's DoRA makes it
    with pytest.raises(ValueError, match="DoRA"):
        model(x, adapter_names=["default"] * 3)


def test_a_scaling_that_is_a_bool(device: str):
    model = wrap(nn.Sequential(nn.Linear(16, 16)), ["0"]).to(device)
    layer, x = model.base_model.model[0], torch.randn(3, 16, device=device)
    layer.scaling["default"] = False
    expected = model(x)
    fastlora.accelerate(model)
    torch.testing.assert_close(model(x), expected)


def test_the_embeddings_of_a_text_may_be_changed_in_place(device: str):
    model = wrap(nn.Sequential(nn.Embedding(9, 16)), ["0"]).to(device)
    fastlora.accelerate(model)
    image = torch.randn(2, 16, device=device, requires_grad=True)
    with torch.no_grad():
        embeddings = model(torch.tensor([[1, 2, 3, 4]], device=device))
    embeddings[:, 1:3] = image
    embeddings.sum().backward()
    assert image.grad is not None
