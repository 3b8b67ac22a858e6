"""What people wrap around a layer: torch.func, saved-tensor hooks, scalers, threads, processes, errors."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastlora
from fastlora import dispatch

fused = pytest.importorskip("fastlora.autograd", reason="needs Triton")

F32, F16 = torch.float32, torch.float16
ADAPTERS = ("lora_A", "lora_B")


def layer_of(device, p=0.0, dtype=F32):
    torch.manual_seed(0)
    layer = fastlora.LoRALinear(nn.Linear(24, 16).to(device, dtype), 4, 8, p)
    nn.init.normal_(layer.lora_B)
    return layer


def grads_of(layer, x, run):
    """``y`` and the gradients of a step in which ``run`` calls the layer."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(1)
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad]


def assert_same(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.fixture
def x(device):
    return torch.randn(6, 24, device=device)


def test_func_grad(oracle, device):
    case = oracle.make_case(6, 24, 16, 4, F32, device)
    names = ("x", "lora_A", "lora_B")

    def loss(*wanted):
        tensors = {**case.tensors, **dict(zip(names, wanted, strict=True))}
        return (fastlora.lora_linear(**tensors, scaling=1.5) * case.dy).sum()

    wanted = [case.tensors[n] for n in names]
    got = grad(loss, argnums=(0, 1, 2))(*wanted)
    expected = oracle.fused(dataclasses.replace(case, wanted=names))
    assert_same(got, [expected[n] for n in names])
    # A gradient that goes into a loss again is a second derivative.
    with pytest.raises(RuntimeError, match="no double backward"):
        grad(lambda a: grad(loss)(wanted[0], a, wanted[2]).square().sum())(wanted[1])


@pytest.mark.parametrize("recording", [True, False])
def test_func_vjp(oracle, device, recording):
    case = oracle.make_case(6, 24, 16, 4, F32, device, wanted=ADAPTERS)

    def call(lora_A, lora_B):
        tensors = {**case.tensors, "lora_A": lora_A, "lora_B": lora_B}
        return fastlora.lora_linear(**tensors, scaling=1.5)

    y, pull = vjp(call, *(case.tensors[n] for n in ADAPTERS))
    with torch.set_grad_enabled(recording):
        got = pull(case.dy)
    expected = oracle.fused(case)
    assert_same([y, *got], [expected[n] for n in ("y", *ADAPTERS)])


def test_functional_call(device, x):
    layer = layer_of(device, 0.5)
    torch.manual_seed(1)
    layer(
        x
    ).square().sum().backward()  # without x's gradient, which other kernels would make beside them
    expected = [layer.lora_A.grad, layer.lora_B.grad]
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(parameters):
        torch.manual_seed(1)
        return functional_call(layer, parameters, (x,)).square().sum()

    got = grad(loss)(parameters)
    assert_same([got["lora_A"], got["lora_B"]], expected)


def test_vmap_over_adapters_is_an_error_that_names_the_way_out(oracle, device):
    tensors = oracle.make_case(6, 24, 16, 4, F32, device, bias=False).tensors
    a, b = torch.randn(3, 4, 24, device=device), torch.randn(3, 16, 4, device=device)

    def call(a, b):
        return fastlora.lora_linear(tensors["x"], tensors["weight"], a, b)

    with pytest.raises(RuntimeError, match=r"no vmap rule.*force\('eager'\)"):
        vmap(call)(a, b)
    with dispatch.force("eager"):
        together = vmap(call)(a, b)
    for i in range(3):
        torch.testing.assert_close(together[i], call(a[i], b[i]), rtol=1e-4, atol=1e-4)


def test_forward_mode_is_an_error(device, x):
    layer = layer_of(device)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        jvp(layer, (x,), (x,))
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="no forward-mode derivative"),
    ):
        layer(forward_ad.make_dual(x, x))


def test_selective_checkpoint_replays_the_mask(device, x):
    layer = layer_of(device, 0.5)

    def policy(ctx, op, *args, **kwargs):
        keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def run(x):
        return checkpoint(
            lambda x: layer(x).tanh(),
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )

    assert_same(grads_of(layer, x, run), grads_of(layer, x, lambda x: layer(x).tanh()))


@pytest.mark.parametrize("kind", ["offload", "round-trip"])
def test_saved_tensors_may_come_back_as_copies(device, x, kind):
    layer = layer_of(device, 0.5)

    def run(x):
        hooks = (
            torch.autograd.graph.save_on_cpu()
            if kind == "offload"
            else torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone())
        )
        with hooks:
            return layer(x)

    assert_same(grads_of(layer, x, run), grads_of(layer, x, layer))


