"""Calls that `replay.cpp` makes: bit for bit what Python makes of them, and Python wherever they differ."""

from __future__ import annotations

import contextlib
import itertools
import struct
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from replay_driver import assert_identical, by_python, is_replayed

import fastlora
from fastlora import autograd, replay
from fastlora.kernels import launch, lora_product, native, ready
from fastlora.kernels.direct import Packed
from fastlora.kernels.tape import Recorder

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# A poisoned allocation is an operation that a tape has no step for.
pytestmark = pytest.mark.no_poison


class Layer:
    """Operands of a LoRA linear, and how it is called."""

    def __init__(
        self,
        shape: tuple[int, ...] = (70, 64),
        N: int = 48,
        R: int = 8,
        dtype: torch.dtype = BF16,
        adapters: torch.dtype | None = None,
        bias: bool = False,
        needs: str = "xab",
        **options: Any,
    ) -> None:
        K = shape[-1]
        adapters = adapters or dtype

        def made(*size: int, dtype: torch.dtype = dtype, grad: bool = False) -> Tensor:
            return torch.randn(*size, device=DEVICE).to(dtype).requires_grad_(grad)

        self.x = made(*shape, grad="x" in needs)
        self.weight, self.bias = made(N, K), made(N) if bias else None
        self.lora_A = made(R, K, dtype=adapters, grad="a" in needs)
        self.lora_B = made(N, R, dtype=adapters, grad="b" in needs)
        self.dy = made(*shape[:-1], N)
        self.options = {"scaling": 0.5, **options}

    def forward(self, **options: Any) -> Tensor:
        return fastlora.lora_linear(
            self.x, self.weight, self.lora_A, self.lora_B, bias=self.bias, **self.options | options
        )

    @property
    def wanted(self) -> list[Tensor]:
        return [t for t in (self.x, self.lora_A, self.lora_B) if t.requires_grad]

    def step(self, **options: Any) -> list[Tensor]:
        y = self.forward(**options)
        grads = torch.autograd.grad(y, self.wanted, self.dy) if self.wanted else ()
        return [y.detach(), *grads]

    def learn(self, **options: Any) -> Layer:
        """Call until the next call is replayed."""
        for _ in range(3):
            self.step(**options)
        assert native.module.programs() >= 1, replay.refusals
        return self

    def by_python(self, **options: Any) -> list[Tensor]:
        with by_python():
            return self.step(**options)


