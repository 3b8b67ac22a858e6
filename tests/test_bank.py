"""AdapterBank: residency, eviction, holds, cancellation, and random traffic over 2,000 adapters on disk."""

from __future__ import annotations

import contextlib
import json
import linecache
import random
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path

import hypothesis
import hypothesis.stateful
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import save_file

import fastlora
from fastlora import AdapterBank
from fastlora.bank import BankFullError, LoadCancelled
from fastlora.bank_pool import Pool

LAYERS = {"0.q": (6, 8), "0.v": (4, 8), "1.q": (6, 8)}
MAX_RANK = 4


def tensors_of(seed, layers=("0.q", "0.v")):
    """An adapter: its tensors as PEFT names them, its configuration, and what each layer must compute."""
    generator = torch.Generator().manual_seed(seed)
    r, other = 1 + seed % MAX_RANK, 1 + seed // 3 % MAX_RANK
    tensors, truth = {}, {}
    for i, name in enumerate(layers):
        (N, K), rank = LAYERS[name], other if i else r
        lora_A = torch.randn(rank, K, generator=generator)
        lora_B = torch.randn(N, rank, generator=generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_B
        truth[name] = (6 / rank, lora_A, lora_B)
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 6,
        "target_modules": list(layers),
        "rank_pattern": dict.fromkeys(layers[1:], other),
    }
    return tensors, config, truth


def write(folder: Path, seed, **options):
    tensors, config, truth = tensors_of(seed, **options)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return truth


def bank_of(count, slots=2, layers=LAYERS, **options):
    bank = AdapterBank(layers, slots, MAX_RANK, **options)
    truths = {}
    for seed in range(count):
        tensors, config, truths[f"a{seed}"] = tensors_of(seed)
        bank.add(f"a{seed}", tensors, config=config)
    return bank, truths


def check_slot(bank, slot, truth, factor=1.0):
    """The slot holds exactly the adapter, in every layer."""
    for name in LAYERS:
        stack = bank.layer(name)
        if name not in truth:
            assert int(stack.ranks[slot]) == 0
            continue
        scaling, lora_A, lora_B = truth[name]
        r = len(lora_A)
        assert int(stack.ranks[slot]) == r
        assert torch.equal(stack.lora_A[slot, :r], lora_A)
        assert torch.equal(stack.lora_B[slot, :, :r], lora_B)
        assert float(stack.scaling[slot]) == pytest.approx(scaling * factor, rel=1e-6)


def check_rows(bank, names, ids, truths):
    """The mixed linear gives each row the product of its own adapter."""
    for layer, (N, K) in LAYERS.items():
        x, weight = torch.randn(len(names), K), torch.randn(N, K)
        with fastlora.dispatch.force("eager"):
            y = fastlora.lora_linear_multi(x, weight, bank.layer(layer), ids)
        expected = x @ weight.t()
        for row, name in enumerate(names):
            if name is not None and layer in truths[name]:
                scaling, lora_A, lora_B = truths[name][layer]
                expected[row] += scaling * (x[row] @ lora_A.t() @ lora_B.t())
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def all_free(bank, names):
    """Nothing is held or lost: every slot can be taken, and then holds what it should."""
    names = list(names)[: bank.slots]
    assert len(names) == bank.slots
    slots = bank.acquire(names)
    assert sorted(slots) == list(range(bank.slots))
    bank.release(names)
    return dict(zip(names, slots, strict=True))


def test_a_mixed_batch_gets_each_adapter_and_none():
    bank, truths = bank_of(3, slots=3)
    names = ["a2", None, "a0", "a2", "a1"]
    with bank.use(names) as ids:
        assert ids.dtype == torch.int32
        assert ids.tolist()[1] == -1
        assert ids[0] == ids[3]
        check_rows(bank, names, ids, truths)
    assert bank.stats().misses == 3
    with bank.use(names) as ids:
        check_rows(bank, names, ids, truths)
    assert (bank.stats().hits, bank.stats().hit_rate) == (3, 0.5)


def test_host_copies_are_on_the_host_whatever_the_default_device():
    bank, truths = bank_of(1)
    tensors, config, truths["b"] = tensors_of(7)
    with torch.device("meta"):
        bank.add("b", tensors, config=config)
        with bank.use(["b", None]) as ids:
            slot, none = ids.tolist()
    assert none == -1
    check_slot(bank, slot, truths["b"])


