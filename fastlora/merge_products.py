"""Writing the sums that merging makes: one launch for all that are alike, in place of one each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastlora import reference
from fastlora.dispatch import HAS_TRITON, problem_for

if HAS_TRITON:
    from fastlora.kernels.lora_merge import lora_merge
    from fastlora.kernels.lora_merge_many import lora_merge_many

_FEWEST, _MOST = 4, 65535
"""Products of one launch: fewer are launched by themselves as soon, more than a grid has no room for."""

_compiled_for: set[tuple[Any, ...]] = set()
"""The groups of which one product was launched by itself, as all are while a CUDA graph is captured."""


class Product(NamedTuple):
    """A 2-D part of a weight, where its sum goes, and ``scaling * lora_B lora_A``, or nothing, to add."""

    part: Tensor
    out: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0


def write(product: Product) -> None:
    """Write one sum, or a copy where nothing is added.

    Args:
        product: What to add, and where it goes.
    """
    part, out, a, b, scaling = product
    if a is None or b is None:
        out.copy_(part)
    elif problem_for(part, part, a, b):
        reference.lora_merge(part, a, b, scaling, out)
    else:
        lora_merge(part, a, b, scaling, out)
        increment_version(out)  # the kernel's writes are not seen by autograd


def write_all(products: Sequence[Product]) -> None:
    """Write sums, as `write` does one after the other: bit for bit, whatever shares its memory.

    Args:
        products: What to add, and where it goes.
    """
    groups = _groups(products) if len(products) >= _FEWEST else None
    if groups is None:
        groups = {(): _Group(False, (), list(products))}
    together: dict[torch.device, list[list[Any]]] = {}
    for key, group in groups.items():
        alone = group.unaligned
        if not _pays(group):
            alone = group.members + alone
        else:
            if key not in _compiled_for:  # what a graph launches, which cannot compile it
                _compiled_for.add(key)
                alone = [group.members.pop(), *alone]
            device = group.members[0].part.device
            together.setdefault(device, []).append(group.members)
        for product in alone:
            write(product)
    for of_device in together.values():
        lora_merge_many(of_device)
        increment_version([product.out for group in of_device for product in group])


@dataclass
class _Group:
    """Products that differ in their addresses and scalings alone."""

    together: bool
    """Whether one launch can take them."""
    spans: tuple[int, ...]
    """Bytes from the first to the last element of each tensor."""
    members: list[Any] = field(default_factory=list)
    unaligned: list[Product] = field(default_factory=list)
    """Those of them with a tensor that vectors of 16 bytes cannot address."""


def _groups(products: Sequence[Product]) -> dict[tuple[Any, ...], _Group] | None:
    """Part products into those alike; ``None`` where it matters which of them is written first."""
    found: dict[tuple[Any, ...], _Group] = {}
    spans: list[tuple[int, int, bool]] = []
    for product in products:
        w, out, a, b, _ = product
        # What a launch depends on, without asking twice: it is asked for hundreds of layers.
        key: tuple[Any, ...] = (
            type(w), type(out), w.dtype, out.dtype, w.get_device(), out.get_device(),
            w.shape, w.stride(), out.stride(),
        )  # fmt: skip
        if a is not None and b is not None:
            key += (
                type(a), type(b), a.dtype, b.dtype, a.get_device(), b.get_device(),
                a.shape, a.stride(), b.stride(),
            )  # fmt: skip
        group = found.get(key)
        if group is None:
            group = _new_group(product)
            if group is None:
                return None
            found[key] = group
        sizes = group.spans
        read, written = w.data_ptr(), out.data_ptr()
        addresses = read | written
        spans.append((written, written + sizes[1], True))
        if read != written or w.stride() != out.stride():  # in place a program reads its own tile
            spans.append((read, read + sizes[0], False))
        if a is not None and b is not None:
            start_a, start_b = a.data_ptr(), b.data_ptr()
            addresses |= start_a | start_b
            spans.append((start_a, start_a + sizes[2], False))
            spans.append((start_b, start_b + sizes[3], False))
        (group.unaligned if addresses & 15 else group.members).append(product)
    return None if _overlap(spans) else found


def _new_group(first: Product) -> _Group | None:
    """A group for what is like ``first``; ``None`` where a tensor has no address."""
    w, out, a, b, _ = first
    tensors = [w, out] if a is None or b is None else [w, out, a, b]
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in tensors):
        return None
    together = (
        a is not None
        and b is not None
        and out.dtype is w.dtype
        and len({t.device for t in tensors}) == 1
        and not problem_for(w, w, a, b)
    )
    return _Group(together, tuple([_span(t) for t in tensors]))


def _span(t: Tensor) -> int:
    (rows, columns), (row, column) = t.shape, t.stride()
    if not rows or not columns:
        return 0
    return ((rows - 1) * row + (columns - 1) * column + 1) * t.element_size()


def _pays(group: _Group) -> bool:
    """Whether one launch takes the products of a group."""
    if not group.together or not _FEWEST <= len(group.members) <= _MOST:
        return False
    device = group.members[0].part.device
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()  # where no table can be made


def _overlap(spans: list[tuple[int, int, bool]]) -> bool:
    """Whether something written shares memory with anything else that is written or read."""
    end = end_written = 0
    for start, stop, writes in sorted(spans):
        if start < end_written or (writes and start < end):
            return True
        if stop > end:
            end = stop
        if writes:
            end_written = stop
    return False
