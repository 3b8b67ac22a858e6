"""serve: each sequence of a batch gets what its adapter alone gives in PEFT."""

from __future__ import annotations

import copy
import functools
import re
import runpy
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlora
from fastlora import AdapterBank, serve, serving, unserve
from fastlora.dispatch import force

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ADAPTERS = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
    "mixed": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"o_proj": 12},
    },
}
BATCH = ["attention", None, "all", "mixed", "all"]


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def with_adapter(base, folder, options, seed):
    """The base with one adapter in PEFT, written to a folder."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The frozen model as None, and the model of each adapter; folders of the adapters."""
    folder, base = tmp_path_factory.mktemp("adapters"), llama()
    alone = {None: base}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        alone[name] = with_adapter(base, folder / name, options, seed)
    return alone, folder


@pytest.fixture
def served(models):
    alone, folder = models
    model = copy.deepcopy(alone[None])
    bank = AdapterBank(model, slots=3, max_rank=8)
    for name in ADAPTERS:
        bank.add(name, folder / name)
    with force("eager"):
        yield serve(model, bank), bank


def prompts(count=5, length=6):
    tokens = torch.randint(2, 96, (count, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1:2, :3] = 0  # left padding
    return {"input_ids": torch.where(mask.bool(), tokens, 0), "attention_mask": mask}


def row(inputs, i):
    return {name: value[i : i + 1] for name, value in inputs.items()}


GENERATIONS = [
    pytest.param({"max_new_tokens": 10}, id="greedy"),
    pytest.param({"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}, id="beams"),
    pytest.param({"max_new_tokens": 5, "cache_implementation": "static"}, id="static-cache"),
    pytest.param({"max_new_tokens": 4, "use_cache": False}, id="no-cache"),
]


@pytest.mark.parametrize("options", GENERATIONS)
def test_each_request_gets_the_tokens_of_its_adapter_alone(models, served, options):
    (alone, _), (model, bank), inputs = models, served, prompts()
    mixed = model.generate(**inputs, do_sample=False, adapter_ids=BATCH, **options)
    returned = options.get("num_return_sequences", 1)
    outputs = {}
    for i, name in enumerate(BATCH):
        expected = alone[name].generate(**row(inputs, i), do_sample=False, **options)
        assert torch.equal(mixed[i * returned : (i + 1) * returned], expected)
        outputs[name] = expected[:, 6:].tolist()
    assert len({str(tokens) for tokens in outputs.values()}) == len(outputs)  # they do differ
    assert bank.stats().hits + bank.stats().misses == 3  # once a call, not once a step
    again = model.generate(**inputs, do_sample=False, adapter_ids=BATCH, **options)
    assert torch.equal(again, mixed)


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 2}, {"guidance_scale": 1.5}],
    ids=["prompt-lookup", "guidance"],
)
def test_ways_of_generating_that_run_the_model_otherwise(models, served, options):
    (alone, _), (model, _), inputs = models, served, prompts(1)
    options = options | {"do_sample": False, "max_new_tokens": 8}
    expected = alone["all"].generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, adapter_ids=["all"]), expected)


def test_sampling_repeats_with_the_generator_of_torch(models, served):
    (alone, _), (model, _), inputs = models, served, prompts(1)
    options = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3}
    torch.manual_seed(3)
    expected = alone["mixed"].generate(**inputs, **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**inputs, **options, adapter_ids=["mixed"]), expected)


def test_logits_by_names_slots_and_routing(models, served):
    (alone, _), (model, bank), inputs = models, served, prompts()
    with torch.no_grad():
        by_name = model(**inputs, adapter_ids=BATCH).logits
        for i, name in enumerate(BATCH):
            expected = alone[name](**row(inputs, i)).logits[0]
            torch.testing.assert_close(by_name[i], expected, atol=1e-4, rtol=1e-4)
        with bank.use(BATCH) as ids:
            assert torch.equal(model(**inputs, adapter_ids=ids).logits, by_name)
            routing = fastlora.route(ids[:, None].expand(-1, 6).reshape(-1), bank.slots)
            assert torch.equal(model(**inputs, adapter_ids=routing).logits, by_name)
            embeddings = model.get_input_embeddings()(inputs["input_ids"])
            given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
            assert torch.equal(model(**given, adapter_ids=ids).logits, by_name)
            assert torch.equal(
                model(inputs["input_ids"], inputs["attention_mask"], adapter_ids=ids).logits,
                by_name,
            )


