"""Activation checkpointing: a recomputation ends before the last product, whoever makes the calls."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from replay_driver import by_python, is_replayed

import fastlora
from fastlora import autograd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, F32 = torch.bfloat16, torch.float32


def operands(dtype: torch.dtype, K: int = 128, R: int = 8) -> dict[str, Tensor]:
    t = {"weight": torch.randn(K, K), "lora_A": torch.randn(R, K), "lora_B": torch.randn(K, R)}
    t = {name: value.to(DEVICE, dtype) * K**-0.5 for name, value in t.items()}
    return {name: value.requires_grad_(name != "weight") for name, value in t.items()}


def checkpointed(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(300, 128), (2, 150, 128)], ids=["rows", "batch"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_python_ends_before_the_last_product(
    monkeypatch: pytest.MonkeyPatch, p: float, shape: tuple[int, ...]
) -> None:
    """What the last layer keeps is there before its y, which a recomputation has no use for."""
    t = operands(BF16)
    x, dy = (torch.randn(shape, device=DEVICE, dtype=BF16) for _ in range(2))
    x.requires_grad_()
    made: list[str] = []
    for name in ("lora_y", "lora_one_pass"):
        plain = getattr(autograd, name)

        def noted(*args: Any, name: str = name, plain: Any = plain) -> Any:
            made.append(name)
            return plain(*args)

        monkeypatch.setattr(autograd, name, noted)

    def block(x: Tensor) -> Tensor:
        return fastlora.lora_linear(fastlora.lora_linear(x, **t, dropout_p=p), **t, dropout_p=p)

    def step(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        made.clear()
        torch.manual_seed(5)
        y = run(block, x)
        return y, *torch.autograd.grad(y, [x, t["lora_A"], t["lora_B"]], dy)

    with by_python():
        expected = step(lambda block, x: block(x))
        assert len(made) == 2
        got = step(checkpointed)
        assert made == ["lora_y"] * 3, "two forward, one again"
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
        with torch.autograd.graph.save_on_cpu():
            kept = step(lambda block, x: block(x))
        torch.testing.assert_close(kept, got, rtol=0, atol=0)


@pytest.mark.no_poison  # an operation that a tape has no step for
@pytest.mark.parametrize("shape", [(300, 128), (2, 150, 128)], ids=["rows", "batch"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_replayed_calls_end_before_the_product(
    driver: Any, p: float, shape: tuple[int, ...]
) -> None:
    t = operands(F32)
    x, dy = (torch.randn(shape, device=DEVICE) for _ in range(2))
    x.requires_grad_()

    def block(x: Tensor) -> Tensor:
        return fastlora.lora_linear(x, **t, scaling=0.5, dropout_p=p)

    def step(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        y = run(block, x)
        return y, *torch.autograd.grad(y, [x, t["lora_A"], t["lora_B"]], dy)

    def launched(run: Callable[[], object]) -> int:
        before = driver.launches if driver is not None else 0
        run()
        return (driver.launches if driver is not None else 0) - before

    with by_python():
        expected = step(checkpointed)
    for _ in range(3):  # until both are replayed
        step(lambda block, x: block(x))
        step(checkpointed)
    assert is_replayed(checkpointed(block, x))
    torch.testing.assert_close(step(checkpointed), expected, rtol=0, atol=0)
    if driver is not None:
        s_and_y = launched(lambda: checkpointed(block, x))
        backward = launched(lambda: step(lambda block, x: block(x))) - launched(lambda: block(x))
        assert s_and_y > 1
        assert launched(lambda: step(checkpointed)) < 2 * s_and_y + backward

    kept = []
    for _ in range(2):  # what a call that was ended had made is free
        own = x.detach().clone().requires_grad_()
        checkpointed(block, own).sum().backward()
        kept.append(weakref.ref(own))
    del own
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
