"""Which adapter of a bank is in which slot and in host memory, who holds it, and who waits for whom."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora.adapter_source import HostAdapter
from fastlora.bank_pool import LoadCancelled, Pool

_POLL = 0.05  # seconds between two looks at a cancel event while waiting


class Call:
    """The holder of one `AdapterBank.acquire`, which `release` knows by its adapters' names alone."""


class BankFullError(RuntimeError):
    """Every slot that a call could take is in use or pinned."""


@dataclass
class BankStats:
    """Counters of an `AdapterBank` since it was made; `AdapterBank.stats` gives a copy.

    ``hits`` and ``misses`` count the adapters that calls asked for. Seconds are the host's: on CUDA a
    load ends for them when its copies are queued.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    loads: int = 0
    failed_loads: int = 0
    disk_reads: int = 0
    disk_seconds: float = 0.0
    load_seconds: float = 0.0
    """Copies from host memory into slots, all loads together."""
    max_load_seconds: float = 0.0
    """The slowest of these."""
    stall_seconds: float = 0.0
    """What callers waited, for disk, copies and slots, in calls that did not find all they asked for."""
    bytes_loaded: int = 0
    adapters: int = 0
    resident: int = 0
    host_bytes: int = 0
    device_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits in all that was asked for; 0 before the first call."""
        return self.hits / max(self.hits + self.misses, 1)


@dataclass(eq=False)
class Entry:
    """A registered adapter."""

    name: str
    read: Callable[[], HostAdapter] | None
    """Reads it again from disk; None where the host copy is the only one."""
    host: HostAdapter | None = None
    factor: float = 1.0
    pinned: bool = False
    holders: set[object] = field(default_factory=set)
    used: int = 0
    """When it was last asked for, on a clock that ticks with every ask."""
    slot: int | None = None
    """The slot that it is in, provided that the slot says so too."""
    loading: bool = False
    scaling: Tensor | None = None
    ready: torch.cuda.Event | None = None
    reading: threading.Lock = field(default_factory=threading.Lock)


