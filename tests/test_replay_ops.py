"""Calls of DoRA, groups, slices, embeddings and many adapters that `replay.cpp` makes, bit for bit."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from replay_driver import assert_identical, by_python, is_replayed

import fastlora
from fastlora import replay
from fastlora.kernels import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, F32 = torch.bfloat16, torch.float32

pytestmark = pytest.mark.no_poison


def dora(dtype: torch.dtype, bias: bool, scaling: float) -> tuple[Any, list[Tensor]]:
    shapes = ((70, 64), (48, 64), (8, 64), (48, 8))
    x, weight, a, b = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    offset = torch.randn(48, device=DEVICE).to(dtype) if bias else None
    magnitude = torch.rand(48, device=DEVICE).to(dtype) + 1
    wanted = [t.requires_grad_() for t in (x, a, b, magnitude)]
    return lambda: [
        fastlora.dora_linear(x, weight, a, b, magnitude, bias=offset, scaling=scaling)
    ], wanted


def group(dtype: torch.dtype, bias: bool, scaling: float) -> tuple[Any, list[Tensor]]:
    sizes = (48, 32, 32)
    x = torch.randn(2, 35, 64, device=DEVICE).to(dtype).requires_grad_()
    weights = [torch.randn(n, 64, device=DEVICE).to(dtype) for n in sizes]
    lora_As = [torch.randn(8, 64, device=DEVICE).to(dtype).requires_grad_() for _ in sizes]
    lora_Bs = [torch.randn(n, 8, device=DEVICE).to(dtype).requires_grad_() for n in sizes]
    biases = [torch.randn(n, device=DEVICE).to(dtype) for n in sizes] if bias else None

    def run() -> list[Tensor]:
        return list(
            fastlora.lora_linear_group(x, weights, lora_As, lora_Bs, biases=biases, scaling=scaling)
        )

    return run, [x, *lora_As, *lora_Bs]


def embedding(dtype: torch.dtype, bias: bool, scaling: float) -> tuple[Any, list[Tensor]]:
    ids = torch.randint(100, (2, 35), device=DEVICE)
    table, a, b = (
        torch.randn(n, k, device=DEVICE).to(dtype) for n, k in ((100, 48), (8, 100), (48, 8))
    )
    padding = 3 if bias else None
    wanted = [a.requires_grad_(), b.requires_grad_()]
    return lambda: [
        fastlora.lora_embedding(ids, table, a, b, scaling=scaling, padding_idx=padding)
    ], wanted


def merged(dtype: torch.dtype, bias: bool, scaling: float) -> tuple[Any, list[Tensor]]:
    shapes = ((2, 35, 64), (48, 64), (16, 64), (32, 8))
    x, weight, a, b = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    offset = torch.randn(48, device=DEVICE).to(dtype) if bias else None
    wanted = [t.requires_grad_() for t in (x, a, b)]
    slices = {"widths": (24, 16, 8), "enable_lora": (True, False, True)}
    return lambda: [
        fastlora.lora_merged_linear(x, weight, a, b, **slices, bias=offset, scaling=scaling)
    ], wanted


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("op", [dora, group, embedding, merged])
def test_other_ops_are_python_s_bit_for_bit(
    driver: Any, op: Any, dtype: torch.dtype, bias: bool, grad: bool
) -> None:
    def step(run: Any, wanted: list[Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            ys = run()
        if not grad:
            assert ys[0].grad_fn is None
            return list(ys)
        grads = torch.autograd.grad(ys, wanted, [torch.ones_like(y) for y in ys])
        return [*(y.detach() for y in ys), *grads]

    first = op(dtype, bias, 0.5)
    for _ in range(4):
        step(*first)
    assert native.module.programs() == 1, replay.refusals
    for scaling in (0.5,) if op is group else (0.5, -2.0):
        case = op(dtype, bias, scaling)
        found = step(*case)
        with by_python():
            assert_identical(found, step(*case))
    assert native.module.programs() == 1


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("ranks", [True, False])
@pytest.mark.parametrize(("rows", "dtype"), [(3, BF16), (20, BF16), (20, F32), (150, BF16)])
def test_many_adapters_without_gradients(
    driver: Any,
    rows: int,
    dtype: torch.dtype,
    ranks: bool,
    inference: bool,
) -> None:
    """Layers of a step share a routing: its first call makes tables, in Python."""
    L, K, N, R = 5, 64, 48, 8

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    lora_A, lora_B, weight = made(L, R, K), made(L, N, R), made(N, K)
    bias = made(N) if ranks else None
    each = torch.tensor([8, 3, 0, 1, 8], dtype=torch.int32, device=DEVICE) if ranks else None
    stack = fastlora.AdapterStack(lora_A, lora_B, torch.rand(L, device=DEVICE) + 1, each)
    results = []
    with torch.inference_mode(inference), torch.no_grad():
        for step in range(5):
            torch.manual_seed(step)
            x = made(rows, 1, K)
            routing = fastlora.route(torch.randint(-1, L, (rows,), device=DEVICE), L)
            for _ in range(2):
                y = fastlora.lora_linear_multi(x, weight, stack, routing, bias=bias)
            with by_python():
                expected = fastlora.lora_linear_multi(x, weight, stack, routing, bias=bias)
            assert torch.equal(y, expected)
            results.append(y)
        assert native.module.programs() >= 1, replay.refusals
        wrong = fastlora.route(torch.zeros(rows, dtype=torch.int32, device=DEVICE), L + 1)
        with pytest.raises(ValueError, match="routed for 6 adapters"):
            fastlora.lora_linear_multi(x, weight, stack, wrong, bias=bias)
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("op", [dora, embedding])
def test_settings_are_read_at_each_call(driver: Any, op: Any) -> None:
    run, wanted = op(F32, False, 0.5)

    def step() -> Tensor:
        (y,) = run()
        torch.autograd.grad(y, wanted, torch.ones_like(y))
        return y

    for _ in range(3):
        step()
    assert is_replayed(step())
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert not is_replayed(step())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert is_replayed(step())
    torch.use_deterministic_algorithms(True)
    try:
        assert not is_replayed(step())
    finally:
        torch.use_deterministic_algorithms(False)
    assert is_replayed(step())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_threads_that_never_used_the_gpu(driver: Any, learned: bool, grad: bool) -> None:
    x, weight, lora_A, lora_B = (
        torch.randn(shape, device=DEVICE).to(torch.bfloat16).requires_grad_(grad and i != 1)
        for i, shape in enumerate(((40, 64), (48, 64), (8, 64), (48, 8)))
    )
    inputs = [x, lora_A, lora_B] if grad else []

    def step() -> list[Tensor]:
        y = fastlora.lora_linear(x, weight, lora_A, lora_B)
        return [y.detach(), *(torch.autograd.grad(y.sum(), inputs) if grad else ())]

    expected = step()
    for _ in range(3 * learned):
        step()
    for _ in range(3):  # pools, whose threads are all new
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for job in [pool.submit(step) for _ in range(24)]:
                assert_identical(job.result(), expected)
    assert native.module.programs() >= 1, replay.refusals


def linear_step(device: Any, rows: int = 40) -> Any:
    """A forward and backward of one layer on ``device``."""
    x, weight, lora_A, lora_B, dy = (
        torch.randn(shape, device=device).to(BF16)
        for shape in ((rows, 64), (48, 64), (8, 64), (48, 8), (rows, 48))
    )
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]

    def step() -> list[Tensor]:
        y = fastlora.lora_linear(x, weight, lora_A, lora_B)
        assert y.device == x.device
        return [y, *torch.autograd.grad(y, leaves, dy)]

    return step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_out_of_memory_is_torch_s_own_error(driver: Any) -> None:
    step = linear_step(DEVICE, rows=2**20)
    expected = [t.detach() for t in step()]
    for _ in range(3):
        step()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_allocated() / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = step()
    assert is_replayed(found[0])
    assert_identical([t.detach() for t in found], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_gpu_has_its_own_programs(driver: Any) -> None:
    """Python makes the calls on a GPU that is not the current one."""
    for index in (0, 1):
        step = linear_step(torch.device("cuda", index))
        expected = [t.detach() for t in step()]
        with torch.cuda.device(index):
            for _ in range(3):
                step()
            assert native.module.programs() == index + 1, replay.refusals
            replayed = step()
        assert is_replayed(replayed[0])
        with torch.cuda.device(1 - index):
            by_hand = step()
        assert not is_replayed(by_hand[0])
        for found in (replayed, by_hand):
            assert_identical([t.detach() for t in found], expected)