def test_tensor_hooks(device, x):
    layer = layer_of(device)
    expected = grads_of(layer, x, layer)
    seen = []

    def run(x):
        y = layer(x)
        y.register_hook(lambda dy: dy * 2)
        return y

    handles = [
        layer.lora_A.register_hook(lambda g: seen.append("hook")),
        layer.lora_B.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated")),
        layer.register_full_backward_hook(lambda *_: seen.append("module")),
    ]
    got = grads_of(layer, x, run)
    assert sorted(seen) == ["accumulated", "hook", "module"]
    for handle in handles:
        handle.remove()
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("fits", [True, False], ids=["fits", "overflows"])
def test_fp16_autocast_with_a_grad_scaler(device, x, fits):
    layer = layer_of(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**4 if fits else 2.0**30)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    with torch.autocast(device, dtype=F16):
        loss = layer(x).float().square().mean()
    scaler.scale(loss).backward()
    assert layer.lora_B.grad.dtype == F32
    scaler.step(optimizer)
    scaler.update()
    if fits:
        plain = grad(lambda p: functional_call(layer, p, (x,)).square().mean())(before)
        for name in ADAPTERS:
            step = layer.get_parameter(name).detach() - before[name]
            torch.testing.assert_close(step, -0.1 * plain[name], rtol=0.01, atol=2e-3)
            assert step.abs().max() > 0.01
    else:  # the step is skipped, the scale goes down
        assert all(torch.equal(layer.get_parameter(n), before[n]) for n in ADAPTERS)
        assert scaler.get_scale() < 2.0**30


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_of_each_argument_reach_what_eager_loses(oracle, device, value):
    for name in ("x", "weight", "lora_A", "lora_B", "bias"):
        case = oracle.make_case(6, 24, 16, 4, F32, device)
        case.tensors[name].view(-1)[3] = value
        got, expected = oracle.fused(case), oracle.run(oracle.reference_call, case)
        for key, e in expected.items():
            assert torch.equal(got[key].isfinite(), e.isfinite()), (name, key)
    case = oracle.make_case(6, 24, 16, 4, F32, device)
    case.dy[2, 3] = value
    got, expected = oracle.fused(case), oracle.run(oracle.reference_call, case)
    for key, e in expected.items():
        assert torch.equal(got[key].isfinite(), e.isfinite()), key


@pytest.mark.parametrize("failing", ["lora_shrink", "lora_grad_ab", "lora_dx"])
def test_an_error_inside_backward_leaves_no_gradient(device, x, monkeypatch, failing):
    layer = layer_of(device, 0.5)
    expected = grads_of(layer, x, layer)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    x = x.detach().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(1)
    y = layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(fused, failing, fail)
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            y.square().sum().backward(retain_graph=True)
    assert x.grad is layer.lora_A.grad is layer.lora_B.grad is None
    y.square().sum().backward()  # what was saved is whole: the same graph runs again
    assert_same([y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad], expected)


def seeded_step(seed, device):
    """Gradients of a call whose data and mask depend on ``seed`` alone: torch's generator is shared."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((20, 48), (32, 48), (8, 48), (32, 8))
    x, weight, a, b = (torch.randn(s, generator=generator).to(device) for s in shapes)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    mask_seed = torch.tensor(seed, device=device)
    y, _, _ = fused.LoRALinearFunction.apply(x, weight, None, a, b, mask_seed, None, 2.0, 0.3)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def test_threads_give_what_one_gives(device):
    devices = [device] * 4
    if device == "cuda" and torch.cuda.device_count() > 1:
        devices = [f"cuda:{i % 2}" for i in range(4)]
    expected = [seeded_step(i, d) for i, d in enumerate(devices)]
    found = {}

    def work(i):
        found[i] = [seeded_step(i, devices[i]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, value in enumerate(expected):
        for got in found[i]:
            assert_same(got, value)


def worker(connection):
    torch.set_num_threads(1)
    torch.manual_seed(7)
    layer = layer_of("cpu", 0.5)
    x = torch.randn(6, 24)
    connection.send([t.tolist() for t in grads_of(layer, x, layer)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_worker_process_gives_the_same(start, monkeypatch):
    # A spawned process looks for `worker` in this file, which `pytest` does not put on its path.
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    layer_of("cpu")(torch.randn(6, 24))  # the parent has run kernels before it forks
    torch.manual_seed(7)
    layer = layer_of("cpu", 0.5)
    expected = grads_of(layer, torch.randn(6, 24), layer)
    context = multiprocessing.get_context(start)
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(theirs,))
    process.start()
    assert ours.poll(120), "the worker died or hangs"
    got = [torch.tensor(t) for t in ours.recv()]
    process.join(30)
    assert process.exitcode == 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_torch_jit_trace_sees_the_operations_of_the_eager_twin(device):
    weights = [torch.randn(shape, device=device) for shape in ((24, 16), (4, 16), (24, 4))]
    x, other = torch.randn(5, 16, device=device), torch.randn(5, 16, device=device)
    for _ in range(4):  # a call that would be replayed
        y = fastlora.lora_linear(other, *weights)
    traced = torch.jit.trace(lambda x: fastlora.lora_linear(x, *weights), x, check_trace=False)
    torch.testing.assert_close(traced(other), y)
