"""A bank under any order of calls, and under random traffic over 2,000 adapters on disk."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import OrderedDict

import hypothesis
import hypothesis.stateful
import hypothesis.strategies as st
import pytest
import torch
from bank_cases import (
    LAYERS,
    MAX_RANK,
    all_free,
    bank_of,
    check_rows,
    check_slot,
    tensors_of,
    write,
)
from safetensors.torch import save_file

from fastlora import AdapterBank
from fastlora.bank import BankFullError, LoadCancelled


class Traffic(hypothesis.stateful.RuleBasedStateMachine):
    """Any order of calls, against a plain model of what a bank must do."""

    names = st.sampled_from([f"a{i}" for i in range(6)])

    def __init__(self):
        super().__init__()
        self.bank, self.truths = bank_of(0, slots=3)
        self.known, self.pinned, self.holds, self.factors = {}, set(), [], {}

    def needed(self, names):
        """Slots that are taken once these are held too."""
        held = {name for hold in self.holds for name in hold if name}
        return len(held | self.pinned | {name for name in names if name})

    @hypothesis.stateful.rule(name=names, seed=st.integers(0, 40))
    def add(self, name, seed):
        tensors, config, truth = tensors_of(seed)
        if name in self.known:
            with pytest.raises(ValueError, match="is taken"):
                self.bank.add(name, tensors, config=config)
        else:
            self.bank.add(name, tensors, config=config)
            self.known[name], self.factors[name] = truth, 1.0

    @hypothesis.stateful.rule(batch=st.lists(st.none() | names, min_size=1, max_size=4))
    def acquire(self, batch):
        if any(name and name not in self.known for name in batch):
            expected = ValueError if len({n for n in batch if n}) > 3 else KeyError
        elif len({name for name in batch if name}) > 3:
            expected = ValueError
        elif self.needed(batch) > 3:
            expected = BankFullError
        else:
            slots = self.bank.acquire(batch)
            self.holds.append(batch)
            assert [slot == -1 for slot in slots] == [name is None for name in batch]
            return
        with pytest.raises(expected):
            self.bank.acquire(batch)

    @hypothesis.stateful.precondition(lambda self: self.holds)
    @hypothesis.stateful.rule(data=st.data())
    def release(self, data):
        self.bank.release(self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1))))

    @hypothesis.stateful.rule(name=names, pin=st.booleans())
    def pin(self, name, pin):
        if name not in self.known:
            return
        if not pin:
            self.bank.unpin(name)
            self.pinned.discard(name)
        elif self.needed([name]) > 3:
            with pytest.raises(BankFullError):
                self.bank.pin(name)
        else:
            self.bank.pin(name)
            self.pinned.add(name)

    @hypothesis.stateful.rule(name=names, forget=st.booleans())
    def drop(self, name, forget):
        call = self.bank.remove if forget else self.bank.unload
        if name not in self.known:
            with pytest.raises(KeyError):
                call(name)
        elif name in self.pinned or any(name in hold for hold in self.holds):
            with pytest.raises(RuntimeError):
                call(name)
        else:
            call(name)
            assert name not in self.bank.resident
            if forget:
                del self.known[name]

    @hypothesis.stateful.rule(name=names, factor=st.sampled_from([0.0, 0.5, 1.0, -3.0]))
    def scale(self, name, factor):
        if name in self.known:
            self.bank.set_scale(name, factor)
            self.factors[name] = factor

    @hypothesis.stateful.invariant()
    def slots_hold_what_the_bank_says(self):
        resident = self.bank.resident
        assert len(set(resident.values())) == len(resident) <= 3
        assert self.pinned <= set(resident)
        assert {name for hold in self.holds for name in hold if name} <= set(resident)
        for name, slot in resident.items():
            check_slot(self.bank, slot, self.known[name], self.factors[name])


TestTraffic = Traffic.TestCase
TestTraffic.settings = hypothesis.settings(max_examples=40, stateful_step_count=30)


COUNT, SLOTS = 2000, 64


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """2,000 adapters on disk."""
    folder = tmp_path_factory.mktemp("adapters")
    return folder, {f"a{i}": write(folder / f"a{i}", i) for i in range(COUNT)}


def broken(folder, i):
    """Break an adapter on disk in one of many ways."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    data = weights.read_bytes()
    tensors, settings, _ = tensors_of(i)
    key = "base_model.model.0.q.lora_B.weight"
    kind = i // 7 % 8
    if kind == 0:
        weights.write_bytes(data[:30])
    elif kind == 1:
        weights.write_bytes(data[:-4])
    elif kind == 2:
        weights.write_bytes(b"\xff" * 7 + b"\x7f" + data[8:])
    elif kind == 3:
        save_file({k: v for k, v in tensors.items() if k != key}, weights)
    elif kind == 4:
        save_file(tensors | {key: torch.full_like(tensors[key], float("nan"))}, weights)
    elif kind == 5:
        save_file(tensors | {key: torch.zeros(99, len(tensors[key]))}, weights)
    elif kind == 6:
        weights.unlink()
    else:
        config.write_text(json.dumps(settings | {"use_dora": True}))