def test_tensors_keep_their_addresses_and_smaller_adapters_leave_no_trace():
    bank, truths = bank_of(8, slots=1)
    for name in LAYERS:  # what is in a slot beside its adapter must not matter
        bank.layer(name).lora_A.fill_(float("nan"))
        bank.layer(name).lora_B.fill_(float("nan"))
    before = [t.data_ptr() for name in LAYERS for t in vars(bank.layer(name)).values()]
    for name in ("a3", "a0", "a7", "a4"):  # ranks 4, 1, 4, 1
        with bank.use([name]) as ids:
            check_slot(bank, 0, truths[name])
            check_rows(bank, [name], ids, truths)
    assert before == [t.data_ptr() for name in LAYERS for t in vars(bank.layer(name)).values()]


def test_eviction_takes_the_least_recently_used_that_is_free():
    bank, _ = bank_of(5, slots=3)
    for name in ("a0", "a1", "a2", "a0"):
        bank.load(name)
    bank.load("a3")
    assert set(bank.resident) == {"a0", "a2", "a3"}
    bank.pin("a2")
    with bank.use(["a0"]):
        bank.load("a1")  # a0 is in use, a2 pinned
        assert set(bank.resident) == {"a0", "a1", "a2"}
        bank.load("a4")
        assert set(bank.resident) == {"a0", "a2", "a4"}
    assert bank.stats().evictions == 3


def test_full_of_what_is_in_use_or_pinned():
    bank, truths = bank_of(4)
    bank.pin("a0")
    with bank.use(["a1"]):
        with pytest.raises(BankFullError, match="1 more slots are needed, but of 2 all but 0"):
            bank.acquire(["a2"])
        with pytest.raises(BankFullError):  # all or none: a0 is not held afterwards
            bank.acquire(["a0", "a3"], timeout=0.05)
        assert set(bank.resident) == {"a0", "a1"}
    bank.unpin("a0")
    with pytest.raises(ValueError, match="3 adapters, the bank has 2 slots"):
        bank.acquire(["a0", "a1", "a2"])
    for name, slot in all_free(bank, ["a2", "a3"]).items():
        check_slot(bank, slot, truths[name])


def test_waiting_for_a_slot_ends_when_another_thread_releases():
    bank, truths = bank_of(2, slots=1)
    bank.acquire(["a0"])
    timer = threading.Timer(0.1, bank.release, (["a0"],))
    timer.start()
    (slot,) = bank.acquire(["a1"], timeout=30)
    timer.join()
    check_slot(bank, slot, truths["a1"])
    assert bank.stats().stall_seconds > 0.05


def test_unload_remove_and_names():
    bank, truths = bank_of(3)
    bank.load("a0")
    with bank.use(["a0"]):
        for call in (bank.unload, bank.remove):
            with pytest.raises(RuntimeError, match="'a0' is in use"):
                call("a0")
    bank.pin("a1")
    with pytest.raises(RuntimeError, match="'a1' is pinned"):
        bank.remove("a1")
    slot = bank.resident["a0"]
    bank.unload("a0")
    assert all(int(bank.layer(name).ranks[slot]) == 0 for name in LAYERS)
    assert "a0" in bank and set(bank.resident) == {"a1"}
    check_slot(bank, bank.load("a0"), truths["a0"])
    host = bank.stats().host_bytes
    bank.remove("a0")
    assert "a0" not in bank and bank.names == ("a1", "a2") and len(bank) == 2
    assert bank.stats().host_bytes < host
    for call in (bank.load, bank.pin, bank.unload, bank.remove, bank.unpin):
        with pytest.raises(KeyError, match="no adapter 'a0'"):
            call("a0")
    tensors, config, truth = tensors_of(7)
    bank.add("a0", tensors, config=config)  # the name is free, and means the new one
    check_slot(bank, bank.load("a0"), truth)


