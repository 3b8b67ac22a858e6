"""dA and dB by TMA, and ds in the same launch: marks tell the kernel of dx, which runs beside it."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_rounded, assert_same_bits_beside_other_work, pack, randn

from fastlora import autograd, reference
from fastlora.kernels import lora_grad_ab_tma as grad_ab_module
from fastlora.kernels.common import empty_rows
from fastlora.kernels.config import grad_ab_makes_ds, grad_ab_tma_config, keep_scale
from fastlora.kernels.lora_grad_ab import lora_grad_ab
from fastlora.kernels.lora_grad_ab_tma import lora_grad_ab_ds, makes_ds
from fastlora.kernels.lora_grad_x import lora_grad_x

HAS_CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_CUDA, reason="programs wait for one another on a GPU alone")
EACH_HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# M, K, N, R: rows and columns that blocks do not divide
SHAPES = [
    (300, 72, 136, 16),
    (129, 136, 264, 3),
    (1, 64, 8, 1),
    (65, 128, 520, 8),
    (70, 72, 136, 64),
    (150, 64, 72, 100),
    (200, 328, 392, 8),
]
if HAS_CUDA:
    SHAPES += [
        (8192, 4096, 4096, 16), (2048, 4096, 4096, 8), (4111, 1032, 2056, 24), (511, 1160, 2048, 100),
        (8192, 1024, 14336, 64), (300, 6000, 14336, 16), (1025, 4096, 4104, 128), (257, 4096, 1032, 33),
    ]  # fmt: skip


def inputs(device, dtype, M, K, N, R, p=0.0, adapters=None):
    """x, dy, weight, lora_A, lora_B, s, and which elements are kept, with their bits."""
    x, dy = randn(device, dtype, M, K), randn(device, dtype, M, N)
    weight = randn(device, dtype, N, K, scale=N**-0.5)
    lora_A = randn(device, adapters or dtype, R, K, scale=R**-0.5)
    lora_B = randn(device, adapters or dtype, N, R, scale=N**-0.5)
    s = empty_rows(M, R, dtype, torch.device(device)).copy_(randn(device, dtype, M, R))
    keep = reference.dropout_keep_mask(9, M, K, p, device)
    return x, dy, weight, lora_A, lora_B, s, keep, pack(keep) if p else None


@EACH_HALF
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("M", "K", "N", "R"), SHAPES)
def test_values(device, dtype, M, K, N, R, p):
    if p and R > 64:
        pytest.skip("never made so")
    x, dy, weight, lora_A, lora_B, s, keep, mask = inputs(device, dtype, M, K, N, R, p)
    factor = keep_scale(p)
    ds, da, db, ready = lora_grad_ab_ds(x, mask, dy, s, lora_B, torch.float32, 0.5, factor)
    dx = lora_grad_x(dy, weight, ds, lora_A, mask, ready=ready)
    assert_rounded(ds, 0.5 * factor * dy.double() @ lora_B.double(), dtype, depth=N)
    assert_rounded(da, ds.double().t() @ (x.double() * keep), torch.float32, depth=M)
    assert_rounded(db, dy.double().t() @ s.double(), dtype, depth=M)
    expected = dy.double() @ weight.double() + (ds.double() @ lora_A.double()) * keep
    assert_rounded(dx, expected, dtype, depth=N + R)
    if p == 0:
        apart = lora_grad_ab(x, ds, None, dy, s, torch.float32, dtype)
        assert torch.equal(da, apart[0])
        assert torch.equal(db, apart[1])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fp32_adapters_and_a_tensor_for_scaling(device, p):
    shape = (1025, 1032, 1160, 12) if HAS_CUDA else (140, 72, 136, 12)
    x, dy, _, _, lora_B, s, _, mask = inputs(device, torch.float16, *shape, p, torch.float32)
    scaling = torch.tensor(0.75, device=device)
    made = lora_grad_ab_ds(x, mask, dy, s, lora_B, torch.float32, scaling)[:3]
    same = lora_grad_ab_ds(x, mask, dy, s, lora_B.half(), torch.float32, 0.75)[:3]
    assert made[2].dtype == torch.float32
    assert torch.equal(made[0], same[0])
    assert torch.equal(made[1], same[1])
    assert torch.equal(made[2].half(), same[2])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_linear_takes_it_where_it_fits(device, monkeypatch, p):
    M, K, N, R = (2048, 4096, 4096, 16) if HAS_CUDA else (520, 72, 320, 5)
    x, dy, weight, lora_A, lora_B, s, _, mask = inputs(device, torch.bfloat16, M, K, N, R, p)
    calls = []

    def spy(*args):
        calls.append(args)
        return lora_grad_ab_ds(*args)

    def backward():
        saved = x, weight, lora_A, lora_B, s, mask, None, 2.0, p
        return autograd.fused_backward(dy, *saved, True, True, True)

    monkeypatch.setattr(autograd, "lora_grad_ab_ds", spy)
    monkeypatch.setattr(grad_ab_module, "device_properties", lambda device: (9, 132))
    assert makes_ds(x, dy, R, dropout=p > 0)
    made = backward()
    assert len(calls) == 1
    monkeypatch.setattr(autograd, "makes_ds", lambda *args, **kwargs: False)
    for one, other in zip(made, backward(), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())
    assert len(calls) == 1


def test_only_where_most_of_it_need_not_wait():
    assert grad_ab_makes_ds(8192, 4096, 4096, 16, 132, False)
    assert grad_ab_makes_ds(8192, 4096, 14336, 16, 132, False)
    assert not grad_ab_makes_ds(8192, 4096, 4096, 128, 132, False)
    assert not grad_ab_makes_ds(8192, 768, 3072, 16, 132, False)  # 48 programs for 128 blocks
    assert not grad_ab_makes_ds(8192, 14336, 4096, 16, 132, False)  # dA is more than dB
    assert not grad_ab_makes_ds(512, 4096, 4096, 16, 132, False)  # few rows
    assert grad_ab_makes_ds(8192, 4096, 4096, 16, 132, True)
    assert not grad_ab_makes_ds(8192, 4096, 4096, 32, 132, True)
    assert not grad_ab_makes_ds(8192, 4096, 14336, 16, 132, True)  # two programs on an SM
    for K, N, programs, makers in (
        (4096, 4096, 128, 64),
        (8192, 8192, 256, 128),
        (4096, 14336, 144, 80),  # two blocks each, of which the last 64 are of dA
        (14336, 4096, 144, 1),
        (28672, 8192, 192, 1),
        (64, 64, 2, 1),
    ):
        assert grad_ab_tma_config(K, N, 16, 132)[1:3] == (programs, makers)


def test_does_not_fit(device):
    x, dy, *_ = inputs(device, torch.bfloat16, 600, 72, 320, 8)
    assert makes_ds(x, dy, 8, dropout=False) == (
        not HAS_CUDA or torch.cuda.get_device_capability()[0] == 9
    )
    assert not makes_ds(x.float(), dy.float(), 8, dropout=False)
    assert not makes_ds(x[:, 1:], dy, 8, dropout=False)  # rows that do not begin at 16 bytes
    assert not makes_ds(x, dy.t().contiguous().t(), 8, dropout=False)


# Poisoning dx would be a kernel between the two that are to run side by side.
@pytest.mark.no_poison
@needs_gpu
def test_thousands_of_runs_beside_other_work_give_the_same_bits(device):
    steps = []
    for M, K, N, R, p in [
        (300, 1024, 1160, 8, 0.0),
        (2048, 1024, 4096, 16, 0.3),
        (4111, 1032, 2056, 24, 0.0),
        (2048, 4096, 14336, 16, 0.0),
        (513, 520, 4096, 16, 0.3),
    ]:
        operands = inputs(device, torch.bfloat16, M, K, N, R, p)

        def step(operands=operands):
            x, dy, weight, lora_A, lora_B, s, _, mask = operands
            ds, *grads, ready = lora_grad_ab_ds(x, mask, dy, s, lora_B, torch.bfloat16, 2.0)
            return ds, *grads, lora_grad_x(dy, weight, ds, lora_A, mask, ready=ready)

        steps.append(step)
    assert_same_bits_beside_other_work(device, steps, 400)


@pytest.mark.no_poison
@needs_gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=str)
def test_replays_of_a_graph_wait_each_time(device, adapters, p):
    """With fp32 adapters too: their casts are read by one kernel while the other writes beside it."""
    shape = 2048, 4096, 4096, 16
    x, dy, weight, lora_A, lora_B, *_ = inputs(device, torch.bfloat16, *shape, adapters=adapters)
    seed = torch.tensor(3, device=device) if p else None

    def step():
        y, s, mask = autograd.fused_forward(x, weight, None, lora_A, lora_B, seed, None, 2.0, p)
        saved = x, weight, lora_A, lora_B, s, mask, None, 2.0, p
        return y, s, *autograd.fused_backward(dy, *saved, True, True, True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    for _ in range(20):
        x.normal_()
        dy.normal_()
        expected = step()
        for t in made:
            t.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
