"""AdapterBank: who holds a slot, who gives it back, and how long others wait."""

from __future__ import annotations

import threading

import pytest
from bank_cases import all_free, bank_of


def test_release_takes_what_acquire_held_and_nothing_of_a_block():
    bank, _ = bank_of(2, slots=1)
    for _ in range(20):  # holders are a set, whose order is not theirs
        with bank.use(["a0"]):
            with pytest.raises(RuntimeError, match="'a0' is not held"):
                bank.release(["a0"])
            bank.acquire(["a0"])
            bank.release(["a0"])
        all_free(bank, ["a0"])
    bank.load("a1")


@pytest.mark.parametrize(
    ("timeout", "error"), [("1", TypeError), (None, TypeError), (float("nan"), ValueError)]
)
def test_a_timeout_is_a_number(timeout, error):
    bank, _ = bank_of(1)
    with pytest.raises(error, match="timeout must be a number of seconds"):
        bank.acquire(["a0"], timeout=timeout)


def test_waiting_without_a_limit():
    bank, _ = bank_of(2, slots=1)
    bank.acquire(["a0"])
    waiting = threading.Thread(
        target=bank.acquire, args=(["a1"],), kwargs={"timeout": float("inf")}
    )
    waiting.start()
    bank.release(["a0"])
    waiting.join(20)
    assert not waiting.is_alive()
    assert bank.resident == ["a1"] or "a1" in bank.resident