def test_without_adapters_it_computes_what_the_model_did(models, served):
    (alone, _), (model, bank), inputs = models, served, prompts()
    with torch.no_grad():
        expected = alone[None](**inputs).logits
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs, adapter_ids=[None] * len(BATCH)).logits, expected)
    tokens = alone[None].generate(**inputs, do_sample=False, max_new_tokens=4)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=4), tokens)
    assert bank.resident == {}


def test_the_kernels_compute_the_same_logits(models, served, device, monkeypatch):
    (alone, folder), _, inputs = models, served, prompts(length=2)
    model = copy.deepcopy(alone[None]).to(device)
    bank = AdapterBank(model, 3, 8, target_modules=["q_proj", "down_proj"])
    for seed, name in enumerate(("one", "two")):
        options = {"r": 3 + seed, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
        with_adapter(alone[None], folder / name, options, seed)
        bank.add(name, folder / name)
    for layer in bank.layers:  # what is in a slot beside its adapter must not matter
        bank.layer(layer).lora_A.fill_(float("nan"))
        bank.layer(layer).lora_B.fill_(float("nan"))
    serve(model, bank)
    inputs = {name: value[:3].to(device) for name, value in inputs.items()}
    inputs["attention_mask"].fill_(1)
    ids = ["two", None, "one"]

    def logits():
        with torch.no_grad():
            return model(**inputs, adapter_ids=ids).logits

    eager = logits()  # the fixture forces it
    monkeypatch.delattr(fastlora.reference, "lora_linear_multi")
    fused = []
    # A context of its own, where nothing is forced.
    thread = threading.Thread(target=lambda: fused.append(logits()))
    thread.start()
    thread.join()
    torch.testing.assert_close(fused[0], eager, atol=2e-3, rtol=2e-3)


def test_rows_are_routed_once_for_all_layers_and_steps(served, monkeypatch):
    (model, _), inputs, routed, used = served, prompts(), [], []
    route, linear = serving.route, serving.lora_linear_multi
    monkeypatch.setattr(
        serving, "route", lambda ids, slots: routed.append(len(ids)) or route(ids, slots)
    )
    monkeypatch.setattr(
        serving,
        "lora_linear_multi",
        lambda x, w, stack, routing, **kw: (
            used.append(id(routing)) or linear(x, w, stack, routing, **kw)
        ),
    )
    model.generate(**inputs, do_sample=False, max_new_tokens=5, adapter_ids=BATCH)
    assert routed == [len(BATCH) * 6, len(BATCH)]  # prefill, then one for all decode steps
    assert len(used) == 5 * 14 and len(set(used)) == 2


def test_threads_do_not_meet(models, served):
    (alone, _), (model, bank), inputs = models, served, prompts()
    expected = {
        name: alone[name].generate(**inputs, do_sample=False, max_new_tokens=6) for name in alone
    }
    wrong, barrier = [], threading.Barrier(4)

    def work(name):
        barrier.wait()
        with force("eager"):
            for _ in range(3):
                ids = None if name is None else [name] * len(BATCH)
                got = model.generate(**inputs, do_sample=False, max_new_tokens=6, adapter_ids=ids)
                if not torch.equal(got, expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(entry is None or not entry.holders for entry in bank._books.owner)


class Probe(transformers.LogitsProcessor):
    """Calls something in the middle of a generation."""

    def __init__(self, call):
        self.call = call

    def __call__(self, input_ids, scores):
        self.call()
        return scores


def test_adapters_are_held_while_they_generate_and_let_go_after_errors(served):
    (model, bank), inputs = served, prompts(1)

    def unload():
        with pytest.raises(RuntimeError, match="in use"):
            bank.unload("all")

    model.generate(
        **inputs, max_new_tokens=2, adapter_ids=["all"], logits_processor=[Probe(unload)]
    )
    bank.unload("all")

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(
            **inputs, max_new_tokens=2, adapter_ids=["all"], logits_processor=[Probe(fail)]
        )
    bank.unload("all")
    assert serving._call.get() is None and serving._step.get() is None


def test_a_scale_at_run_time_reaches_the_tokens(models, served):
    (alone, _), (model, bank), inputs = models, served, prompts(1)
    bank.set_scale("all", 0.0)
    with torch.no_grad():
        off = model(**inputs, adapter_ids=["all"]).logits
        torch.testing.assert_close(off, alone[None](**inputs).logits, atol=1e-5, rtol=1e-5)
        bank.set_scale("all", 1.0)
        on = model(**inputs, adapter_ids=["all"]).logits
        torch.testing.assert_close(on, alone["all"](**inputs).logits, atol=1e-4, rtol=1e-4)


def test_more_adapters_than_slots_take_turns(models, served):
    (alone, folder), _, inputs = models, served, prompts(1)
    model = copy.deepcopy(alone[None])
    bank = AdapterBank(model, slots=1, max_rank=8)
    for name in ADAPTERS:
        bank.add(name, folder / name, lazy=True)
    serve(model, bank)
    for name in [*ADAPTERS, None, *ADAPTERS]:
        got = model.generate(**inputs, do_sample=False, max_new_tokens=4, adapter_ids=[name])
        expected = alone[name].generate(**inputs, do_sample=False, max_new_tokens=4)
        assert torch.equal(got, expected)
    assert bank.stats().evictions == 5


def test_gpt2_with_its_transposed_linears(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=2,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    base = transformers.GPT2LMHeadModel(config).eval()
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_alpha": 6}
    alone = {
        name: with_adapter(base, tmp_path / name, options | {"r": r}, r)
        for name, r in (("one", 2), ("two", 5))
    }
    model = copy.deepcopy(base)
    bank = AdapterBank(model, 2, 8, target_modules=["c_attn", "c_fc"])
    for name in alone:
        bank.add(name, tmp_path / name)
    inputs = {k: v[:3] % 64 for k, v in prompts().items()}
    names = ["two", None, "one"]
    with force("eager"):
        mixed = serve(model, bank).generate(
            **inputs, do_sample=False, max_new_tokens=8, adapter_ids=names
        )
    for i, name in enumerate(names):
        reference = alone.get(name, base)
        expected = reference.generate(**row(inputs, i), do_sample=False, max_new_tokens=8)
        assert torch.equal(mixed[i : i + 1], expected)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids=None, inputs_embeds=None):
        return self.last(self.first(inputs_embeds).tanh())


@pytest.mark.no_poison
def test_compiled_it_gives_the_same():
    model = Toy().eval()
    bank = AdapterBank(model, 2, 2)
    for name in ("one", "two"):
        shapes = {f"{layer}.lora_{part}": s for layer in ("first", "last") for part, s in
                  (("A", (2, 4)), ("B", (4, 2)))}  # fmt: skip
        bank.add(name, {k: torch.randn(s) for k, s in shapes.items()}, config={"lora_alpha": 2})
    compiled = torch.compile(serve(model, bank), backend="eager")
    x = torch.randn(3, 2, 4)
    with torch.no_grad(), force("eager"):
        for ids in (["one", None, "two"], None, ["two", "two", None], ["one"] * 3):
            expected = model(inputs_embeds=x, adapter_ids=ids)
            torch.testing.assert_close(compiled(inputs_embeds=x, adapter_ids=ids), expected)


def test_unserve_gives_back_what_was_on_the_instance():
    model = llama().eval()
    forward = functools.partial(type(model).forward, model)
    model.forward = forward
    serve(model, AdapterBank(model, 2, 4))
    assert model.forward is not forward
    unserve(model)
    assert vars(model)["forward"] is forward


def test_unserve_gives_the_model_back(served):
    model, bank = served
    with pytest.raises(ValueError, match="served already"):
        serve(model, bank)
    with pytest.raises(TypeError, match="unserve it first"):
        copy.deepcopy(model)
    assert model.state_dict().keys() == llama().state_dict().keys()
    assert unserve(model) is model
    for module in model.modules():
        assert not {"forward", "generate", serving._MARK} & set(vars(module))
    copy.deepcopy(model)
    with pytest.raises(ValueError, match="model is not served"):
        unserve(model)
    with pytest.raises(ValueError, match="adapter_ids"):  # unknown to transformers again
        model.generate(**prompts(1), adapter_ids=["all"])
    serve(model, bank)


def test_wrong_adapter_ids(served):
    (model, bank), inputs = served, prompts(2)
    for error, message, ids in (
        (ValueError, "one entry for each of the 2 sequences, got 1", ["all"]),
        (ValueError, "one entry for each of the 2 sequences, got 4", ["all"] * 4),
        (KeyError, "no adapter 'none'", ["all", "none"]),
        (TypeError, "must be a list of names, got a string", "al"),
        (ValueError, "must be from -1 to 2, got 7", torch.tensor([0, 7])),
    ):
        with pytest.raises(error, match=message):
            model.generate(**inputs, max_new_tokens=2, adapter_ids=ids)
        with pytest.raises(error, match=message):
            model(**inputs, adapter_ids=ids)
    with pytest.raises(TypeError, match="must be names or slots, got a Routing"):
        model.generate(**inputs, adapter_ids=fastlora.route(torch.tensor([0, 1]), 3))
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        model(adapter_ids=["all"])
    model.train()
    with pytest.raises(ValueError, match="eval mode"):
        model(**inputs, adapter_ids=["all", None])
    assert all(entry is None or not entry.holders for entry in bank._books.owner)


def test_a_layer_whose_rows_cannot_be_told_apart_is_an_error():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.some = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, input_ids=None, inputs_embeds=None, pick=False):
            x = self.flat(inputs_embeds.reshape(-1, 4))  # rows in the order of the batch
            return self.some(x[:5]) if pick else x

    model = Experts().eval()
    bank = AdapterBank(model, 1, 2)
    pairs = {f"{n}.lora_{p}": torch.randn(s) for n in ("flat", "some") for p, s in
             (("A", (2, 4)), ("B", (4, 2)))}  # fmt: skip
    bank.add("mine", pairs, config={"lora_alpha": 2})
    serve(model, bank)
    x = torch.randn(2, 3, 4)
    with force("eager"):
        y = model(inputs_embeds=x, adapter_ids=["mine", None]).view(2, 3, 4)
        delta = x[0] @ pairs["flat.lora_A"].t() @ pairs["flat.lora_B"].t()
        frozen = model(inputs_embeds=x).view(2, 3, 4)
        torch.testing.assert_close(y[0], frozen[0] + delta)
        torch.testing.assert_close(y[1], frozen[1])
        with pytest.raises(ValueError, match=r"some got \(5, 4\).*cannot be told apart"):
            model(inputs_embeds=x, adapter_ids=["mine", None], pick=True)


def test_the_example(capsys):
    path = Path(__file__).parents[1] / "examples" / "serve_many_adapters.py"
    main = runpy.run_path(str(path))["main"]
    with force("eager"):
        code = main(["--adapters", "5", "--new-tokens", "4", "--hidden", "32", "--device", "cpu"])
    output = capsys.readouterr().out
    assert code == 0, output
    assert "6 of 6 requests have the tokens of their adapter alone" in output
    assert "device: CPU" in output


def test_models_that_do_not_go_with_the_bank(served):
    model, bank = served
    unserve(model)
    shapes = {"model.layers.0.self_attn.q_proj": (32, 33)}
    with pytest.raises(ValueError, match=r"q_proj must be .*=\(32, 33\).* got \(32, 32\)"):
        serve(model, AdapterBank(shapes, 1, 4))
    with pytest.raises(TypeError, match=r"has no module lm_head.x"):
        serve(model, AdapterBank({"lm_head.x": (4, 4)}, 1, 4))
    with pytest.raises(TypeError, match=r"norm cannot be served: it must be a torch.nn.Linear"):
        serve(model, AdapterBank({"model.norm": (4, 4)}, 1, 4))
    with pytest.raises(ValueError, match=r"the bank must be torch.float32.* got torch.float16"):
        serve(model, AdapterBank(model, 1, 4, dtype=torch.float16))
    with pytest.raises(TypeError, match="bank must be an AdapterBank"):
        serve(model, {})
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        serve("gpt2", bank)
    assert "forward" not in vars(model)  # nothing was changed on the way to an error
    assert "forward" not in vars(model.model.layers[0].self_attn.q_proj)


def test_the_documentation_runs():
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    with force("eager"):
        for block in blocks:
            exec(block, names)
    assert [pair[0].grad is not None for pair in names["adapters"]] == [True, True]
    stats = names["bank"].stats()
    assert stats.loads == 2 and stats.hits > 4