def test_scale_at_run_time():
    bank, truths = bank_of(2, slots=1)
    slot = bank.load("a0")
    bank.set_scale("a0", 0.25)
    check_slot(bank, slot, truths["a0"], 0.25)
    bank.set_scale("a0", -2)  # in place of the first factor
    check_slot(bank, slot, truths["a0"], -2)
    bank.set_scale("a1", 3.0)
    check_slot(bank, slot, truths["a0"], -2)
    check_slot(bank, bank.load("a1"), truths["a1"], 3.0)
    check_slot(bank, bank.load("a0"), truths["a0"], -2)
    with pytest.raises(ValueError, match="factor must be finite"):
        bank.set_scale("a0", float("nan"))
    with pytest.raises(TypeError, match="factor must be a number"):
        bank.set_scale("a0", "2")


def test_host_copies_stay_within_their_limit_and_are_read_again(tmp_path):
    truths = {f"a{i}": write(tmp_path / f"a{i}", i) for i in range(6)}
    limit = 2 * 4 * 4 * (8 + 6 + 8 + 4)
    bank = AdapterBank(LAYERS, 1, MAX_RANK, host_bytes=limit)
    for name in truths:
        bank.add(name, tmp_path / name, lazy=True)
    assert bank.stats().disk_reads == 0
    for name in [*truths, *truths]:
        check_slot(bank, bank.load(name), truths[name])
        assert bank.stats().host_bytes <= limit
    assert bank.stats().disk_reads > 6
    kept = AdapterBank(LAYERS, 1, MAX_RANK, host_bytes=0)
    tensors, config, truth = tensors_of(3)
    kept.add("mine", tensors, config=config)  # cannot be read again, so it stays
    kept.add("a0", tmp_path / "a0")
    assert kept.stats().host_bytes > 0
    kept.load("a0")
    check_slot(kept, kept.load("mine"), truth)


def test_a_file_that_broke_after_it_was_added_leaves_the_bank_as_it_was(tmp_path):
    truth = write(tmp_path / "good", 1)
    write(tmp_path / "bad", 2)
    bank = AdapterBank(LAYERS, 1, MAX_RANK, host_bytes=0)
    bank.add("good", tmp_path / "good")
    bank.add("bad", tmp_path / "bad")
    slot = bank.load("good")
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ValueError, match=str(weights)):
        bank.load("bad")
    assert bank.resident == {"good": slot}  # nothing was evicted for it
    check_slot(bank, slot, truth)
    assert bank.stats().failed_loads == 1


def test_values_are_cast_to_the_dtype_of_the_bank():
    bank = AdapterBank(LAYERS, 1, MAX_RANK, dtype=torch.bfloat16)
    tensors, config, truth = tensors_of(2)
    bank.add("mine", tensors, config=config)
    slot = bank.load("mine")
    stack = bank.layer("0.q")
    assert torch.equal(stack.lora_A[slot, :3], truth["0.q"][1].bfloat16())
    assert stack.scaling.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"slots": 0}, ValueError, "slots must be at least 1, got 0"),
        ({"slots": 2.0}, TypeError, "slots must be an int"),
        ({"max_rank": 257}, ValueError, "max_rank must be from 1 to 256, got 257"),
        ({"layers": {}}, ValueError, "layers must name at least one layer"),
        ({"layers": {"q": (4, 0)}}, ValueError, r"layers\['q'\] must be"),
        ({"layers": [("q", (4, 4))]}, TypeError, "layers must be a model or a mapping"),
        ({"target_modules": ["q"]}, ValueError, "target_modules must be None"),
        ({"host_bytes": -1}, ValueError, "host_bytes must be None or an int from 0, got -1"),
        ({"dtype": torch.int8}, ValueError, "dtype must be float16"),
    ],
)
def test_wrong_options(options, error, message):
    arguments = {"layers": LAYERS, "slots": 2, "max_rank": 4} | options
    with pytest.raises(error, match=message):
        AdapterBank(**arguments)


