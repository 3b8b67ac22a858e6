"""AdapterBank: who holds a slot, who gives it back, how long others wait, and which host copies stay."""

from __future__ import annotations

import threading

import pytest
from bank_cases import LAYERS, MAX_RANK, all_free, bank_of, check_slot, write

import fastlora
from fastlora import AdapterBank


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


def test_waiting_for_a_slot_ends_when_another_thread_unpins():
    bank, truths = bank_of(2, slots=1)
    bank.pin("a0")
    timer = threading.Timer(0.1, bank.unpin, ("a0",))
    timer.start()
    (slot,) = bank.acquire(["a1"], timeout=120)
    timer.join()
    check_slot(bank, slot, truths["a1"])
    assert bank.stats().stall_seconds < 60  # it was woken up


def test_an_adapter_removed_while_it_is_read_leaves_no_host_copy(monkeypatch, tmp_path):
    write(tmp_path / "a0", 0)
    bank = AdapterBank(LAYERS, 1, MAX_RANK)
    bank.add("a0", tmp_path / "a0", lazy=True)
    read = fastlora.bank.read_folder

    def read_and_remove(*args):
        bank.remove("a0")
        return read(*args)

    monkeypatch.setattr("fastlora.bank.read_folder", read_and_remove)
    with pytest.raises(KeyError, match="no adapter 'a0'"):
        bank.load("a0")
    assert bank.stats().host_bytes == 0


def test_the_host_copy_that_was_used_last_stays(tmp_path):
    bank = AdapterBank(LAYERS, 1, MAX_RANK, host_bytes=2 * 4 * (8 + 6 + 8 + 4))
    for seed in (0, 12, 24):  # of rank 1 each
        write(tmp_path / f"a{seed}", seed)
        bank.add(f"a{seed}", tmp_path / f"a{seed}", lazy=True)
    for name in ("a0", "a12", "a0", "a24"):
        bank.load(name)
    assert bank.stats().disk_reads == 3
    bank.load("a0")
    assert bank.stats().disk_reads == 3
    bank.load("a12")
    assert bank.stats().disk_reads == 4