def request(rng):
    """Some sequences, popular adapters more often than others, and some with none."""
    picks = [int(COUNT * rng.random() ** 8) for _ in range(rng.randint(1, 12))]
    return [None if rng.random() < 0.1 else f"a{pick}" for pick in picks]


def run_traffic(bank, truths, bad, requests, seed, cancel_share=0.0, changing=frozenset()):
    """Send requests; give how many failed because of a broken adapter, and how many were cancelled."""
    rng = random.Random(seed)
    failed = cancelled = 0
    for number in range(requests):
        names = request(rng)
        broken_names = bad & set(names)
        cancel = None
        if rng.random() < cancel_share:
            cancel = threading.Event()
            threading.Timer(rng.random() * 1e-3, cancel.set).start()
        try:
            with bank.use(names, timeout=60, cancel=cancel) as ids:
                assert not broken_names, "a broken adapter was loaded"
                for name, slot in zip(names, ids.tolist(), strict=True):
                    if name is None:
                        assert slot == -1
                    else:
                        check_slot(bank, slot, truths[name])
                if number % 25 == 0:
                    check_rows(bank, names, ids, truths)
        except LoadCancelled:
            assert cancel is not None
            cancelled += 1
        except KeyError:
            assert changing & set(names)  # removed just then
        except (ValueError, FileNotFoundError) as error:
            assert broken_names, error
            assert any(f"/{name}" in str(error) for name in broken_names)
            failed += 1
    return failed, cancelled


def lru_hits(requests, seed):
    """Hits of a plain LRU cache of ``SLOTS`` under the same requests."""
    rng, cache, hits = random.Random(seed), OrderedDict(), 0
    for _ in range(requests):
        names = list(dict.fromkeys(name for name in request(rng) if name))
        rng.random()  # run_traffic asks whether to cancel
        hits += sum(name in cache for name in names)
        for name in names:
            cache[name] = None
            cache.move_to_end(name)
        while len(cache) > SLOTS:
            cache.popitem(last=False)
    return hits


def test_random_traffic_over_2000_adapters(shelf, record_property):
    folder, truths = shelf
    bank = AdapterBank(LAYERS, SLOTS, MAX_RANK, host_bytes=200_000)
    for name in truths:
        bank.add(name, folder / name, lazy=True)
    began = time.perf_counter()
    assert run_traffic(bank, truths, set(), 1500, seed=0) == (0, 0)
    seconds = time.perf_counter() - began
    stats = bank.stats()
    assert stats.hits == lru_hits(1500, seed=0)
    assert stats.resident == SLOTS
    assert stats.loads == stats.misses == stats.evictions + SLOTS
    assert 0 < stats.load_seconds + stats.disk_seconds < stats.stall_seconds < seconds
    assert stats.max_load_seconds <= stats.load_seconds
    assert stats.bytes_loaded > 0 and stats.host_bytes <= 200_000
    for name, value in vars(stats).items():
        record_property(name, value)
    print(f"hit rate {stats.hit_rate:.2f}, {stats}")


def test_random_traffic_with_broken_files_threads_and_cancelled_loads(shelf):
    folder, truths = shelf
    bad = {f"a{i}" for i in range(0, COUNT, 7)}
    for i in range(0, COUNT, 7):
        broken(folder / f"a{i}", i)
    bank = AdapterBank(LAYERS, SLOTS, MAX_RANK, host_bytes=200_000)
    for name in truths:
        bank.add(name, folder / name, lazy=True)
    results, errors, done = [], [], threading.Event()
    changing = frozenset(f"a{i}" for i in range(1, 7))  # popular, and not broken

    def work(seed):
        try:
            results.append(run_traffic(bank, truths, bad, 250, seed, 0.2, changing))
        except BaseException as error:
            errors.append(error)

    def change():
        """Unload, remove and add again what others use."""
        rng = random.Random(99)
        while not done.is_set():
            name = rng.choice(sorted(changing))
            with contextlib.suppress(RuntimeError):  # in use or pinned
                rng.choice((bank.unload, bank.remove, bank.pin, bank.unpin))(name)
            if name not in bank:
                bank.add(name, folder / name, lazy=True)
            time.sleep(1e-4)

    changer = threading.Thread(target=change)
    changer.start()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "deadlock"
    done.set()
    changer.join(120)
    assert not changer.is_alive() and not errors, errors
    for name in changing:
        bank.unpin(name)
    assert sum(failed for failed, _ in results) > 100
    assert sum(cancelled for _, cancelled in results) > 10
    good = [name for name in truths if name not in bad]
    for name, slot in all_free(bank, random.Random(1).sample(good, SLOTS)).items():
        check_slot(bank, slot, truths[name])