def test_wrong_arguments(tmp_path):
    bank, _ = bank_of(1)
    tensors, config, _ = tensors_of(1)
    for error, message, call in (
        (ValueError, "'a0' is taken", lambda: bank.add("a0", tensors, config=config)),
        (TypeError, "name must be a non-empty", lambda: bank.add("", tensors, config=config)),
        (ValueError, "config must be a mapping with lora_alpha", lambda: bank.add("b", tensors)),
        (
            ValueError,
            "lazy must be False",
            lambda: bank.add("b", tensors, config=config, lazy=True),
        ),
        (ValueError, "config must be None", lambda: bank.add("b", tmp_path, config=config)),
        (FileNotFoundError, "there is none at", lambda: bank.add("b", tmp_path / "b", lazy=True)),
        (TypeError, "source must be a folder", lambda: bank.add("b", 3)),
        (TypeError, "got the string 'a0'", lambda: bank.acquire("a0")),
        (TypeError, "strings and None, got 0", lambda: bank.acquire([0])),
        (RuntimeError, "'a0' is not held", lambda: bank.release(["a0"])),
        (KeyError, "no layer 'x'", lambda: bank.layer("x")),
    ):
        with pytest.raises(error, match=message):
            call()
    assert bank.names == ("a0",)


def failing_write(monkeypatch, fails):
    """Make `Pool.write` fail half-way as ``fails`` says, after it has begun to fill the slot."""
    write_slot = Pool.write

    def write(self, slot, adapter, factor, after, cancelled):
        layers = iter(range(99))
        return write_slot(self, slot, adapter, factor, after, lambda: fails(next(layers)))

    monkeypatch.setattr(Pool, "write", write)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, MemoryError])
def test_a_load_that_ends_midway_leaves_an_empty_slot(monkeypatch, error):
    bank, truths = bank_of(4)
    bank.load("a0")
    cancel = threading.Event()

    def fails(layer):
        if layer == 1 and error is not None:
            raise error
        if layer == 1:
            cancel.set()
        return cancel.is_set()

    with monkeypatch.context() as patch:
        failing_write(patch, fails)
        with pytest.raises(error or LoadCancelled):
            bank.acquire(["a0", "a3"], cancel=cancel)
    assert set(bank.resident) == {"a0"}
    (empty,) = {0, 1} - set(bank.resident.values())
    assert all(int(bank.layer(name).ranks[empty]) == 0 for name in LAYERS)
    assert bank.stats().failed_loads == 1
    for name, slot in all_free(bank, ["a2", "a3"]).items():
        check_slot(bank, slot, truths[name])


def test_cancelling_what_waits():
    bank, _ = bank_of(2, slots=1)
    cancel = threading.Event()
    with bank.use(["a0"]):
        timer = threading.Timer(0.1, cancel.set)
        timer.start()
        with pytest.raises(LoadCancelled):
            bank.load("a1", timeout=30, cancel=cancel)
        timer.join()
    assert set(bank.resident) == {"a0"}
    all_free(bank, ["a1"])


def test_a_waiter_takes_over_when_the_loading_thread_is_cancelled(monkeypatch):
    bank, truths = bank_of(1, slots=1)
    started, cancel = threading.Event(), threading.Event()

    def fails(layer):
        if threading.current_thread().name == "first":
            started.set()
            cancel.wait(10)
            return True
        return False

    failing_write(monkeypatch, fails)
    errors = []

    def first():
        try:
            bank.load("a0")
        except LoadCancelled as error:
            errors.append(error)

    thread = threading.Thread(target=first, name="first")
    thread.start()
    assert started.wait(10)
    threading.Timer(0.1, cancel.set).start()
    (slot,) = bank.acquire(["a0"])  # waits for the first thread, then loads by itself
    thread.join()
    assert len(errors) == 1
    check_slot(bank, slot, truths["a0"])
    bank.release(["a0"])
    all_free(bank, ["a0"])


