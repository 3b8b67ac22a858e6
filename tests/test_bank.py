"""AdapterBank: residency, eviction, holds, cancellation."""

from __future__ import annotations

import linecache
import random
import sys
import threading
from pathlib import Path

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

import fastlora
from fastlora import AdapterBank
from fastlora.bank import BankFullError, LoadCancelled
from fastlora.bank_pool import Pool


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
    for large in (1e39, 10**400):
        with pytest.raises(ValueError, match=r"factor must be finite, beside the scaling of 'a0'"):
            bank.set_scale("a0", large)
    with pytest.raises(TypeError, match="factor must be a number"):
        bank.set_scale("a0", "2")
    check_slot(bank, slot, truths["a0"], -2)
    with pytest.raises(ValueError, match="factor must be finite"):  # in float32 it is, times 2 not
        bank.set_scale("a0", 3e38)


def test_a_scale_set_while_the_adapter_is_copied_counts(monkeypatch):
    bank, truths = bank_of(1)

    def fails(layer):
        if layer == 1:
            bank.set_scale("a0", 0.5)
        return False

    failing_write(monkeypatch, fails)
    check_slot(bank, bank.load("a0"), truths["a0"], 0.5)


def test_copies_that_must_stay_do_not_count_against_those_of_folders(tmp_path):
    truth = write(tmp_path / "a0", 0)
    bank = AdapterBank(LAYERS, 1, MAX_RANK, host_bytes=4 * 4 * (8 + 6 + 8 + 4))
    for seed in (1, 2):
        tensors, config, _ = tensors_of(seed)
        bank.add(f"mine{seed}", tensors, config=config)
    bank.add("a0", tmp_path / "a0")
    for _ in range(3):
        check_slot(bank, bank.load("a0"), truth)
        bank.unload("a0")
    stats = bank.stats()
    assert stats.disk_reads == 1
    assert stats.disk_seconds > 0


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