class Slots:
    """The books of a bank. ``changed`` guards all of it; nothing is read or copied under that lock.

    A slot changes hands by one assignment to ``owner``, and a hold is one element of a set, so that an
    exception at any point of a call leaves nothing half done that `_abandon` could not undo.

    Args:
        pool: The device memory.
        slots: Number of slots.
        host_limit: As ``host_bytes`` of `AdapterBank`.
    """

    def __init__(self, pool: Pool, slots: int, host_limit: int | None) -> None:
        self.changed = threading.Condition()
        self.entries: dict[str, Entry] = {}
        self.owner: list[Entry | None] = [None] * slots
        self.stats = BankStats(device_bytes=pool.nbytes)
        self._pool = pool
        self._host_limit = host_limit
        self._cached: OrderedDict[Entry, None] = OrderedDict()  # host copies, least used first
        self._cached_bytes = 0
        self._last_use: list[dict[int, torch.cuda.Event]] = [{} for _ in range(slots)]
        self._clock = 0

    def get(self, name: str) -> Entry:
        """The entry of a name.

        Raises:
            KeyError: there is none.
        """
        try:
            return self.entries[name]
        except KeyError:
            raise KeyError(f"no adapter {name!r} in the bank") from None

    def slot_of(self, entry: Entry) -> int | None:
        """The slot that an entry is in or is being loaded into."""
        slot = entry.slot
        return slot if slot is not None and self.owner[slot] is entry else None

    def held_by(self, holder: object, names: Iterable[str]) -> list[Entry]:
        """The entries of these names that ``holder`` holds."""
        found = (self.entries.get(name) for name in names)
        return [entry for entry in found if entry is not None and holder in entry.holders]

    def acquire(
        self,
        names: Sequence[str],
        holder: object,
        timeout: float,
        cancel: threading.Event | None,
    ) -> dict[str, int]:
        """Make adapters resident, all or none, in the name of ``holder``; give their slots."""
        started = time.perf_counter()
        held: list[Entry] = []
        loads: list[Entry] = []
        stalled = False
        try:
            while True:
                with self.changed:
                    absent = [e for e in map(self.get, names) if self.slot_of(e) is None]
                hosts = {entry: self._host_copy(entry, cancel) for entry in absent}
                with self.changed:
                    deadline = started + timeout
                    if not self._reserve(names, hosts, holder, held, loads, deadline, cancel):
                        continue  # evicted since: its host copy is needed after all
                    if not stalled:
                        self.stats.misses += len(loads)
                        self.stats.hits += len(names) - len(loads)
                    stalled |= bool(absent) or any(entry.loading for entry in held)
                while loads:
                    self._copy(loads[0], hosts[loads[0]], cancel)
                    del loads[0]
                with self.changed:
                    if self._settled(held, holder, cancel):
                        if stalled:
                            self.stats.stall_seconds += time.perf_counter() - started
                        return {entry.name: self._enter(entry) for entry in held}
        except BaseException:
            with self.changed:
                self._abandon(held, holder, loads)
            raise

    def acquired(self, entry: Entry) -> Call | None:
        """A holder of an entry that `release` may take off: a ``with`` block keeps its own."""
        return next((holder for holder in entry.holders if isinstance(holder, Call)), None)

    def release(self, entries: Iterable[Entry], holder: object | None) -> None:
        """Take a holder off entries, that of any `acquire` for None, and note the use on the device."""
        event = self._pool.mark()
        for entry in entries:
            slot = self.slot_of(entry)
            if event is not None and slot is not None:
                self._last_use[slot][self._pool.stream_key()] = event
            entry.holders.discard(self.acquired(entry) if holder is None else holder)
        self.changed.notify_all()

    def empty(self, entry: Entry) -> None:
        """Free the slot of an entry, and let a stale id of it mean an empty adapter."""
        slot = self.slot_of(entry)
        if slot is None:
            return
        self.owner[slot] = None
        entry.loading = False
        self.changed.notify_all()
        self._pool.clear(slot, self._last_use[slot].values())

    def rescale(self, entry: Entry) -> None:
        """Bring an entry's factor to its slot, if it is resident."""
        slot = self.slot_of(entry)
        if slot is not None and not entry.loading and entry.scaling is not None:
            entry.ready = self._pool.rescale(slot, entry.scaling, entry.factor)

    def keep_host(self, entry: Entry, host: HostAdapter) -> None:
        """Keep a host copy, at the expense of others that can be read again."""
        entry.host = host
        self.stats.host_bytes += host.nbytes
        if entry.read is None:
            return
        self._cached[entry] = None
        self._cached_bytes += host.nbytes
        while self._host_limit is not None and self._cached_bytes > self._host_limit:
            self.drop_host(next(iter(self._cached)))

    def drop_host(self, entry: Entry) -> None:
        """Drop a host copy; a slot keeps what it has."""
        if entry.host is not None:
            if entry in self._cached:
                del self._cached[entry]
                self._cached_bytes -= entry.host.nbytes
            self.stats.host_bytes -= entry.host.nbytes
            entry.host = None

    def _host_copy(self, entry: Entry, cancel: threading.Event | None) -> HostAdapter:
        """The adapter in host memory, read if need be; two threads do not read it twice."""
        with entry.reading:
            with self.changed:
                if entry.host is not None:
                    if entry in self._cached:
                        self._cached.move_to_end(entry)
                    return entry.host
            _check_cancel(cancel)
            assert entry.read is not None  # without it the host copy is never dropped
            started = time.perf_counter()
            try:
                host = entry.read()
            except Exception:
                with self.changed:
                    self.stats.failed_loads += 1
                raise
            with self.changed:
                self.stats.disk_reads += 1
                self.stats.disk_seconds += time.perf_counter() - started
                if self.entries.get(entry.name) is entry:
                    self.keep_host(entry, host)
            return host

    def _reserve(
        self,
        names: Sequence[str],
        hosts: Mapping[Entry, HostAdapter],
        holder: object,
        held: list[Entry],
        loads: list[Entry],
        deadline: float,
        cancel: threading.Event | None,
    ) -> bool:
        """Take all slots at once, so that two callers never wait for each other's half."""
        while True:
            entries = [self.get(name) for name in names]
            absent = [entry for entry in entries if self.slot_of(entry) is None]
            if any(entry not in hosts for entry in absent):
                return False
            slots = self._takeable(set(entries)) if absent else []
            if len(absent) <= len(slots):
                break
            left = deadline - time.perf_counter()
            if left <= 0:
                raise BankFullError(
                    f"{len(absent)} more slots are needed, but of {len(self.owner)} all but "
                    f"{len(slots)} are in use or pinned"
                )
            _check_cancel(cancel)
            self.changed.wait(min(left, threading.TIMEOUT_MAX if cancel is None else _POLL))
        for entry in entries:
            held.append(entry)
            entry.holders.add(holder)
            self._clock += 1
            entry.used = self._clock
        for entry, slot in zip(absent, slots, strict=False):
            evicts = self.owner[slot] is not None
            loads.append(entry)
            entry.slot, entry.loading, entry.ready = slot, True, None
            self.owner[slot] = entry
            self.stats.evictions += evicts
        return True

    def _takeable(self, keep: set[Entry]) -> list[int]:
        """Slots that may be filled: the empty ones, then the least recently used."""
        empty = [slot for slot, entry in enumerate(self.owner) if entry is None]
        victims = [
            (entry.used, slot)
            for slot, entry in enumerate(self.owner)
            if entry and not (entry.holders or entry.pinned or entry.loading or entry in keep)
        ]
        return empty + [slot for _, slot in sorted(victims)]

    def _copy(self, entry: Entry, host: HostAdapter, cancel: threading.Event | None) -> None:
        """Fill the slot that is reserved for an entry; called without the lock."""
        started, factor, slot = time.perf_counter(), entry.factor, self.slot_of(entry)
        assert slot is not None
        cancelled = _never if cancel is None else cancel.is_set
        ready = self._pool.write(slot, host, factor, self._last_use[slot].values(), cancelled)
        seconds = time.perf_counter() - started
        with self.changed:
            self._last_use[slot].clear()
            entry.ready, entry.scaling = ready, host.scaling
            entry.loading = False
            if entry.factor != factor:
                self.rescale(entry)
            self.stats.loads += 1
            self.stats.load_seconds += seconds
            self.stats.max_load_seconds = max(self.stats.max_load_seconds, seconds)
            self.stats.bytes_loaded += host.nbytes
            self.changed.notify_all()

    def _settled(self, held: list[Entry], holder: object, cancel: threading.Event | None) -> bool:
        """Wait for what other threads load; if one of them failed, let go of all for another try."""
        while any(entry.loading and self.slot_of(entry) is not None for entry in held):
            _check_cancel(cancel)
            self.changed.wait(None if cancel is None else _POLL)
        if all(self.slot_of(entry) is not None for entry in held):
            return True
        self._abandon(held, holder, [])
        held.clear()
        return False

    def _abandon(self, held: Iterable[Entry], holder: object, loads: Iterable[Entry]) -> None:
        """Undo what a call took: its holds, and the slots that it has not filled."""
        for entry in held:
            entry.holders.discard(holder)
        self.changed.notify_all()
        for entry in loads:
            if entry.loading:
                self.stats.failed_loads += 1
                self.empty(entry)

    def _enter(self, entry: Entry) -> int:
        """Let the caller's stream wait for an entry's copy; give its slot."""
        if entry.ready is not None and entry.ready.query():  # type: ignore[no-untyped-call]
            entry.ready = None
        self._pool.wait(entry.ready)
        slot = self.slot_of(entry)
        assert slot is not None  # held, so nobody takes it
        return slot


def _never() -> bool:
    return False


def _check_cancel(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise LoadCancelled("the load was cancelled")