def test_an_interrupt_at_any_line_of_a_load_loses_nothing():
    # Not tried: the instructions around `with`, where Python itself may lose a lock, and releases.
    package = Path(fastlora.__file__).parent
    lines = stop = 0

    def trace(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        inside = path.parent == package and path.name.startswith("bank")
        return trace_lines if inside and frame.f_code.co_name != "release" else None

    def trace_lines(frame, event, argument):
        nonlocal lines
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not line.startswith("with ") and ".release(" not in line:
            lines += 1
            if lines == stop:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace_lines

    before = sys.gettrace()
    for stop in range(1, 1000):  # noqa: B007
        bank, truths = bank_of(4)
        bank.load("a0")
        bank.load("a1")
        lines = 0
        try:
            sys.settrace(trace)
            bank.load("a2")
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            sys.settrace(before)
        for name, slot in all_free(bank, ["a3", "a2"]).items():
            check_slot(bank, slot, truths[name])
    assert 60 < stop < 999


def test_copies_wait_for_the_last_use_and_the_next_use_for_the_copy(monkeypatch):
    """The order of events that a GPU needs, with events that only record it."""
    bank, _ = bank_of(3, slots=1)

    class Event:
        def query(self):
            return False

    log, write_slot = [], Pool.write

    def write(self, slot, adapter, factor, after, cancelled):
        after = list(after)
        write_slot(self, slot, adapter, factor, (), cancelled)
        log.append(("write", after, Event()))
        return log[-1][2]

    def mark(self):
        log.append(("use", Event()))
        return log[-1][1]

    monkeypatch.setattr(Pool, "write", write)
    monkeypatch.setattr(Pool, "mark", mark)
    monkeypatch.setattr(Pool, "wait", lambda self, event: log.append(("wait", event)))
    stream = iter((7, 8, 7, 7))
    monkeypatch.setattr(Pool, "stream_key", lambda self: next(stream))
    bank.acquire(["a0"])
    bank.acquire(["a0"])
    bank.release(["a0"])
    bank.release(["a0"])  # from another stream
    bank.load("a1")
    bank.load("a2")
    first, waits, again, use, other, second, _, mark_second, third, _, _ = log
    assert first[:2] == ("write", [])
    assert waits == again == ("wait", first[2])
    assert second[:2] == ("write", [use[1], other[1]])
    assert third[:2] == ("write", [mark_second[1]])


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


@pytest.mark.gpu
@pytest.mark.alone
def test_a_captured_graph_replays_with_other_adapters_in_the_slots():
    bank, truths = bank_of(6, slots=2, device="cuda")
    x, weight = torch.randn(4, 8, device="cuda"), torch.randn(6, 8, device="cuda")
    routing = fastlora.route(torch.tensor([0, 1, -1, 0], device="cuda"), bank.slots)
    call = lambda: fastlora.lora_linear_multi(x, weight, bank.layer("0.q"), routing)  # noqa: E731
    with torch.no_grad():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
    rng = random.Random(0)
    for _ in range(20):
        names = [rng.choice(["a1", "a4"]), rng.choice(["a0", "a5"]), None]
        names.append(names[0])
        with bank.use(names) as ids:  # fills slots on the side stream; replay waits for it
            routing.update_(ids)
            graph.replay()
        expected = x @ weight.t()
        for row, name in enumerate(names):
            if name is not None:
                scaling, lora_A, lora_B = truths[name]["0.q"]
                expected[row] += scaling * (x[row] @ lora_A.cuda().t() @ lora_B.cuda().t())
        torch.testing.assert_close(y, expected, atol=1e-2, rtol=1e-2)
    assert bank.stats().evictions > 0


@pytest.mark.gpu
def test_copies_on_the_side_stream_overtake_no_compute():
    shapes = {"q": (512, 1024)}
    bank = AdapterBank(shapes, 2, 16, device="cuda")
    truths = {}
    for i in range(6):
        lora_A, lora_B = torch.randn(16, 1024), torch.randn(512, 16)
        bank.add(f"a{i}", {"q.lora_A": lora_A, "q.lora_B": lora_B}, config={"lora_alpha": 16})
        truths[f"a{i}"] = lora_A.cuda(), lora_B.cuda()
    x, weight = torch.randn(256, 1024, device="cuda"), torch.randn(512, 1024, device="cuda")
    rng, results = random.Random(0), []
    with torch.no_grad():
        for _ in range(200):  # without a sync: the host runs far ahead
            names = rng.sample(sorted(truths), 2)
            with bank.use(names * 128) as ids:
                results.append((names, fastlora.lora_linear_multi(x, weight, bank.layer("q"), ids)))
        frozen = x @ weight.t()
        for names, y in results:
            for half, name in enumerate(names):
                lora_A, lora_B = truths[name]
                expected = frozen[half::2] + x[half::2] @ lora_A.t() @ lora_B.t()
                torch.testing.assert_close(y[half::2], expected, atol=1.0, rtol=2e-2)
