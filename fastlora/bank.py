"""A bank of adapters: all known ones in host memory or on disk, those in use in slots on the device."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapter_source import HostAdapter, Requirements, from_tensors, read_folder
from fastlora.adapters import AdapterStack
from fastlora.bank_pool import LoadCancelled, Pool, servable_layers
from fastlora.bank_slots import BankFullError, BankStats, Call, Entry, Slots
from fastlora.modules import FLOAT_DTYPES, MAX_RANK
from fastlora.routing_ops import NO_ADAPTER

__all__ = ["AdapterBank", "BankFullError", "BankStats", "LoadCancelled"]


_FP32_MAX = torch.finfo(torch.float32).max


class AdapterBank:
    """Many adapters of one model, of which ``slots`` are on the device at a time.

    Every adapted layer has a pool ``lora_A [slots, max_rank, in_features]`` and ``lora_B
    [slots, out_features, max_rank]`` at a fixed address, which `layer` shows as an `fastlora.AdapterStack`.
    An adapter takes the same slot in all layers; a layer that it does not target has rank 0 there. Slots
    are refilled least recently used first, never while they are in use or pinned. On CUDA, adapters are
    copied from pinned memory on a side stream, ordered by events after the slot's last use and before
    its next one, without a sync of the host. All methods may be called from any thread.

    Args:
        layers (nn.Module | Mapping[str, tuple[int, int]]): the model, or ``(out_features, in_features)``
            by the layer's name.
        slots (int): adapters on the device at a time.
        max_rank (int): the largest rank of an adapter, 1 to 256. Default: 64.
        target_modules (str | Iterable[str] | None): of a model, the linears with a pool, as
            `fastlora.inject` takes them. Default: ``None``, all but the output embedding.
        dtype (torch.dtype | None): of the pools. Default: ``None``, the model's, or float32.
        device (torch.device | str | None): of the pools. Default: ``None``, the model's, or the CPU.
        host_bytes (int | None): most bytes of host copies that could be read again from their folder;
            least recently used ones go first. Default: ``None``, no limit.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: one is out of range, or the model has no linear to serve.

    Example:
        >>> import torch, fastlora
        >>> bank = fastlora.AdapterBank({"proj": (32, 64)}, slots=2, max_rank=8)
        >>> tensors = {"proj.lora_A": torch.randn(4, 64), "proj.lora_B": torch.randn(32, 4)}
        >>> bank.add("mine", tensors, config={"lora_alpha": 8})
        >>> x, weight = torch.randn(2, 64), torch.randn(32, 64)
        >>> with bank.use(["mine", None]) as ids:
        ...     fastlora.lora_linear_multi(x, weight, bank.layer("proj"), ids).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        layers: nn.Module | Mapping[str, tuple[int, int]],
        slots: int,
        max_rank: int = 64,
        *,
        target_modules: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        host_bytes: int | None = None,
    ) -> None:
        """Allocate the pools."""
        for option, value, limit in (("slots", slots, None), ("max_rank", max_rank, MAX_RANK)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{option} must be an int, got {value!r}")
            if value < 1 or (limit is not None and value > limit):
                words = "at least 1" if limit is None else f"from 1 to {limit}"
                raise ValueError(f"{option} must be {words}, got {value}")
        if host_bytes is not None and (not isinstance(host_bytes, int) or host_bytes < 0):
            raise ValueError(f"host_bytes must be None or an int from 0, got {host_bytes!r}")
        shapes, dtype, device = _shapes(layers, target_modules, dtype, device)
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        self.slots, self.max_rank, self.dtype, self.device = slots, max_rank, dtype, device
        self._pool = Pool(shapes, slots, max_rank, dtype, device)
        self._needs = Requirements(shapes, max_rank, dtype, device.type == "cuda")
        self._books = Slots(self._pool, slots, host_bytes)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(self._needs.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, resident or not."""
        with self._books.changed:
            return tuple(self._books.entries)

    @property
    def resident(self) -> dict[str, int]:
        """Slots by the name of the adapter that is in them."""
        with self._books.changed:
            owners = enumerate(self._books.owner)
            return {entry.name: i for i, entry in owners if entry and not entry.loading}

    def __contains__(self, name: object) -> bool:
        with self._books.changed:
            return name in self._books.entries

    def __len__(self) -> int:
        return len(self._books.entries)

    def layer(self, name: str) -> AdapterStack:
        """The pool of a layer: the same tensors for the life of the bank.

        Args:
            name (str): the layer.

        Returns:
            AdapterStack: for `fastlora.lora_linear_multi`.

        Raises:
            KeyError: the bank has no such layer.
        """
        try:
            return self._pool.stacks[name]
        except KeyError:
            raise KeyError(f"the bank has no layer {name!r}") from None

    def add(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        *,
        config: Mapping[str, Any] | None = None,
        lazy: bool = False,
    ) -> None:
        """Register an adapter and read it into host memory, checked in full.

        Args:
            name (str): its name from now on.
            source (str | os.PathLike[str] | Mapping[str, Tensor]): a folder in PEFT's format, or tensors
                ``<layer>.lora_A`` ``(r, in_features)`` and ``<layer>.lora_B`` ``(out_features, r)``
                as PEFT or fastlora name them, which are copied.
            config (Mapping[str, Any] | None): for tensors, settings as in ``adapter_config.json``, of
                which ``lora_alpha`` must be there. Default: ``None``.
            lazy (bool): read a folder when it is first needed; errors come then. Default: ``False``.

        Raises:
            FileNotFoundError: a file is not there.
            TypeError: an argument has the wrong type.
            ValueError: the name is taken, or the adapter is broken, of an unsupported kind, or does not
                fit; the bank is then as it was.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a non-empty string, got {name!r}")
        self._check_free(name)
        host: HostAdapter | None
        started = time.perf_counter()
        if isinstance(source, Mapping):
            if lazy:
                raise ValueError("lazy must be False for tensors: there is nothing to read later")
            if not isinstance(config, Mapping) or "lora_alpha" not in config:
                raise ValueError("config must be a mapping with lora_alpha beside tensors")
            settings = {"peft_type": "LORA", **config}
            host = from_tensors(source, settings, self._needs, f"adapter {name!r}")
            entry = Entry(name, None)
        elif isinstance(source, (str, os.PathLike)):
            if config is not None:
                raise ValueError("config must be None for a folder, which has its own")
            folder = os.path.abspath(source)
            if not os.path.isdir(folder):
                raise FileNotFoundError(f"source must be a folder, there is none at {folder}")
            entry = Entry(name, lambda: read_folder(folder, self._needs))
            host = None if lazy else read_folder(folder, self._needs)
        else:
            raise TypeError(f"source must be a folder or a mapping, got {type(source).__name__}")
        seconds = time.perf_counter() - started
        with self._books.changed:
            self._check_free(name)
            self._books.entries[name] = entry
            if host is not None:
                if entry.read is not None:
                    self._books.stats.disk_reads += 1
                    self._books.stats.disk_seconds += seconds
                self._books.keep_host(entry, host)

    def load(
        self, name: str, *, timeout: float = 0.0, cancel: threading.Event | None = None
    ) -> int:
        """Make an adapter resident without holding it: a later call may evict it.

        Args:
            name (str): the adapter.
            timeout (float): as `acquire` takes it. Default: 0.0.
            cancel (threading.Event | None): as `acquire` takes it. Default: ``None``.

        Returns:
            int: its slot now.

        Raises:
            KeyError: as `acquire`, like the errors below it.
        """
        with self.use([name], timeout=timeout, cancel=cancel), self._books.changed:
            return _given(self._books.slot_of(self._books.get(name)))

    def acquire(
        self,
        names: Iterable[str | None],
        *,
        timeout: float = 0.0,
        cancel: threading.Event | None = None,
    ) -> list[int]:
        """Make adapters resident, all or none, and hold their slots until `release`.

        The caller's CUDA stream is made to wait for the copies; the host is not.

        Args:
            names (Iterable[str | None]): adapters, with repetitions; ``None`` is the frozen model.
            timeout (float): seconds to wait for slots that others hold. Default: 0.0.
            cancel (threading.Event | None): set it in another thread to give up. Default: ``None``.

        Returns:
            list[int]: a slot for each name, -1 for ``None``.

        Raises:
            BankFullError: too many slots are in use or pinned.
            FileNotFoundError: the files of a lazy adapter are not there.
            KeyError: an adapter is not in the bank.
            LoadCancelled: ``cancel`` was set.
            TypeError: ``names`` is a single string.
            ValueError: there are more adapters than slots, or a lazy adapter cannot be read.
        """
        names = _names(names)
        slots = self._acquire(_distinct(names), Call(), timeout, cancel)
        return [NO_ADAPTER if name is None else slots[name] for name in names]

    def release(self, names: Iterable[str | None]) -> None:
        """Give back what one `acquire` of the same names holds.

        What the caller's CUDA stream was given before is what the slots' next fillings wait for.

        Args:
            names (Iterable[str | None]): as given to `acquire`.

        Raises:
            RuntimeError: an adapter is not held.
        """
        with self._books.changed:
            entries = [self._books.get(name) for name in _distinct(_names(names))]
            for entry in entries:
                if self._books.acquired(entry) is None:
                    raise RuntimeError(f"adapter {entry.name!r} is not held: acquire it first")
            self._books.release(entries, None)

    @contextlib.contextmanager
    def use(
        self,
        names: Iterable[str | None],
        *,
        timeout: float = 0.0,
        cancel: threading.Event | None = None,
    ) -> Iterator[Tensor]:
        """Hold adapters inside a ``with`` block, which gets their slots as a tensor.

        Args:
            names (Iterable[str | None]): as `acquire` takes them.
            timeout (float): as `acquire` takes it. Default: 0.0.
            cancel (threading.Event | None): as `acquire` takes it. Default: ``None``.

        Yields:
            Tensor: int32 ``[len(names)]`` on the bank's device, -1 for ``None``: the ``adapter_ids`` of
            `fastlora.route` and `fastlora.lora_linear_multi`.
        """
        names = _names(names)
        wanted, holder = _distinct(names), object()
        try:
            slots = self._acquire(wanted, holder, timeout, cancel)
            yield self._pool.ids([NO_ADAPTER if name is None else slots[name] for name in names])
        finally:
            with self._books.changed:
                self._books.release(self._books.held_by(holder, wanted), holder)

    def pin(self, name: str, *, timeout: float = 0.0) -> int:
        """Make an adapter resident and keep it so until `unpin`.

        Args:
            name (str): the adapter.
            timeout (float): as `acquire` takes it. Default: 0.0.

        Returns:
            int: its slot.
        """
        with self.use([name], timeout=timeout), self._books.changed:
            entry = self._books.get(name)
            entry.pinned = True
            return _given(self._books.slot_of(entry))

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again.

        Args:
            name (str): the adapter.
        """
        with self._books.changed:
            self._books.get(name).pinned = False
            self._books.changed.notify_all()

    def unload(self, name: str) -> None:
        """Empty the slot of an adapter, if it has one; the adapter stays registered.

        Args:
            name (str): the adapter.

        Raises:
            KeyError: it is not in the bank.
            RuntimeError: it is in use or pinned.
        """
        with self._books.changed:
            entry = self._books.get(name)
            if entry.holders or entry.pinned:
                state = "in use" if entry.holders else "pinned"
                raise RuntimeError(f"adapter {name!r} is {state} and cannot be unloaded")
            self._books.empty(entry)

    def remove(self, name: str) -> None:
        """Unload an adapter and forget it.

        Args:
            name (str): the adapter.

        Raises:
            KeyError: it is not in the bank.
            RuntimeError: it is in use or pinned.
        """
        with self._books.changed:
            self.unload(name)
            self._books.drop_host(self._books.entries.pop(name))

    def set_scale(self, name: str, factor: float) -> None:
        """Multiply the scaling that an adapter came with, in all layers; 0 turns it off.

        What the caller's CUDA stream is given from now on sees it; batches of other streams that are in
        flight may see either value.

        Args:
            name (str): the adapter.
            factor (float): in place of an earlier factor.
        """
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"factor must be a number, got {factor!r}")
        with self._books.changed:
            entry = self._books.get(name)
            scaling = entry.scaling if entry.host is None else entry.host.scaling
            largest = 1.0 if scaling is None else max(1.0, float(scaling.abs().max()))
            if not abs(factor) <= _FP32_MAX / largest:  # nor NaN
                raise ValueError(
                    f"factor must be finite, beside the scaling of {name!r} in float32 too, got {factor}"
                )
            entry.factor = float(factor)
            self._books.rescale(entry)

    def stats(self) -> BankStats:
        """What happened so far.

        Returns:
            BankStats: a copy.
        """
        with self._books.changed:
            adapters, resident = len(self._books.entries), len(self.resident)
            return replace(self._books.stats, adapters=adapters, resident=resident)

    def _acquire(
        self, wanted: list[str], holder: object, timeout: float, cancel: threading.Event | None
    ) -> dict[str, int]:
        if len(wanted) > self.slots:
            raise ValueError(
                f"names asks for {len(wanted)} adapters, the bank has {self.slots} slots"
            )
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(f"timeout must be a number of seconds, got {timeout!r}")
        if math.isnan(timeout):
            raise ValueError("timeout must be a number of seconds, got nan")
        return self._books.acquire(wanted, holder, timeout, cancel)

    def _check_free(self, name: str) -> None:
        if name in self._books.entries:
            raise ValueError(f"name {name!r} is taken; remove that adapter first")


def _shapes(
    layers: nn.Module | Mapping[str, tuple[int, int]],
    target_modules: str | Iterable[str] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> tuple[dict[str, tuple[int, int]], torch.dtype, torch.device]:
    """Shapes by name, with dtype and device settled."""
    if device is not None:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    if isinstance(layers, nn.Module):
        weights = servable_layers(layers, target_modules)
        devices = {weight.device for weight in weights.values()}
        if device is None and len(devices) > 1:
            raise ValueError(
                f"the layers must be on one device, they are on {sorted(map(str, devices))}"
            )
        first = next(iter(weights.values()))
        shapes = {name: (w.shape[0], w.shape[1]) for name, w in weights.items()}
        return shapes, dtype or first.dtype, torch.device(device or first.device)
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers must be a model or a mapping, got {type(layers).__name__}")
    if target_modules is not None:
        raise ValueError("target_modules must be None where layers gives the shapes")
    if not layers:
        raise ValueError("layers must name at least one layer, got none")
    for name, shape in layers.items():
        fits = isinstance(shape, tuple) and len(shape) == 2
        if not fits or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"layers[{name!r}] must be (out_features, in_features), got {shape!r}")
    return dict(layers), dtype or torch.float32, torch.device(device or "cpu")


def _names(names: Iterable[str | None]) -> list[str | None]:
    if isinstance(names, str):
        raise TypeError(f"names must be a list of names, got the string {names!r}")
    if isinstance(names, (Set, Mapping)):
        raise TypeError(f"names must be a list of names, got a {type(names).__name__}")
    names = list(names)
    for name in names:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"names must hold strings and None, got {name!r}")
    return names


def _distinct(names: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name is not None))


def _given(slot: int | None) -> int:
    assert slot is not None  # asked for a held adapter
    return slot
