"""serve: models whose layers do not all see a row a token of the served forward are not half served."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from fastlora import AdapterBank, serve, unserve
from fastlora.dispatch import force

transformers = pytest.importorskip("transformers")


def fill(bank, names, scale=0.4, r=3):
    """Random adapters for every layer of the bank."""
    generator = torch.Generator().manual_seed(0)
    for name in names:
        tensors = {}
        for layer in bank.layers:
            stack = bank.layer(layer)
            K, N = stack.lora_A.shape[2], stack.lora_B.shape[1]
            tensors[f"{layer}.lora_A"] = torch.randn(r, K, generator=generator) * scale
            tensors[f"{layer}.lora_B"] = torch.randn(N, r, generator=generator) * scale
        bank.add(name, tensors, config={"lora_alpha": r})
    return bank


def enlarge(model, factor):
    """Weights of transformers' initialisation are too small for adapters to show in tokens."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model.eval()


@pytest.fixture
def llava():
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=16,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=63, image_seq_length=4
    )
    ids = torch.randint(2, 60, (2, 12))
    ids[0, 1:5] = ids[0, 6:10] = 63  # two images, both of the first prompt
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    return enlarge(transformers.LlavaForConditionalGeneration(config), 4), inputs


def test_rows_of_images_belong_to_no_prompt(llava):
    model, inputs = llava
    bank = fill(AdapterBank(model, slots=2, max_rank=4), "ab")
    serve(model, bank)
    with force("eager"), torch.no_grad(), pytest.raises(ValueError, match="cannot be told apart"):
        model(**inputs, adapter_ids=["a", "b"])


def test_the_language_model_beside_images(llava):
    model, inputs = llava
    bank = AdapterBank(
        model, slots=2, max_rank=4, target_modules=r".*language_model.*_proj|lm_head"
    )
    serve(model, fill(bank, "ab", 0.3))
    with force("eager"), torch.no_grad():
        first = model(**inputs, adapter_ids=["a", "b"]).logits[0]
        other = model(**inputs, adapter_ids=["a", None]).logits[0]
        frozen = model(**inputs).logits[0]
    torch.testing.assert_close(first, other)
    assert (first - frozen).abs().max() > 0.1


def test_a_generate_that_runs_layers_past_the_forward_is_an_error():
    torch.manual_seed(0)
    vision = transformers.Blip2VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    bridge = transformers.Blip2QFormerConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, encoder_hidden_size=16,
    )  # fmt: skip
    text = transformers.OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, eos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=vision.to_dict(), qformer_config=bridge.to_dict(),
        text_config=text.to_dict(), num_query_tokens=2, image_token_index=63,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    bank = AdapterBank(model, 2, 4, target_modules=r"language_model\..*(q_proj|v_proj|fc1|fc2)")
    serve(model, fill(bank, "ab"))
    ids = torch.randint(2, 60, (2, 6))
    ids[:, :2] = 63
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8), "max_new_tokens": 2}
    with force("eager"):
        model.generate(**inputs)
        with pytest.raises(RuntimeError, match="outside the served model's forward"):
            model.generate(**inputs, adapter_ids=["a", "b"])
    assert all(entry is None or not entry.holders for entry in bank._books.owner)


class Stacked(nn.Module):
    """A model around one module, with the arguments of one of transformers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids=None, inputs_embeds=None):
        return self.inner(inputs_embeds)


class Nested(Stacked):
    """Whose generate calls itself without adapters."""

    def generate(self, inputs_embeds=None, nested=True):
        if nested:
            return self.generate(inputs_embeds=inputs_embeds, nested=False)
        return self(inputs_embeds=inputs_embeds)


def test_a_generate_without_adapters_inside_of_one_with_them_is_the_frozen_models():
    torch.manual_seed(0)
    model, x = Nested(nn.Linear(8, 8)).eval(), torch.randn(1, 3, 8)
    expected = model.inner(x)
    serve(model, fill(AdapterBank(model, 2, 4), "a"))
    with force("eager"):
        assert torch.equal(model.generate(inputs_embeds=x, adapter_ids=["a"]), expected)
        got = model.generate(inputs_embeds=x, adapter_ids=["a"], nested=False)
        assert not torch.allclose(got, expected)


def test_a_compiled_model_is_served_before():
    model = Stacked(nn.Linear(8, 8)).eval()
    bank = AdapterBank(model, 1, 2)
    with pytest.raises(TypeError, match="served before it is compiled"):
        serve(torch.compile(model, backend="eager"), bank)
    serve(model, bank)


def test_transformer_encoder_layers_are_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = Stacked(layer).eval()
    with pytest.raises(ValueError, match="names no linear"):
        AdapterBank(model, 1, 2)
    with pytest.raises(ValueError, match=r"linear1 cannot be served: .*past its forward"):
        AdapterBank(model, 1, 2, target_modules=["linear1"])
    with pytest.raises(TypeError, match=r"linear1 cannot be served"):
        serve(model, AdapterBank({"inner.linear1": (16, 8)}, 1, 2))


def test_a_module_under_two_names_is_refused():
    shared = nn.Linear(8, 8)
    model = Stacked(nn.Sequential(shared, shared)).eval()
    bank = AdapterBank({"inner.0": (8, 8), "inner.1": (8, 8)}, 1, 2)
    with pytest.raises(ValueError, match=r"inner\.1 is the same module"):
        serve(model, bank)
    serve(model, AdapterBank(model, 1, 2))
    unserve(model)


def gpt2():
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def test_conv1d_with_another_forward_is_refused():
    model = gpt2()
    layer = model.transformer.h[0].attn.c_attn
    layer.forward = lambda x: type(layer).forward(layer, x) * 2
    assert "transformer.h.0.attn.c_attn" not in AdapterBank(model, 1, 2).layers
    with pytest.raises(ValueError, match="c_attn cannot be served: its forward was replaced"):
        AdapterBank(model, 1, 2, target_modules=["c_attn"])
    del layer.forward
    bank, inner = AdapterBank(model, 1, 2), AdapterBank(model.transformer, 1, 2)
    serve(model, bank)
    with pytest.raises(TypeError, match="its forward was replaced, by hooks or serve"):
        serve(model.transformer, inner)
    unserve(model)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("shape", [(), (2, 1), (2, 3)], ids=str)
def test_ids_of_another_shape_are_refused(shape):
    model = Stacked(nn.Linear(8, 8)).eval()
    serve(model, fill(AdapterBank(model, 1, 3), "a"))
    with pytest.raises(ValueError, match=r"adapter_ids as a tensor must be .*fastlora\.route"):
        model(inputs_embeds=torch.randn(2, 3, 8), adapter_ids=torch.zeros(shape, dtype=torch.int32))


def test_names_have_an_order():
    model = Stacked(nn.Linear(8, 8)).eval()
    bank = fill(AdapterBank(model, 2, 3), "ab")
    serve(model, bank)
    with pytest.raises(TypeError, match="names must be a list of names, got a set"):
        model(inputs_embeds=torch.randn(2, 3, 8), adapter_ids={"a", "b"})
    with pytest.raises(TypeError, match="got a dict"):
        bank.acquire({"a": 1})
    assert fastlora.unserve(model) is model
