"""Data parallelism, checked on two processes by distributed_checks.py: DDP and FSDP2."""

from __future__ import annotations

import contextlib
import inspect

import torch
import torch.distributed as dist
from distributed_cases import (
    FULL,
    STEPS,
    Block,
    check_adapter_files,
    check_same,
    device_type,
    kernels_path,
    loss_of,
    make_batches,
    make_model,
    my_rows,
    one_process,
    raises,
    shard,
    train,
    trainable,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fastlora
from fastlora.distributed import (
    average_gradients,
)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)


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
