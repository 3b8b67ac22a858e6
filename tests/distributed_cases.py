"""What the checks of two processes share: models, batches, a training loop, comparisons."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastlora

WIDTH, HIDDEN, RANK_R, STEPS = 16, 24, 4, 3
# torch 2.6: FSDP2 asks a stream of the CPU for what it lacks.
FSDP2_RUNS = hasattr(torch.cpu.Stream, "record_event")
FULL = StateDictOptions(full_state_dict=True)


def device_type():
    return torch.get_default_device().type


class Block(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        self.up = nn.Linear(WIDTH, HIDDEN, dtype=dtype)
        self.down = nn.Linear(HIDDEN, WIDTH, dtype=dtype)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def make_model(dtype=torch.float64, dropout=0.0, seed=0, blocks=2, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(*(Block(dtype) for _ in range(blocks)))
    fastlora.inject(model, ("up", "down"), r=RANK_R, lora_alpha=8, lora_dropout=dropout, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    return model


def make_batches(dtype=torch.float64, rows=8, steps=STEPS):
    generator = torch.Generator("cpu").manual_seed(1)
    drawn = [torch.randn(rows, 6, WIDTH, generator=generator, device="cpu") for _ in range(steps)]
    return [x.to(torch.get_default_device(), dtype) for x in drawn]


def kernels_path():
    """What plain fp32 tensors take here: fused, in the interpreter, unless Triton is too old."""
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    return fastlora.explain(x, weight, torch.randn(2, 8), torch.randn(4, 2)).path


def my_rows(batch):
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model, batch):
    return (model(batch) - batch.flip(-1)).square().mean()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trainable(model):
    return {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}


def train(model, batches, backward=None, after=lambda: None):
    """Three optimizer steps; give the losses, the first gradients, and the last parameters."""
    backward = backward or (lambda batch: loss_of(model, batch).backward())
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.05)
    losses, first = [], None
    for batch in batches:
        optimizer.zero_grad()
        backward(batch)
        after()
        if first is None:
            first = {n: whole(p.grad).detach().clone() for n, p in parameters.items()}
        optimizer.step()
        with torch.no_grad():
            losses.append(loss_of(model, batch).detach())
    return losses, first, {n: whole(p).detach() for n, p in parameters.items()}


def check_same(got, expected, average=False, **tolerance):
    losses, grads, parameters = got
    if average:  # each process saw its own rows
        losses = [loss.clone() for loss in losses]
        for loss in losses:
            dist.all_reduce(loss.div_(dist.get_world_size()))
    torch.testing.assert_close(losses, expected[0], **tolerance)
    assert grads.keys() == expected[1].keys() and len(grads) == 8
    for name in grads:
        assert expected[1][name].abs().max() > 0, name
        torch.testing.assert_close(grads[name], expected[1][name], **tolerance)
        torch.testing.assert_close(parameters[name], expected[2][name], **tolerance)


def one_process(**options):
    return train(make_model(**options), make_batches(options.get("dtype", torch.float64)))


@contextlib.contextmanager
def raises(kind, *words):
    try:
        yield
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{error} lacks {missing}"
    else:
        raise AssertionError(f"no {kind.__name__}")


def shard(model, **options):
    for block in model:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in (*model, model):
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            # torch 2.8 asks gloo for a mean, and takes the sum that it gives for one.
            module.set_force_sum_reduction_for_comms(True)
    return model


def check_adapter_files(model, alone, fresh, folder):
    """save_adapter gathers, load_adapter shards, and the files are those of one process."""
    fastlora.save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").is_file()  # on every rank, at once
    plain = make_model(seed=7)
    fastlora.load_adapter(plain, folder)
    fastlora.load_adapter(fresh, folder)
    for name, parameter in trainable(alone).items():
        torch.testing.assert_close(trainable(plain)[name], parameter)
        assert isinstance(trainable(fresh)[name], DTensor)
        torch.testing.assert_close(whole(trainable(fresh)[name]), parameter)
