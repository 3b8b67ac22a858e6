"""s beside y, and ds beside dx, in one launch whose programs wait for one another."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_rounded, randn

from fastlora import autograd
from fastlora.kernels import lora_one_pass as one_pass_module
from fastlora.kernels import lora_product
from fastlora.kernels.config import LaunchConfig, gemm_tma_config
from fastlora.kernels.config_one_pass import one_pass_backward, one_pass_makers, one_pass_stages
from fastlora.kernels.lora_grad_ab import lora_grad_ab
from fastlora.kernels.lora_one_pass import fits_one_pass, lora_one_pass

HAS_CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_CUDA, reason="programs wait for one another on a GPU alone")
EACH_HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# M, K, N, R: rows and columns that tiles do not divide, ranks that rows of 16 bytes do not hold
SHAPES = [
    (300, 576, 640, 16),
    (129, 520, 264, 3),
    (1, 64, 8, 1),
    (257, 640, 520, 8),
    (150, 72, 392, 64),
]
if HAS_CUDA:  # sums of a thousand at least, as `fits_one_pass` asks
    SHAPES = [
        (8192, 4096, 4096, 16), (2048, 4096, 4096, 8), (4111, 1032, 2056, 24), (257, 4096, 1032, 64),
        (1025, 1024, 4104, 3), (511, 2048, 1160, 200), (8192, 4096, 1024, 128), (1, 1024, 1024, 1),
    ]  # fmt: skip


def inputs(device, dtype, M, K, N, R, adapters=None):
    x, dy = randn(device, dtype, M, K), randn(device, dtype, M, N)
    weight = randn(device, dtype, N, K, scale=K**-0.5)
    lora_A = randn(device, adapters or dtype, R, K, scale=K**-0.5)
    return x, dy, weight, lora_A, randn(device, adapters or dtype, N, R, scale=R**-0.5)


@EACH_HALF
@pytest.mark.parametrize(("M", "K", "N", "R"), SHAPES)
def test_values(device, dtype, M, K, N, R):
    x, dy, weight, lora_A, lora_B = inputs(device, dtype, M, K, N, R)
    bias = randn(device, torch.float32, N)
    y, s, _ = lora_one_pass(x, weight, lora_A, lora_B, 0.5, bias)
    assert_rounded(s, 0.5 * x.double() @ lora_A.double().t(), dtype, depth=K)
    product = x.double() @ weight.double().t() + s.double() @ lora_B.double().t()
    assert_rounded(y, product + bias.double(), dtype, depth=K + R)

    dx, ds, ready = lora_one_pass(dy, weight, lora_A, lora_B, 0.5, backward=True)
    da, db = lora_grad_ab(x, ds, None, dy, s, dtype, dtype, ready)
    assert_rounded(ds, 0.5 * dy.double() @ lora_B.double(), dtype, depth=N)
    assert_rounded(
        dx, dy.double() @ weight.double() + ds.double() @ lora_A.double(), dtype, depth=N + R
    )
    assert_rounded(da, ds.double().t() @ x.double(), dtype, depth=M)
    assert_rounded(db, dy.double().t() @ s.double(), dtype, depth=M)


def test_fp32_adapters_and_a_tensor_for_scaling(device):
    M, K, N, R = (1025, 1032, 1160, 12) if HAS_CUDA else (140, 72, 136, 12)
    x, dy, weight, lora_A, lora_B = inputs(device, torch.bfloat16, M, K, N, R, torch.float32)
    scaling = torch.tensor(0.75, device=device)
    half = lora_A.bfloat16(), lora_B.bfloat16()
    for backward, given in ((False, x), (True, dy)):
        made = lora_one_pass(given, weight, lora_A, lora_B, scaling, backward=backward)[:2]
        same = lora_one_pass(given, weight, *half, 0.75, backward=backward)[:2]
        assert all(torch.equal(a, b) for a, b in zip(made, same, strict=True))


@pytest.mark.parametrize("which", ["x", "weight", "lora_A", "lora_B"])
def test_another_stride_at_the_same_address(device, which):
    """What TMA is told about a tensor is kept by its address: a plan is of one layout alone."""
    M, K, N, R = (512, 1024, 1160, 16) if HAS_CUDA else (140, 72, 136, 16)
    given = dict(
        zip(
            ("x", "dy", "weight", "lora_A", "lora_B"),
            inputs(device, torch.float16, M, K, N, R),
            strict=True,
        )
    )
    rows, columns = given[which].shape
    buffer = randn(device, torch.float16, rows, 2 * columns, scale=0.1)
    for view in (buffer[:, :columns], buffer.view(-1)[: rows * columns].view(rows, columns)):
        assert view.data_ptr() == buffer.data_ptr()
        x, _, weight, lora_A, lora_B = (given | {which: view}).values()
        y, s, _ = lora_one_pass(x, weight, lora_A, lora_B, 0.5)
        assert_rounded(s, 0.5 * x.double() @ lora_A.double().t(), torch.float16, depth=K)
        expected = x.double() @ weight.double().t() + s.double() @ lora_B.double().t()
        assert_rounded(y, expected, torch.float16, depth=K + R)


def test_a_plan_is_of_one_layout(device, monkeypatch):
    M, K, N, R = (512, 1024, 1160, 16) if HAS_CUDA else (140, 72, 136, 16)
    x, _, weight, lora_A, lora_B = inputs(device, torch.float16, M, K, N, R)
    plan, made = one_pass_module._plan, set()

    def noted(*key):
        made.add(plan(*key))
        return plan(*key)

    monkeypatch.setattr(one_pass_module, "_plan", noted)
    wide = randn(device, torch.float16, M, 2 * K)
    for given in (x, wide[:, :K], x.clone()):
        lora_one_pass(given, weight, lora_A, lora_B, 0.5)
    assert len(made) == 2


def test_the_linear_takes_it_where_it_fits(device, monkeypatch):
    shape = (2048, 4096, 4096, 16) if HAS_CUDA else (270, 2056, 264, 5)
    x, dy, weight, lora_A, lora_B = inputs(device, torch.bfloat16, *shape)
    assert fits_one_pass(x, weight, shape[3])
    assert fits_one_pass(dy, weight, shape[3], backward=True) == HAS_CUDA  # where N is too small
    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return lora_one_pass(*args, **kwargs)

    def step(p=0.0):
        seed = torch.tensor(3, device=device) if p else None
        y, s, mask = autograd.fused_forward(x, weight, None, lora_A, lora_B, seed, None, 2.0, p)
        wanted = autograd.fused_backward(
            dy, x, weight, lora_A, lora_B, s, mask, None, 2.0, p, True, True, True
        )
        return y, s, *wanted

    monkeypatch.setattr(autograd, "lora_one_pass", spy)
    made = step()
    assert calls == [{}, {"backward": True}][: 1 + HAS_CUDA]
    step(0.1)
    assert len(calls) == 1 + HAS_CUDA  # a mask is drawn by a kernel of its own
    for module in (autograd, lora_product):  # backward, forward
        monkeypatch.setattr(module, "fits_one_pass", lambda *args, **kwargs: False)
    for one, other in zip(made, step(), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())


def test_only_where_programs_have_time():
    wide, narrow = LaunchConfig(128, 256, 64, 8, 4), LaunchConfig(128, 128, 64, 8, 4)
    assert one_pass_makers(8192, 4096, 16, wide, 64 * 16, 132) == 32  # two rows of tiles each
    assert one_pass_makers(8192, 4096, 16, wide, 64 * 4, 132) == 0  # 8 programs for 64
    assert one_pass_makers(8192, 4096, 16, wide, 132 * 7, 132) == 132  # none has less to do
    assert one_pass_makers(8192, 1024, 16, wide, 64 * 16, 132) == 0  # short sums
    assert one_pass_makers(256, 4096, 16, narrow, 64, 132) == 0  # few rows
    assert one_pass_makers(512, 4096, 16, narrow, 128, 132) == 4
    assert one_pass_makers(8192, 4096, 256, wide, 64 * 16, 132) == 0  # as much work as a tile of y
    assert one_pass_backward(8192, 4096, 4096, 16, 132)
    assert not one_pass_backward(8192, 14336, 4096, 16, 132)  # dA and dB have too many programs
    assert one_pass_backward(2048, 14336, 4096, 16, 132)
    assert not one_pass_backward(8192, 4096, 4096, 32, 132)
    for M, N in ((512, 4096), (8192, 4096), (2048, 1024)):
        for beside in (False, True):
            assert gemm_tma_config(M, N, 2, 132, beside=beside).BLOCK_M == 128
    assert [one_pass_stages(r) for r in (16, 32, 64, 128, 256)] == [10, 9, 7, 5, 3]


def test_does_not_fit(device):
    x, _, weight, *_ = inputs(device, torch.bfloat16, 300, 2064, 1024, 8)
    assert not fits_one_pass(x.float(), weight.float(), 8)
    assert not fits_one_pass(x[:, 1:], weight[:, 1:], 8)  # rows that do not begin at 16 bytes
    assert not fits_one_pass(x.t().contiguous().t(), weight, 8)
    assert not fits_one_pass(x, weight[:1021], 8)  # rows of y


@needs_gpu
def test_thousands_of_runs_beside_other_work_give_the_same_bits(device):
    steps = []
    for M, K, N, R in [
        (300, 1024, 1160, 8),
        (2048, 1024, 4096, 16),
        (4111, 1032, 2056, 24),
        (513, 4096, 520, 32),
    ]:
        x, dy, weight, lora_A, lora_B = inputs(device, torch.bfloat16, M, K, N, R)

        def step(x=x, dy=dy, weight=weight, lora_A=lora_A, lora_B=lora_B):
            y, s, _ = lora_one_pass(x, weight, lora_A, lora_B, 2.0)
            dx, ds, ready = lora_one_pass(dy, weight, lora_A, lora_B, 2.0, backward=True)
            return (
                y,
                s,
                dx,
                ds,
                *lora_grad_ab(x, ds, None, dy, s, torch.bfloat16, torch.bfloat16, ready),
            )

        steps.append((step, step()))
    other, side = randn(device, torch.bfloat16, 2048, 2048), torch.cuda.Stream()
    for i in range(500):
        with torch.cuda.stream(side):
            other @ other  # programs come onto the GPU late, and in part
            steps[i % 4][0]()  # two of the kernel at once
        for step, expected in steps:
            if i % 50 == 0:
                assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
            else:
                made = step()
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    torch.cuda.synchronize()


@needs_gpu
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=str)
def test_replays_of_a_graph_wait_each_time(device, adapters):
    """With fp32 adapters too: their casts are read by dx while dA and dB are written beside it."""
    x, dy, weight, lora_A, lora_B = inputs(device, torch.bfloat16, 2048, 4096, 4096, 16, adapters)

    def step():
        y, s, _ = autograd.fused_forward(x, weight, None, lora_A, lora_B, None, None, 2.0, 0.0)
        saved = x, weight, lora_A, lora_B, s, None, None, 2.0, 0.0
        return y, s, *autograd.fused_backward(dy, *saved, True, True, True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    for i in range(20):
        x.normal_()
        dy.normal_()
        expected = step()
        for t in made:
            t.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
        if i == 0:
            with pytest.MonkeyPatch.context() as patch:
                for module in (autograd, lora_product):
                    patch.setattr(module, "fits_one_pass", lambda *args, **kwargs: False)
                apart = step()
            for one, other in zip(made, apart, strict=True):
                bound = 2e-2 * other.abs().max().item()
                torch.testing.assert_close(one, other, rtol=2e-2, atol=bound)
