"""Mixed adapters under tensor parallelism: two gloo processes against one, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed as dist
from launch_ranks import HERE, RANKS, launch
from torch import nn

import fastlora
from fastlora.distributed import average_gradients, shard_adapter, shard_linears

EXAMPLE = HERE.parent / "examples" / "serve_tensor_parallel.py"


class Toy(nn.Module):
    def __init__(self, hidden=12):
        super().__init__()
        self.up = nn.Linear(8, hidden)
        self.down = nn.Linear(hidden, 8)
        self.head = nn.Linear(8, 6)

    def forward(self, inputs_embeds):
        return self.head(self.down(self.up(inputs_embeds).relu()))


def made(seed=0, **options):
    torch.manual_seed(seed)
    return Toy(**options).eval().requires_grad_(False)


def adapter(hidden=12):
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "up.lora_A": (2, 8),
        "up.lora_B": (hidden, 2),
        "down.lora_A": (2, hidden),
        "down.lora_B": (8, 2),
        "head.lora_A": (2, 8),
        "head.lora_B": (6, 2),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def on_rank(monkeypatch):
    """Let this process be a rank of two, as far as cutting goes."""

    def be(rank, ranks=2):
        monkeypatch.setattr(dist, "get_rank", lambda group=None: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: ranks)

    be(0)
    return be


def served(rank_of, rank, reduced, monkeypatch):
    """A rank's model with its bank; what it would all-reduce is put into ``reduced`` instead."""
    rank_of(rank)
    model = shard_linears(made(), ["up"], ["down"])
    bank = fastlora.AdapterBank(model, slots=2, max_rank=2)
    bank.add("mine", shard_adapter(adapter(), ["up"], ["down"]), config={"lora_alpha": 4})
    monkeypatch.setattr(dist, "all_reduce", lambda y, group=None: reduced.append(y.clone()))
    return fastlora.serve(model, bank)


def test_parts_of_the_ranks_sum_to_the_whole_layer(on_rank, monkeypatch):
    x, names = torch.randn(3, 5, 8), ["mine", None, "mine"]
    whole = made()
    bank = fastlora.AdapterBank(whole, slots=2, max_rank=2)
    bank.add("mine", adapter(), config={"lora_alpha": 4})
    fastlora.serve(whole, bank)
    outputs = []
    whole.down.register_forward_hook(lambda module, args, y: outputs.append(y))
    whole(inputs_embeds=x, adapter_ids=names)
    parts = []
    for rank in range(2):
        model = served(on_rank, rank, parts, monkeypatch)
        assert model.up.weight.shape == (6, 8) and model.down.weight.shape == (8, 6)
        assert (model.up.out_features, model.down.in_features) == (6, 6)
        assert model.head.weight.shape == (6, 8)  # named by neither: whole
        model(inputs_embeds=x, adapter_ids=names)
    assert len(parts) == 2 and not torch.allclose(parts[0], outputs[0])
    # Biases are there: down's on one rank alone, up's cut.
    torch.testing.assert_close(sum(parts), outputs[0])


def test_an_adapter_is_cut_as_its_linears_are(on_rank):
    tensors = {f"base_model.model.{name}.weight": t for name, t in adapter().items()}
    on_rank(1)
    cut = shard_adapter(tensors, ["up"], ["down"])
    prefix = "base_model.model."
    assert cut.keys() == tensors.keys() and all(t.is_contiguous() for t in cut.values())
    assert torch.equal(cut[f"{prefix}up.lora_B.weight"], adapter()["up.lora_B"][6:])
    assert torch.equal(cut[f"{prefix}down.lora_A.weight"], adapter()["down.lora_A"][:, 6:])
    for name in ("up.lora_A", "down.lora_B", "head.lora_A", "head.lora_B"):
        assert torch.equal(cut[f"{prefix}{name}.weight"], adapter()[name])


def test_linears_are_cut_once_and_by_ranks_of_the_group(on_rank):
    model = shard_linears(made(), ["up"], ["down"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="up has been cut by shard_linears already"):
        shard_linears(model, ["up"], ["down"])
    torch.testing.assert_close(model.state_dict(), before)
    on_rank(-1, -1)  # as torch.distributed says of a group that this rank is not in
    for call in (
        lambda: shard_linears(made(), ["up"], ["down"]),
        lambda: shard_adapter(adapter(), ["up"], ["down"]),
        lambda: average_gradients([nn.Parameter(torch.ones(2))]),
    ):
        with pytest.raises(ValueError, match="group must have this rank as a member"):
            call()


def test_sparse_gradients_are_not_averaged(on_rank):
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2).to_sparse()
    with pytest.raises(TypeError, match="gradients must be dense"):
        average_gradients([parameter])