CASES = {
    "bf16": {},
    "fp16, bias": {"dtype": F16, "bias": True},
    "fp32": {"dtype": F32, "bias": True},
    "fp32 adapters": {"adapters": F32},
    "rank 3": {"R": 3, "N": 45, "shape": (67, 61)},
    "fp32 adapters of rank 3": {"R": 3, "adapters": F32, "bias": True},
    "rank 40": {"R": 40},
    "three dimensions": {"shape": (2, 35, 64)},
    "one dimension": {"shape": (64,)},
    "few rows": {"shape": (2, 64)},
    "dropout": {"dropout_p": 0.3},
    "dropout, fp32 adapters, bias": {"dropout_p": 0.3, "adapters": F32, "bias": True},
    "dropout, fp32, three dimensions": {"dropout_p": 0.3, "dtype": F32, "shape": (2, 35, 64)},
    "no gradient to x": {"needs": "ab"},
    "gradient to x alone": {"needs": "x", "dropout_p": 0.3},
    "gradient to A alone": {"needs": "a"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_replayed_calls_are_python_s_bit_for_bit(driver: Any, case: dict[str, Any]) -> None:
    seed = torch.tensor(7, device=DEVICE) if "dropout_p" in case else None
    layer = Layer(**case, seed=seed).learn()
    assert is_replayed(layer.forward())
    assert_identical(layer.step(), layer.by_python())
    # Other tensors of the same shapes, and another factor.
    other = Layer(**case, seed=seed)
    assert is_replayed(other.forward(scaling=-1.75))
    assert_identical(other.step(scaling=-1.75), other.by_python(scaling=-1.75))


@pytest.mark.parametrize("where", [DEVICE, "cpu"])
def test_a_scaling_tensor_is_read_at_each_call(driver: Any, where: str) -> None:
    scaling = torch.tensor(0.5, device=where)
    layer = Layer(scaling=scaling)
    if where != DEVICE:  # read by the host: nothing that can be replayed
        assert_identical([layer.step() for _ in range(3)][-1], layer.by_python())
        return
    layer.learn()
    scaling.fill_(-3.0)
    assert is_replayed(layer.forward())
    assert_identical(layer.step(), layer.by_python(scaling=-3.0))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_marks_are_replayed(driver: Any, monkeypatch: pytest.MonkeyPatch, p: float) -> None:
    """Of `lora_one_pass`, without dropout, and of `lora_grad_ab_ds`."""
    monkeypatch.setattr(lora_product, "fits_one_pass", lambda *args: True)
    monkeypatch.setattr(autograd, "makes_ds", lambda *args, **kwargs: True)
    seed = torch.tensor(7, device=DEVICE)
    tickets = []
    new_ticket = ready.new_ticket
    monkeypatch.setattr(ready, "new_ticket", lambda: tickets.append(new_ticket()) or tickets[-1])
    # On a GPU the product must be deep enough for a tile to wait before its last steps.
    size = {"shape": (300, 2048), "N": 2048} if HAS_CUDA else {}
    layer = Layer(dropout_p=p, seed=seed, **size).learn()
    assert len(tickets) % (2 if p == 0 else 1) == 0
    assert tickets
    tickets.clear()
    assert is_replayed(layer.forward())
    assert not tickets
    for _ in range(3):
        assert_identical(layer.step(), layer.by_python())


def test_a_tape_says_what_tma_must_know_of_an_operand() -> None:
    """What a GPU alone runs: a map is 128 bytes, then shape and strides; pointers come after it."""
    table = torch.empty(3)

    class Prepared:
        constants = (table,)

        def prepared(self, args: tuple[Any, ...]) -> Prepared:
            return self

        def packed(self) -> Packed:
            maps, scalars = [(0, 0, 3, (64, 32))], [(1, 152, "Q"), (2, 160, "f"), (3, 164, "i")]
            scalars.append((4, 168, "Q"))
            return Packed(99, (7, 1, 1), 128, 512, True, bytes(176), [0, 128, 152], scalars, maps)

    rows, y = torch.empty(5, 24, dtype=BF16), torch.empty(4, 6)
    with Recorder([rows, y], [2.5]) as recorder:
        recorder.launch(Prepared(), (rows[1:, 8:17], y[2:], 2.5, 11, table))  # type: ignore[arg-type]
    size, tickets, ((kind, function, grid, *launch, numbers),), _ = recorder.tape()
    assert (size, tickets, kind, function, grid) == (2, 0, "launch", 99, (7, 1, 1))
    threads, shared, early, parameters, offsets, pointers, operands = launch
    assert (threads, shared, early, offsets) == (128, 512, True, [0, 128, 152])
    # The value, bytes behind its start, the offset; CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, the swizzle.
    assert operands == [(0, (24 + 8) * 2, 0, 9, 3, [9, 4], [48], [32, 64])]
    assert parameters[128:152] == struct.pack("<2i2q", 4, 9, 24, 1)
    assert pointers == [(1, 2 * 6 * 4, 152)]
    assert numbers == [(160, "f", 0)]
    assert parameters[164:] == struct.pack("<iQ", 11, table.data_ptr())


def test_tickets_of_python_are_even() -> None:
    assert all(launch.new_ticket() % 2 == 0 for _ in range(3))


def test_without_gradients_there_is_no_graph(driver: Any) -> None:
    layer = Layer(dropout_p=0.3, seed=torch.tensor(3, device=DEVICE))
    with torch.no_grad():
        expected = layer.forward()
        layer.forward()
        programs = native.module.programs()
        assert programs == 1, replay.refusals
        y = layer.forward()
    assert y.grad_fn is None and not y.requires_grad
    assert torch.equal(y, expected)


def test_dropout_draws_the_seeds_that_python_draws(driver: Any) -> None:
    layer = Layer(dropout_p=0.3).learn()
    torch.manual_seed(11)
    first, second = layer.step(), layer.step()
    assert is_replayed(layer.forward())
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(11)
    assert_identical(layer.by_python(), first)
    assert_identical(layer.by_python(), second)


def test_dropout_is_off_outside_training(driver: Any) -> None:
    layer = Layer(dropout_p=0.3, training=False).learn()
    assert_identical(layer.step(), layer.by_python(dropout_p=0.0))


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B"])
def test_a_backward_for_other_gradients_is_python_s(driver: Any, wanted: str) -> None:
    layer = Layer().learn()
    y = layer.forward()
    assert is_replayed(y)
    (found,) = torch.autograd.grad(y, getattr(layer, wanted), layer.dy)
    expected = layer.by_python()[1 + ("x", "lora_A", "lora_B").index(wanted)]
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-5)


def test_a_gradient_that_is_not_dense_is_python_s(driver: Any) -> None:
    layer = Layer(dtype=F32).learn()
    y = layer.forward(scaling=0.25)
    assert is_replayed(y)
    found = torch.autograd.grad(y.sum(), layer.wanted)
    layer.dy = torch.ones_like(layer.dy)
    expected = layer.by_python(scaling=0.25)[1:]
    torch.testing.assert_close(list(found), expected)


def test_a_graph_is_kept_for_a_second_backward(driver: Any) -> None:
    layer = Layer().learn()
    y = layer.forward()
    assert is_replayed(y)
    first = torch.autograd.grad(y, layer.wanted, layer.dy, retain_graph=True)
    assert_identical(list(torch.autograd.grad(y, layer.wanted, layer.dy)), list(first))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, layer.wanted, layer.dy)


