"""What two processes compute against one. test_distributed.py runs it with gloo on the CPU.

On two GPUs with NCCL: ``torchrun --nproc-per-node 2 tests/distributed_checks.py FOLDER --nccl``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import inspect
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import reference
from fastlora.distributed import (
    ColwiseLoRA,
    RowwiseLoRA,
    average_gradients,
    shard_adapter,
    shard_linears,
)

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


def ddp(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)


# DistributedDataParallel


def ddp_equals_one_process(folder):
    batches = [my_rows(batch) for batch in make_batches()]
    check_same(train(ddp(make_model()), batches), one_process(), average=True)


def ddp_starts_from_the_values_of_rank_0(folder):
    model = ddp(make_model(seed=dist.get_rank()))
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter, trainable(make_model())[name])


def ddp_accumulates_with_no_sync(folder):
    model = ddp(make_model())

    def backward(batch):
        first, second = batch.chunk(2)
        with model.no_sync():
            (loss_of(model, first) / 2).backward()
        (loss_of(model, second) / 2).backward()

    batches = [my_rows(batch) for batch in make_batches()]
    check_same(train(model, batches, backward), one_process(), average=True)


def ddp_saves_and_loads_adapters_without_its_prefix(folder):
    model = ddp(make_model())
    if dist.get_rank() == 0:
        fastlora.save_adapter(model, folder)
    dist.barrier()
    other = make_model(seed=5)
    fastlora.load_adapter(other, folder)
    fastlora.load_adapter(ddp(make_model(seed=6)), folder)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(trainable(other)[name], parameter)


def ddp_through_accelerate(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device_type() == "cpu")
    assert accelerator.num_processes == 2
    model = make_model()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    for batch in make_batches():
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, my_rows(batch)))
        optimizer.step()
    expected = one_process()[2]
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.detach(), expected[name])


def ddp_through_the_trainer(folder):
    from transformers import Trainer, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def forward(self, x):
            return {"loss": loss_of(self.model, x)}

    class InOrder(Trainer):
        def get_train_dataloader(self):
            rows = torch.utils.data.DataLoader(self.train_dataset, self._train_batch_size)
            return self.accelerator.prepare(rows)

    module = WithLoss()
    optimizer = torch.optim.AdamW(trainable(module.model).values(), lr=0.05)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=device_type() == "cpu",
        disable_tqdm=True,
    )
    trainer = InOrder(
        module,
        arguments,
        train_dataset=[{"x": row} for batch in make_batches() for row in batch],
        optimizers=(optimizer, constant),
    )
    assert trainer.train().global_step == STEPS
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    expected = one_process()[2]
    for name, parameter in trainable(module.model).items():
        torch.testing.assert_close(parameter.detach(), expected[name])


# FSDP2


def shard(model, **options):
    for block in model:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in (*model, model):
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            # torch 2.8 asks gloo for a mean, and takes the sum that it gives for one.
            module.set_force_sum_reduction_for_comms(True)
    return model


def fsdp2_equals_one_process(folder):
    model = shard(make_model())
    assert all(isinstance(p, DTensor) for p in model.parameters())
    batches = [my_rows(batch) for batch in make_batches()]
    check_same(train(model, batches), one_process(), average=True)


def fsdp2_shows_plain_tensors_in_forward(folder):
    model, seen = shard(make_model(dtype=torch.float32)), []

    def record(module, args):
        tensors = (args[0], module.weight, module.lora_A, module.lora_B)
        seen.append(fastlora.explain(*tensors, bias=module.bias).path)

    for block in model:
        block.up.register_forward_pre_hook(record)
    with torch.no_grad():
        expected = make_model(dtype=torch.float32)(make_batches(torch.float32)[0][:1, :2])
        got = model(make_batches(torch.float32)[0][:1, :2])
    assert seen == [kernels_path()] * 2, seen
    torch.testing.assert_close(got, expected)


def fsdp2_mixed_precision(folder):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(make_model(dtype=torch.float32), mp_policy=policy)
    batches = make_batches(torch.float32)
    alone = make_model(dtype=torch.float32)

    def bf16_backward(batch):
        # What the policy does, by hand: bf16 copies compute, fp32 parameters get the mean gradient.
        for rows in batch.chunk(2):
            copies = {n: p.to(torch.bfloat16) for n, p in alone.named_parameters()}
            y = torch.func.functional_call(alone, copies, (rows.to(torch.bfloat16),))
            ((y - rows.flip(-1)).square().mean() / 2).backward()

    with fastlora.dispatch.force("eager"):
        expected = train(alone, batches, bf16_backward)[1]
        loss_of(model, my_rows(batches[0])).backward()
    for name, parameter in trainable(model).items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        # bf16 gradients of the two halves, summed in fp32 by both.
        torch.testing.assert_close(whole(parameter.grad), expected[name], rtol=1e-2, atol=1e-4)


def fsdp2_float32_adapters_beside_a_bfloat16_base(folder):
    options = {"dtype": torch.bfloat16, "adapter_dtype": torch.float32}
    batches = make_batches(torch.bfloat16)
    with fastlora.dispatch.force("eager"):
        alone = make_model(**options)
        expected = train(alone, batches)[1]
        model = shard(make_model(**options))
        loss_of(model, my_rows(batches[0])).backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(whole(parameter.grad), expected[name], rtol=2e-2, atol=1e-4)


def fsdp2_with_replicated_adapters(folder):
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        return  # an older torch
    model = make_model()
    adapters = set(trainable(model).values())
    shard(model, ignored_params=adapters)
    assert not any(isinstance(p, DTensor) for p in trainable(model).values())
    assert isinstance(model[0].up.weight, DTensor)
    batches = [my_rows(batch) for batch in make_batches()]
    got = train(model, batches, after=lambda: average_gradients(model.parameters()))
    check_same(got, one_process(), average=True)


def average_gradients_counts_a_missing_gradient_as_zero(folder):
    weight = nn.Parameter(torch.ones(3))
    if dist.get_rank() == 1:
        weight.grad = torch.tensor([2.0, 4.0, 6.0])
    average_gradients([weight, nn.Parameter(torch.ones(2), requires_grad=False)])
    assert weight.grad.tolist() == [1.0, 2.0, 3.0]
    with raises(TypeError, "DTensor"):
        average_gradients(shard(make_model()).parameters())


def fsdp2_state_dicts(folder):
    alone, model = make_model(), shard(make_model())
    full = get_model_state_dict(model, options=FULL)
    assert full.keys() == alone.state_dict().keys()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(full[name], value)
    other = shard(make_model(seed=3))
    set_model_state_dict(other, get_model_state_dict(model))  # sharded
    third = shard(make_model(seed=4))
    set_model_state_dict(third, full, options=FULL)
    for loaded in (other, third):
        for name, value in get_model_state_dict(loaded, options=FULL).items():
            torch.testing.assert_close(value, alone.state_dict()[name])


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


def fsdp2_adapter_files(folder):
    check_adapter_files(shard(make_model()), make_model(), shard(make_model(seed=8)), folder)


def a_failed_save_hangs_no_rank(folder):
    model = shard(make_model())
    file = folder.with_suffix(".file")
    if dist.get_rank() == 0:
        file.write_text("in the way")
    dist.barrier()
    with raises(OSError) if dist.get_rank() == 0 else contextlib.nullcontext():
        fastlora.save_adapter(model, file)


def fsdp2_clips_gradients(folder):
    alone, model, batch = make_model(), shard(make_model()), make_batches()[0]
    loss_of(alone, batch).backward()
    loss_of(model, my_rows(batch)).backward()
    expected = nn.utils.clip_grad_norm_(trainable(alone).values(), 0.01)
    got = nn.utils.clip_grad_norm_(trainable(model).values(), 0.01)
    torch.testing.assert_close(whole(got), expected)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(whole(parameter.grad), trainable(alone)[name].grad)


def fsdp2_layer_called_past_its_wrapper(folder):
    model, batch = shard(make_model()), make_batches()[0]
    with raises(TypeError, "DTensors are weight, lora_A, lora_B, bias, plain are x"):
        model[0].up(batch)
    with raises(ValueError, "adapt a model before it is sharded"):
        fastlora.inject(shard(nn.Sequential(Block(torch.float64))), ("up",), r=2, lora_alpha=2)


# Tensor parallel

PLAN = {"*.up": ColwiseLoRA(), "*.down": RowwiseLoRA()}


def mesh_of_two():
    return init_device_mesh(device_type(), (2,))


def parallel(model, plan=None):
    return parallelize_module(model, mesh_of_two(), plan or PLAN)


def tp_equals_one_process(folder):
    model = parallel(make_model(seed=0))
    first = model[0]
    assert first.up.weight.to_local().shape == (HIDDEN // 2, WIDTH)
    assert first.down.lora_A.to_local().shape == (RANK_R, HIDDEN // 2)
    assert first.up.lora_A.placements == first.down.lora_B.placements == (Replicate(),)
    check_same(train(model, make_batches()), one_process())
    for parameter in trainable(model).values():
        assert parameter.grad.placements == parameter.placements


def tp_trains_biases_and_base_weights(folder):
    results = []
    for wrap in (lambda model: model, parallel):
        model = wrap(make_model())
        names = ("0.up.weight", "0.up.bias", "1.down.weight", "1.down.bias")
        for name in names:
            model.get_parameter(name).requires_grad_()
        loss_of(model, make_batches()[0]).backward()
        results.append({name: whole(model.get_parameter(name).grad) for name in names})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected)


def tp_gives_the_gradient_of_x_on_every_rank(folder):
    x = make_batches()[0].requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(make_model(), x), x)
    (got,) = torch.autograd.grad(loss_of(parallel(make_model()), x), x)
    torch.testing.assert_close(got, expected)


def tp_with_a_sharded_sequence(folder):
    plan = {
        "*.up": ColwiseLoRA(input_layouts=Shard(1)),
        "*.down": RowwiseLoRA(output_layouts=Shard(1)),
    }
    alone, model = make_model(), parallel(make_model(), plan)
    batch = make_batches()[0]
    for bias in (alone[0].down.bias, model[0].down.bias):
        bias.requires_grad_()
    x = batch.clone().requires_grad_()
    mine = batch.chunk(2, dim=1)[dist.get_rank()].clone().requires_grad_()
    y, y_mine = alone(x), model(mine)
    torch.testing.assert_close(y_mine, y.chunk(2, dim=1)[dist.get_rank()])
    y.square().sum().backward()
    y_mine.square().sum().backward()
    torch.testing.assert_close(mine.grad, x.grad.chunk(2, dim=1)[dist.get_rank()])
    for name, parameter in trainable(alone).items():
        grad = trainable(model)[name].grad
        assert grad.placements == trainable(model)[name].placements, name
        torch.testing.assert_close(whole(grad), parameter.grad)


def tp_with_dtensors_in_and_out(folder):
    mesh, x = mesh_of_two(), make_batches()[0]
    plan = {
        "0.up": ColwiseLoRA(use_local_output=False),
        "0.down": RowwiseLoRA(use_local_output=False),
        "1.up": ColwiseLoRA(output_layouts=Replicate()),
    }
    alone, model = make_model(), parallelize_module(make_model(), mesh, plan)
    up = model[0].up(distribute_tensor(x, mesh, (Shard(0),)))
    assert isinstance(up, DTensor) and up.placements == (Shard(2),)
    torch.testing.assert_close(whole(up), alone[0].up(x))
    down = model[0].down(up)
    assert isinstance(down, DTensor) and down.placements == (Replicate(),)
    torch.testing.assert_close(whole(down), alone[0].down(alone[0].up(x)))
    torch.testing.assert_close(model[1].up(x), alone[1].up(x))


def tp_column_dropout_is_that_of_one_process(folder):
    results = []
    for wrap in (
        lambda model: model,
        lambda m: parallel(m, {"*.up": ColwiseLoRA(output_layouts=Replicate())}),
    ):
        model = wrap(make_model(dropout=0.4))
        for block in model:
            block.down.lora_dropout = 0.0
        torch.manual_seed(11)
        loss_of(model, make_batches()[0]).backward()
        results.append({n: whole(p.grad) for n, p in trainable(model).items()})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected)


def tp_row_dropout_has_independent_masks(folder):
    p, world = 0.4, dist.get_world_size()
    layer = make_model(dropout=p)[0].down
    x = torch.randn(5, HIDDEN, dtype=torch.float64, requires_grad=True)
    model = parallelize_module(
        nn.Sequential(copy.deepcopy(layer)), mesh_of_two(), {"0": RowwiseLoRA()}
    )
    mine = x.detach().chunk(world, dim=-1)[dist.get_rank()].clone().requires_grad_()
    torch.manual_seed(11)
    y = model(mine)
    # The masks, read off each rank's own seed; then the formula in one process.
    torch.manual_seed(11)
    seed = reference.draw_seed(x.device) ^ fastlora.distributed._rank_salt(dist.get_rank())
    keep = reference.dropout_keep_mask(seed, 5, HIDDEN // world, p, x.device).to(x.dtype)
    masks = [torch.empty_like(keep) for _ in range(world)]
    dist.all_gather(masks, keep)
    assert not torch.equal(masks[0], masks[1])
    dropped = x * torch.cat(masks, dim=-1) / (1 - p)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    expected = expected + layer.scaling * dropped @ layer.lora_A.t() @ layer.lora_B.t()
    # p is kept to a multiple of 2**-16.
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y, expected, **close)
    expected.square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(mine.grad, x.grad.chunk(world, dim=-1)[dist.get_rank()], **close)
    for name in ("lora_A", "lora_B"):
        got = whole(getattr(model[0], name).grad)
        torch.testing.assert_close(got, getattr(layer, name).grad, rtol=1e-3, atol=1e-3)


def tp_dropout_survives_checkpointing(folder):
    model, batch = parallel(make_model(dropout=0.4)), make_batches()[0]
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        model.zero_grad()
        loss_of(run, batch).backward()
        grads.append({n: whole(p.grad) for n, p in trainable(model).items()})
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected)


def tp_through_the_kernels(folder):
    results, seen, original = [], [], fastlora.distributed.lora_linear

    def recorded(x, weight, lora_A, lora_B, **options):
        path = fastlora.explain(x, weight, lora_A, lora_B, bias=options["bias"]).path
        seen.append((path, *weight.shape))
        return original(x, weight, lora_A, lora_B, **options)

    fastlora.distributed.lora_linear = recorded
    try:
        for wrap in (lambda model: model, parallel):
            model = wrap(make_model(dtype=torch.float32, blocks=1))
            x = make_batches(torch.float32)[0][:1, :4].requires_grad_()
            loss_of(model, x).backward()
            results.append([x.grad] + [whole(p.grad) for p in trainable(model).values()])
    finally:
        fastlora.distributed.lora_linear = original
    path = kernels_path()
    assert seen == [(path, HIDDEN // 2, WIDTH), (path, WIDTH, HIDDEN // 2)], seen
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def tp_after_an_unwaited_collective(folder):
    # torch's own styles leave collectives in flight, in forward and in backward, as a subclass.
    def run(wrap):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)))
        fastlora.inject(model, ("0",), r=2, lora_alpha=4)
        nn.init.normal_(model[0].lora_B)
        x = torch.randn(1, 4, 8)
        model, x = wrap(model, x)
        y = model(x)
        y.square().sum().backward()
        return [model[0].lora_A.grad, model[0].lora_B.grad]

    def sequence_parallel(model, x):
        plan = {"1": ColwiseParallel(input_layouts=Shard(1))}
        return parallelize_module(model, mesh_of_two(), plan), x.chunk(2, 1)[dist.get_rank()]

    expected = run(lambda model, x: (model, x))
    got = run(sequence_parallel)
    for mine, full in zip(got, expected, strict=True):
        dist.all_reduce(mine)  # each rank had half of the sequence
        torch.testing.assert_close(mine, full, rtol=1e-4, atol=1e-4)


def tp_state_dict_is_that_of_one_process(folder):
    alone, model = make_model(), parallel(make_model())
    full = get_model_state_dict(model, options=FULL)
    assert full.keys() == alone.state_dict().keys()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(full[name], value)
    other = parallel(make_model(seed=3))
    set_model_state_dict(other, full, options=FULL)
    third = parallel(make_model(seed=4))
    set_model_state_dict(third, get_model_state_dict(model))
    for loaded in (other, third):
        torch.testing.assert_close(loaded(make_batches()[0]), alone(make_batches()[0]))


def tp_adapter_files(folder):
    check_adapter_files(parallel(make_model()), make_model(), parallel(make_model(seed=8)), folder)


def tp_takes_the_values_of_rank_0(folder):
    model = parallel(make_model(seed=dist.get_rank()))
    torch.testing.assert_close(model(make_batches()[0]), make_model()(make_batches()[0]))


def tp_under_fsdp2(folder):
    mesh = init_device_mesh(device_type(), (1, 2), mesh_dim_names=("dp", "tp"))

    def both(model):
        return shard(parallelize_module(model, mesh["tp"], PLAN), mesh=mesh["dp"])

    check_same(train(both(make_model()), make_batches()), one_process())
    check_adapter_files(both(make_model()), make_model(), both(make_model(seed=8)), folder)


def tp_clips_gradients(folder):
    alone, model, batch = make_model(), parallel(make_model()), make_batches()[0]
    for each in (alone, model):
        loss_of(each, batch).backward()
    expected = nn.utils.clip_grad_norm_(trainable(alone).values(), 0.01)
    got = nn.utils.clip_grad_norm_(trainable(model).values(), 0.01)
    torch.testing.assert_close(whole(got), expected)


def tp_copies(folder):
    model = parallel(make_model())
    twin = copy.deepcopy(model)
    assert "ColwiseLoRALinear(in_features=16, out_features=24" in repr(twin)
    torch.testing.assert_close(twin(make_batches()[0]), model(make_batches()[0]))


def tp_names_what_is_wrong(folder):
    with raises(TypeError, "ColwiseLoRA parallelizes a fastlora.LoRALinear, got Linear"):
        parallel(nn.Sequential(nn.Linear(4, 4)), {"0": ColwiseLoRA()})
    with raises(TypeError, "input_layouts", "list"):
        ColwiseLoRA(input_layouts=[Replicate()])
    with raises(ValueError, "output_layouts", "Partial"):
        RowwiseLoRA(output_layouts=Partial())
    odd = nn.Sequential(fastlora.LoRALinear(nn.Linear(4, 5), 2, 2))
    with raises(ValueError, "out_features must be divisible by the 2 ranks", "got 5"):
        parallel(odd, {"0": ColwiseLoRA()})
    with raises(TypeError, "weight is a DTensor already"):
        parallel(shard(make_model()))
    square = init_device_mesh(device_type(), (1, 2), mesh_dim_names=("dp", "tp"))
    with raises((ValueError, RuntimeError), "mesh"):
        parallelize_module(make_model(), square, PLAN)


def mixed_adapters_generate_as_in_one_process(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=1, vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    names = (("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj"))
    targets = names[0] + names[1]
    adapters = []
    for _ in range(2):
        shapes = {n: m.weight.shape for n, m in base.named_modules() if n.endswith(targets)}
        adapters.append({f"{n}.lora_A": torch.randn(4, shape[1]) for n, shape in shapes.items()})
        adapters[-1] |= {f"{n}.lora_B": torch.randn(shape[0], 4) for n, shape in shapes.items()}
    prompts = torch.randint(1, 64, (3, 4))
    outputs = []
    for cut in (False, True):
        model = copy.deepcopy(base)
        if cut:
            shard_linears(model, *names)
        bank = fastlora.AdapterBank(model, slots=2, max_rank=4, target_modules=targets)
        for i, tensors in enumerate(adapters):
            tensors = shard_adapter(tensors, *names) if cut else tensors
            bank.add(str(i), tensors, config={"lora_alpha": 1})
        fastlora.serve(model, bank)
        outputs.append(
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=3,
                do_sample=False, output_logits=True, return_dict_in_generate=True,
                adapter_ids=["0", None, "1"],
            )
        )  # fmt: skip
    alone, cut = outputs
    assert torch.equal(alone.sequences, cut.sequences)
    torch.testing.assert_close(cut.logits, alone.logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        frozen = base(prompts).logits[:, -1]
    changed = (alone.logits[0] - frozen).abs().amax(1) > 1e-2
    assert changed.tolist() == [True, False, True]


def dtensors_in_lora_linear(folder):
    """Right values and gradients where torch can compute them, otherwise an error: never a wrong one."""
    mesh = mesh_of_two()
    torch.manual_seed(0)
    shapes = {"x": (4, 6), "weight": (8, 6), "lora_A": (2, 6), "lora_B": (8, 2), "bias": (8,)}
    values = {n: torch.randn(s, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
    expected = fastlora.lora_linear(**values, scaling=2.0)
    grads = torch.autograd.grad(expected.square().sum(), list(values.values()))
    for layouts in (
        {
            "x": Replicate(),
            "weight": Shard(0),
            "lora_A": Replicate(),
            "lora_B": Shard(0),
            "bias": Shard(0),
        },
        {
            "x": Shard(1),
            "weight": Shard(1),
            "lora_A": Shard(1),
            "lora_B": Replicate(),
            "bias": Replicate(),
        },
        {
            "x": Shard(0),
            "weight": Shard(0),
            "lora_A": Shard(0),
            "lora_B": Shard(0),
            "bias": Shard(0),
        },
    ):
        sharded = {
            n: distribute_tensor(v.detach(), mesh, (layouts[n],)).requires_grad_()
            for n, v in values.items()
        }
        y = fastlora.lora_linear(**sharded, scaling=2.0)
        torch.testing.assert_close(whole(y), expected)
        got = torch.autograd.grad(whole(y).square().sum(), list(sharded.values()))
        for mine, grad in zip(got, grads, strict=True):
            torch.testing.assert_close(whole(mine), grad)
        with raises(ValueError, "dropout_p must be 0", "ColwiseLoRA"):
            fastlora.lora_linear(**sharded, dropout_p=0.5)
        with raises(TypeError, "plain are x", "fully_shard"):
            fastlora.lora_linear(**{**sharded, "x": values["x"]})


CHECKS = (
    ddp_equals_one_process,
    ddp_starts_from_the_values_of_rank_0,
    ddp_accumulates_with_no_sync,
    ddp_saves_and_loads_adapters_without_its_prefix,
    ddp_through_accelerate,
    ddp_through_the_trainer,
    fsdp2_equals_one_process,
    fsdp2_shows_plain_tensors_in_forward,
    fsdp2_mixed_precision,
    fsdp2_float32_adapters_beside_a_bfloat16_base,
    fsdp2_with_replicated_adapters,
    average_gradients_counts_a_missing_gradient_as_zero,
    fsdp2_state_dicts,
    fsdp2_adapter_files,
    a_failed_save_hangs_no_rank,
    fsdp2_clips_gradients,
    fsdp2_layer_called_past_its_wrapper,
    tp_equals_one_process,
    tp_trains_biases_and_base_weights,
    tp_gives_the_gradient_of_x_on_every_rank,
    tp_with_a_sharded_sequence,
    tp_with_dtensors_in_and_out,
    tp_column_dropout_is_that_of_one_process,
    tp_row_dropout_has_independent_masks,
    tp_dropout_survives_checkpointing,
    tp_through_the_kernels,
    tp_after_an_unwaited_collective,
    tp_state_dict_is_that_of_one_process,
    tp_adapter_files,
    tp_takes_the_values_of_rank_0,
    tp_under_fsdp2,
    tp_clips_gradients,
    tp_copies,
    tp_names_what_is_wrong,
    mixed_adapters_generate_as_in_one_process,
    dtensors_in_lora_linear,
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="for the files that checks write; of both ranks")
    parser.add_argument("-k", default="", help="only the checks whose name contains this")
    parser.add_argument("--nccl", action="store_true", help="on GPUs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them. A rank that fails leaves
    # the other waiting, which then fails too instead of hanging.
    limit = datetime.timedelta(seconds=60)
    if args.nccl:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device("cuda")
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=limit)
    else:
        dist.init_process_group("gloo", timeout=limit)
    for check in CHECKS:
        if args.k not in check.__name__:
            continue
        print(check.__name__, flush=True)
        if "fsdp2" in check.__name__ and not FSDP2_RUNS:
            continue
        try:
            check(args.folder / check.__name__)
        except BaseException:
            traceback.print_exc()
            raise SystemExit(f"failed: {check.__name__} on rank {dist.get_rank()}") from None
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