@pytest.mark.parametrize(
    ("colwise", "rowwise", "kind", "words"),
    [
        (["up", "gate"], ["down"], ValueError, r"colwise and rowwise must name.*\['gate'\]"),
        (["up"], ["up"], ValueError, "must not share a linear, both name up"),
        ("up", [], TypeError, "colwise must be an iterable of names, got 'up'"),
        (["up"], [""], TypeError, "rowwise must hold non-empty names, got ''"),
        (["up"], None, TypeError, "rowwise must be an iterable of names, got None"),
    ],
)
def test_names_that_cannot_be_cut_are_refused(on_rank, colwise, rowwise, kind, words):
    model, before = made(), made().state_dict()
    with pytest.raises(kind, match=words):
        shard_linears(model, colwise, rowwise)
    torch.testing.assert_close(model.state_dict(), before)


def test_sizes_that_the_ranks_do_not_divide_are_refused(on_rank):
    model, before = made(hidden=9), made(hidden=9).state_dict()
    with pytest.raises(ValueError, match=r"dimension 1 of down must be divisible by the 2 ranks"):
        shard_linears(model, ["head"], ["down"])
    torch.testing.assert_close(model.state_dict(), before)  # head is whole still
    with pytest.raises(ValueError, match=r"dimension 0 of up\.lora_B .* got 9"):
        shard_adapter(adapter(hidden=9), ["up"], [])


def test_other_linears_are_refused(on_rank):
    class Other(nn.Linear):
        pass

    model = made()
    model.up = Other(8, 12)
    with pytest.raises(TypeError, match=r"up must be a plain torch\.nn\.Linear.*Other"):
        shard_linears(model, ["up"], ["down"])
    bank = fastlora.AdapterBank(model := made(), slots=1, max_rank=2)
    fastlora.serve(model, bank)
    with pytest.raises(TypeError, match=r"up must be a plain.*another forward"):
        shard_linears(model, ["up"], ["down"])


@pytest.mark.parametrize(
    ("tensors", "kind", "words"),
    [
        ({"up.lora_magnitude_vector": torch.ones(3)}, ValueError, "got 'up.lora_magnitude_vector'"),
        ({"lora_A": torch.ones(2, 2)}, ValueError, "got 'lora_A'"),
        ({"up.lora_A": [1.0]}, TypeError, r"up\.lora_A must be a Tensor, got list"),
        ({"up.lora_B": torch.ones(2, 2, 2)}, ValueError, r"must be a matrix, got \(2, 2, 2\)"),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(on_rank, tensors, kind, words):
    with pytest.raises(kind, match=words):
        shard_adapter(tensors, ["up"], ["down"])


def test_a_cut_linear_does_not_train(on_rank):
    model = shard_linears(made(), ["up"], ["down"])
    assert not any(p.requires_grad for p in (model.up.weight, model.down.weight, model.down.bias))
    with pytest.raises(RuntimeError, match=r"serves only: use torch\.no_grad"):
        model(torch.randn(2, 8, requires_grad=True))


def test_example_equals_one_process(tmp_path):
    figures = tmp_path / "figures.json"
    sizes = ["--rows", 9, "--adapters", 3, "--prompt", 4, "--steps", 3]
    arguments = ["--cpu", "--check", *sizes, "--json", figures]
    output = launch([EXAMPLE, *arguments], tmp_path, interpret=False)[0]
    assert "equal to one process" in output
    data = json.loads(figures.read_text(encoding="utf-8"))
    assert data["equal"] is True and data["ranks"] == RANKS
    assert data["largest_relative_error"] < data["tolerance"] < data["least_effect_of_an_adapter"]
    assert data["distinct_adapters_of_a_batch"] == 3
    assert data["tokens_per_second"] > 0 and data["one_process"]["tokens_per_second"] > 0
    assert len(data["peak_mib"]) == RANKS
    assert all(0 < share < 1 for share in data["collectives_share"])