def test_double_backward_is_refused_as_ever(driver: Any) -> None:
    layer = Layer().learn()
    y = layer.forward()
    assert is_replayed(y)
    (dx,) = torch.autograd.grad(y, layer.x, layer.dy, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        dx.sum().backward()


def test_an_error_of_python_s_backward_keeps_its_type(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer().learn()
    y = layer.forward()

    def fails(*args: Any) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(autograd.LoRALinearFunction, "backward", staticmethod(fails))
    with pytest.raises(KeyError, match="planted"):
        torch.autograd.grad(y, layer.x, layer.dy)  # other gradients than were recorded


def test_what_backward_needs_may_not_change_in_place(driver: Any) -> None:
    layer = Layer().learn()
    y = layer.forward()
    assert is_replayed(y)
    with torch.no_grad():
        layer.lora_A.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, layer.wanted, layer.dy)


@pytest.mark.parametrize("shape", [(70, 64), (2, 35, 64)])
@pytest.mark.parametrize("by", ["replay", "python"])
def test_outputs_may_be_changed_in_place(driver: Any, shape: tuple[int, ...], by: str) -> None:
    layer = Layer(shape=shape).learn()
    expected = layer.by_python()
    if by == "python":
        native.module.clear()
    y = layer.forward()
    assert is_replayed(y) == (by == "replay")
    y += 1.0
    assert_identical(list(torch.autograd.grad(y, layer.wanted, layer.dy)), expected[1:])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("first", ["python", "replay"])
def test_checkpointing(driver: Any, use_reentrant: bool, first: str) -> None:
    """With its forward by one of the two, and its second forward by the other."""
    layer = Layer(dropout_p=0.3, dtype=F32)
    torch.manual_seed(5)
    expected = layer.step()
    layer.learn()
    calls = itertools.count()

    def run(x: Tensor) -> Tensor:
        replays = (next(calls) == 0) == (first == "replay")
        with contextlib.nullcontext() if replays else by_python():
            return fastlora.lora_linear(
                x, layer.weight, layer.lora_A, layer.lora_B, **layer.options
            )

    torch.manual_seed(5)
    y = checkpoint(run, layer.x, use_reentrant=use_reentrant)
    for t in layer.wanted:
        t.grad = None
    y.backward(layer.dy)
    assert_identical([y.detach(), *(t.grad for t in layer.wanted)], expected)  # type: ignore[misc]


def test_hooks_may_bring_back_saved_tensors_that_lie_otherwise(driver: Any) -> None:
    layer = Layer(dtype=F32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        layer.learn()  # calls that hooks watch are another program
        expected = layer.by_python()
    packed = []

    def unpack(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if t.dim() == 2 else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, unpack):
        y = layer.forward()
    assert is_replayed(y) and len(packed) == 5
    grads = torch.autograd.grad(y, layer.wanted, layer.dy)
    torch.testing.assert_close(list(grads), expected[1:])


def test_a_call_that_cannot_be_recorded_is_python_s(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(replay, "record", fails)
    layer = Layer()
    expected = layer.step()
    for _ in range(4):
        assert_identical(layer.step(), expected)
    assert replay.refusals == {"ZeroDivisionError('planted')": 1}


class Watching(TorchDispatchMode):
    """Sees every operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


def test_python_runs_what_somebody_watches(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer().learn()
    with Watching():
        assert not is_replayed(layer.forward())
    with fastlora.dispatch.force("eager"):
        assert not is_replayed(layer.forward())
    monkeypatch.setattr(replay, "profiled", lambda: True)
    assert not is_replayed(layer.forward())
    monkeypatch.undo()


def test_python_runs_what_is_captured(driver: Any) -> None:
    layer = Layer().learn()
    expected = layer.step()
    if driver is None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer.forward()
            found = [y, *torch.autograd.grad(y, layer.wanted, layer.dy)]
        assert not is_replayed(y)
        graph.replay()
        assert_identical([t.detach() for t in found], expected)
        return
    y = layer.forward()
    launches = driver.launches
    driver.is_capturing = True
    other = Layer(R=4)
    assert [other.step() for _ in range(5)] and not is_replayed(other.forward())
    assert native.module.programs() == 1
    found = torch.autograd.grad(y, layer.wanted, layer.dy)
    assert driver.launches == launches
    assert_identical(list(found), expected[1:])


def test_bad_arguments_are_refused_as_ever(driver: Any) -> None:
    layer = Layer(dropout_p=0.3).learn()
    wrong = (("scaling", "2"), ("scaling", torch.ones(2)), ("dropout_p", 1.5), ("dropout_p", None))
    for name, value in (*wrong, ("dropout_p", 10**30), ("seed", torch.tensor(1.0)), ("bias", 3)):
        options = {"bias": None, **layer.options, name: value}
        for _ in range(4):
            with pytest.raises((TypeError, ValueError), match=name):
                fastlora.lora_linear(layer.x, layer.weight, layer.lora_A, layer.lora_B, **options)
    for _ in range(4):
        with pytest.raises(ValueError, match="lora_B"):
            fastlora.lora_linear(layer.x, layer.weight, layer.lora_A, layer.lora_B[:-1])
        with pytest.raises(TypeError, match="x must be"):
            fastlora.lora_linear(None, layer.weight, layer.lora_A, layer.lora_B)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_learns_is_replayed_and_a_bias_is_python_s(driver: Any, name: str) -> None:
    layer = Layer(dtype=F32, bias=True)
    learns = getattr(layer, name).requires_grad_(True)
    for _ in range(4):
        y = layer.forward()
        (grad,) = torch.autograd.grad(y, learns, layer.dy)
    assert is_replayed(y) == (name == "weight")
    assert len(replay.refusals) == (name == "bias")
    expected = layer.dy.t() @ layer.x if name == "weight" else layer.dy.sum(0)
    torch.testing.assert_close(grad, expected)


def test_parameters_that_share_memory_are_replayed(driver: Any) -> None:
    layer, K = Layer(), 64
    flat = torch.cat([layer.lora_A.detach().flatten(), layer.lora_B.detach().flatten()])
    layer.lora_A = flat[: 8 * K].view(8, K).requires_grad_(True)
    layer.lora_B = flat[8 * K :].view(48, 8).detach().requires_grad_(True)
    layer.learn()
    assert is_replayed(layer.forward())
    assert_identical(layer.step(), layer.by_python())


def test_plans_that_are_forgotten_take_their_programs_along(driver: Any) -> None:
    layer = Layer().learn()
    launch.clear_plans()
    assert native.module.programs() == 0
    assert not is_replayed(layer.forward())


def test_tensors_off_16_bytes_are_python_s(driver: Any) -> None:
    layer = Layer().learn()
    K = layer.x.shape[1]
    layer.x = (
        torch.cat([torch.zeros(1, device=DEVICE), layer.x.detach().flatten()])
        .to(BF16)[1:]
        .view(-1, K)
    )
    layer.x.requires_grad_(True)
    assert not is_replayed(layer.forward())
    assert_identical(layer.step(), layer.by_python())


def test_a_failing_launch_is_an_error(driver: Any) -> None:
    if driver is None:
        pytest.skip("a driver that fails on demand")
    layer = Layer().learn()
    driver.error = 700
    with pytest.raises(RuntimeError, match="launching a kernel failed: CUDA error 700"):
        layer.forward()


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_below_a_transform_python_runs(driver: Any, p: float) -> None:
    """What a transform of torch.func saves are outputs that a replay does not give."""
    layer = Layer()
    x, weight, b = layer.x, layer.weight, layer.lora_B
    a, seed = layer.lora_A.detach(), torch.tensor(3, device=DEVICE)

    def linear(a: Tensor) -> Tensor:
        return fastlora.lora_linear(x, weight, a, b, dropout_p=p, seed=seed).float().sum()

    def group(a: Tensor) -> Tensor:
        ys = fastlora.lora_linear_group(x, [weight] * 2, [a] * 2, [b] * 2, dropout_p=p, seed=seed)
        return sum(y.float().sum() for y in ys)

    for loss in (linear, group):
        with by_python():
            expected = torch.func.grad(loss)(a)
        for _ in range(4):
            assert torch.equal(torch.func.grad(loss)(a), expected)


def test_settings_that_change_before_the_backward(driver: Any) -> None:
    layer = Layer().learn()
    y = layer.forward()
    assert is_replayed(y)
    launches = None if driver is None else driver.launches
    with by_python():
        other = layer.forward()
    torch.use_deterministic_algorithms(True)
    try:
        grads = torch.autograd.grad(y, layer.wanted, layer.dy)
        # Python makes them, which asks what may run now.
        assert driver is None or driver.launches == launches
        expected = torch.autograd.grad(other, layer.wanted, layer.dy)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_identical(list(grads), list(expected))
