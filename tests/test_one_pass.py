"""s beside y in one launch whose programs wait for one another."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_rounded, assert_same_bits_beside_other_work, randn

from fastlora import autograd
from fastlora.kernels import lora_one_pass as one_pass_module
from fastlora.kernels import lora_product
from fastlora.kernels.config import LaunchConfig, gemm_tma_config
from fastlora.kernels.config_one_pass import one_pass_makers, one_pass_stages
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
    x, weight = randn(device, dtype, M, K), randn(device, dtype, N, K, scale=K**-0.5)
    lora_A = randn(device, adapters or dtype, R, K, scale=K**-0.5)
    return x, weight, lora_A, randn(device, adapters or dtype, N, R, scale=R**-0.5)


@EACH_HALF
@pytest.mark.parametrize(("M", "K", "N", "R"), SHAPES)
def test_values(device, dtype, M, K, N, R):
    x, weight, lora_A, lora_B = inputs(device, dtype, M, K, N, R)
    bias = randn(device, torch.float32, N)
    y, s = lora_one_pass(x, weight, lora_A, lora_B, 0.5, bias)
    assert_rounded(s, 0.5 * x.double() @ lora_A.double().t(), dtype, depth=K)
    product = x.double() @ weight.double().t() + s.double() @ lora_B.double().t()
    assert_rounded(y, product + bias.double(), dtype, depth=K + R)


def test_fp32_adapters_and_a_tensor_for_scaling(device):
    M, K, N, R = (1025, 1032, 1160, 12) if HAS_CUDA else (140, 72, 136, 12)
    x, weight, lora_A, lora_B = inputs(device, torch.bfloat16, M, K, N, R, torch.float32)
    made = lora_one_pass(x, weight, lora_A, lora_B, torch.tensor(0.75, device=device))
    same = lora_one_pass(x, weight, lora_A.bfloat16(), lora_B.bfloat16(), 0.75)
    assert all(torch.equal(a, b) for a, b in zip(made, same, strict=True))


@pytest.mark.parametrize("which", ["x", "weight", "lora_A", "lora_B"])
def test_another_stride_at_the_same_address(device, which):
    """What TMA is told about a tensor is kept by its address: a plan is of one layout alone."""
    M, K, N, R = (512, 1024, 1160, 16) if HAS_CUDA else (140, 72, 136, 16)
    given = dict(
        zip(
            ("x", "weight", "lora_A", "lora_B"),
            inputs(device, torch.float16, M, K, N, R),
            strict=True,
        )
    )
    rows, columns = given[which].shape
    buffer = randn(device, torch.float16, rows, 2 * columns, scale=0.1)
    for view in (buffer[:, :columns], buffer.view(-1)[: rows * columns].view(rows, columns)):
        assert view.data_ptr() == buffer.data_ptr()
        x, weight, lora_A, lora_B = (given | {which: view}).values()
        y, s = lora_one_pass(x, weight, lora_A, lora_B, 0.5)
        assert_rounded(s, 0.5 * x.double() @ lora_A.double().t(), torch.float16, depth=K)
        expected = x.double() @ weight.double().t() + s.double() @ lora_B.double().t()
        assert_rounded(y, expected, torch.float16, depth=K + R)


def test_a_plan_is_of_one_layout(device, monkeypatch):
    M, K, N, R = (512, 1024, 1160, 16) if HAS_CUDA else (140, 72, 136, 16)
    x, weight, lora_A, lora_B = inputs(device, torch.float16, M, K, N, R)
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
    x, weight, lora_A, lora_B = inputs(device, torch.bfloat16, *shape)
    assert fits_one_pass(x, weight, shape[3])
    calls = []

    def spy(*args):
        calls.append(args)
        return lora_one_pass(*args)

    def forward(p=0.0):
        seed = torch.tensor(3, device=device) if p else None
        return autograd.fused_forward(x, weight, None, lora_A, lora_B, seed, None, 2.0, p)[:2]

    monkeypatch.setattr(autograd, "lora_one_pass", spy)
    made = forward()
    assert len(calls) == 1
    forward(0.1)
    assert len(calls) == 1  # a mask is drawn by a kernel of its own
    monkeypatch.setattr(lora_product, "fits_one_pass", lambda *args: False)
    for one, other in zip(made, forward(), strict=True):
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
    for M, N in ((512, 4096), (8192, 4096), (2048, 1024)):
        assert gemm_tma_config(M, N, 2, 132).BLOCK_M == 128
    assert [one_pass_stages(r) for r in (16, 32, 64, 128, 256)] == [10, 9, 7, 5, 3]


def test_does_not_fit(device):
    x, weight, *_ = inputs(device, torch.bfloat16, 300, 2064, 1024, 8)
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
        operands = inputs(device, torch.bfloat16, M, K, N, R)

        def step(operands=operands):
            return lora_one_pass(*operands, 2.0)

        steps.append(step)
    assert_same_bits_beside_other_work(device, steps, 500)
