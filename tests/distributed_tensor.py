"""Tensor parallelism and DTensors, checked on two processes by distributed_checks.py."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from distributed_cases import (
    FULL,
    HIDDEN,
    RANK_R,
    WIDTH,
    check_adapter_files,
    check_same,
    device_type,
    kernels_path,
    loss_of,
    make_batches,
    make_model,
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import reference
from fastlora.distributed import (
    ColwiseLoRA,
    RowwiseLoRA,
    shard_adapter,
    shard_linears,
)

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
    # p is kept to a multiple of 2**-14.
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


def tp_keeps_autocasts_dtype(folder):
    block = parallel(make_model().float())[0]
    with torch.autocast(device_type(), torch.bfloat16):
        y = block.down(block.up(torch.ones(2, 6, 16)))
    assert y.dtype == torch.bfloat16


def tp_refuses_what_needs_plain_weights(folder):
    model = parallel(make_model())
    before = [whole(p).clone() for p in model.parameters()]
    with raises(TypeError, "weight must be a plain nn.Parameter to be merged", "DTensor"):
        fastlora.merge(model, keep="host")
    values = {k: torch.randn(v.shape) for k, v in fastlora.lora_state_dict(make_model()).items()}
    with raises(TypeError, "is sharded: switch_adapter takes plain parameters only"):
        fastlora.switch_adapter(model, values)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(whole(parameter), value)
    fastlora.load_lora_state_dict(model, values)
    for name, value in fastlora.lora_state_dict(model).items():
        torch.testing.assert_close(whole(value), values[name].to(value.dtype))


def tp_names_what_is_wrong(folder):
    merged = fastlora.LoRALinear(nn.Linear(8, 8), r=2, lora_alpha=4).eval()
    merged.merge()
    with raises(ValueError, "RowwiseLoRA needs a layer that is not merged"):
        parallel(nn.Sequential(merged), {"0": RowwiseLoRA()})
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
