"""What routes the rows of a batch, as functions of tensors and as the ops that compiled code goes through.

The ops hold the eager code as it is: it reads ids on the CPU to check them, and what a compiler could fuse
of it runs once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.dispatch import HAS_TRITON, kernels_can_route
from fastlora.kernels.config import cdiv
from fastlora.kernels.config_multi import (
    FEW_BLOCK_M,
    MULTI_BLOCK_M,
    MULTI_SORTED_TILE,
    MULTI_TILES,
)

if HAS_TRITON:
    from fastlora.kernels.route_rows import lora_route_rows
    from fastlora.kernels.route_tables import lora_route_tables, makes_table

NO_ADAPTER = -1
"""The id of a row that uses no adapter: the frozen layer alone."""

TABLES = (
    *(("blocks", block) for block in sorted({MULTI_BLOCK_M, FEW_BLOCK_M})),
    ("segments", 0),
    *(("tiles", block) for block in MULTI_TILES),
    ("sorted_tiles", MULTI_SORTED_TILE),
)
"""Every table that the kernels of a layer may ask for."""


Rows = tuple[Tensor, Tensor, Tensor]
"""``ids``, ``order`` and ``sorted_ids`` of a `Routing`: int32 ``[M]``."""


def sort_rows(adapter_ids: Tensor, num_adapters: int, out: Rows | None = None) -> Rows:
    """Check ids ``[M]`` and sort them; with ``out`` what comes of it is written there, over other rows."""
    wrong = f"adapter_ids must be from -1 to {num_adapters - 1}"
    if kernels_can_route(adapter_ids):
        made = out or (_empty_as(adapter_ids), _empty_as(adapter_ids), _empty_as(adapter_ids))
        if out is not None and _shares_memory(adapter_ids, out):
            adapter_ids = adapter_ids.clone()  # a program may write what another has yet to read
        torch._assert_async(lora_route_rows(adapter_ids, num_adapters, made), wrong)
        _written(out or ())
        return made
    valid = ((adapter_ids >= NO_ADAPTER) & (adapter_ids < num_adapters)).all()
    if adapter_ids.device.type == "cpu":
        if not valid:
            found = adapter_ids[(adapter_ids < NO_ADAPTER) | (adapter_ids >= num_adapters)]
            raise ValueError(f"{wrong}, got {int(found[0])}")
    else:
        torch._assert_async(valid, wrong)
    sorted_ids, order = adapter_ids.sort(stable=True)
    # Its own copy: the caller may overwrite its ids for the next step.
    ids = adapter_ids.to(torch.int32, copy=True)
    made = ids, order.to(torch.int32), sorted_ids.to(torch.int32)
    if out is None:
        return made
    copy_all(made, out)
    return out


def copy_all(made: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Copy what was made to where it is wanted, flat or not."""
    for mine, other in zip(out, made, strict=True):
        mine.copy_(other.view(mine.shape))


def _empty_as(adapter_ids: Tensor) -> Tensor:
    return torch.empty(adapter_ids.shape, dtype=torch.int32, device=adapter_ids.device)


def _shares_memory(t: Tensor, others: Sequence[Tensor]) -> bool:
    storage = t.untyped_storage().data_ptr()
    return any(other.untyped_storage().data_ptr() == storage for other in others)


def _written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd of tensors that a kernel has written over, as torch's own operations do."""
    for t in tensors:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)


def build_tables(
    keys: Sequence[tuple[str, int]],
    ids: Tensor,
    sorted_ids: Tensor,
    num_adapters: int,
    out: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    """Tables of a `Routing`, of the kinds and blocks that ``keys`` names; written to ``out`` if it is there.

    On a GPU one launch makes as many as the kernels of a layer may ask for.
    """
    M, L = ids.shape[0], num_adapters
    if not kernels_can_route(ids) or not all(makes_table(*key) for key in keys):
        made = [build_table(*key, ids, sorted_ids, L) for key in keys]
        if out is None:
            return made
        copy_all(made, out)
        return out
    tables = out
    if tables is None:
        shapes = (table_shape(*key, M, L) for key in keys)
        tables = [torch.empty(shape, dtype=torch.int32, device=ids.device) for shape in shapes]
    lora_route_tables(keys, ids, sorted_ids, L, tables)
    _written(out or ())
    return tables


def is_of_tiles(kind: str) -> bool:
    """Whether a table has the slots of tiles, of the rows as they come or sorted."""
    return kind in ("tiles", "sorted_tiles")


def table_shape(kind: str, block: int, M: int, L: int) -> tuple[int, ...]:
    """The shape of a table of M rows and L adapters."""
    if is_of_tiles(kind):
        return cdiv(M, block), min(block, L)
    return (min(M, cdiv(M, block) + L) if kind == "blocks" else min(M, L) + 1,)


def build_table(
    kind: str, block: int, ids: Tensor, sorted_ids: Tensor, num_adapters: int
) -> Tensor:
    """One of `build_tables` by torch: of ``block`` rows, or ``"segments"``."""
    M, device = ids.shape[0], ids.device
    shape = table_shape(kind, block, M, num_adapters)
    if is_of_tiles(kind):
        tiles, width = shape
        padded = torch.full((tiles * block,), NO_ADAPTER, dtype=torch.int32, device=device)
        padded[:M] = ids if kind == "tiles" else sorted_ids
        found = padded.view(tiles, block).sort(dim=1).values
        first = torch.ones_like(found, dtype=torch.bool)
        first[:, 1:] = found[:, 1:] != found[:, :-1]
        first &= found != NO_ADAPTER
        column = (first.cumsum(1) - 1).masked_fill(~first, width)  # the last column is a bin
        slots = found.new_full((tiles, width + 1), NO_ADAPTER)
        return slots.scatter_(1, column, found)[:, :width].contiguous()
    (size,) = shape
    position = torch.arange(M, dtype=torch.int32, device=device)
    new = torch.ones(M, dtype=torch.bool, device=device)
    new[1:] = sorted_ids[1:] != sorted_ids[:-1]
    if kind == "blocks":
        begin = torch.where(new, position, 0).cummax(0).values
        new = (position - begin) % block == 0
    new &= sorted_ids != NO_ADAPTER
    index = (new.cumsum(0) - 1).masked_fill(~new, size)
    starts = position.new_full((size + 1,), M)
    return starts.scatter_(0, index, position)[:size].contiguous()


@torch.library.custom_op(
    "fastlora::route",
    mutates_args=(),
    schema="(Tensor adapter_ids, SymInt num_adapters) -> (Tensor, Tensor, Tensor)",
)
def route_op(adapter_ids: Tensor, num_adapters: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_rows`."""
    return sort_rows(adapter_ids, num_adapters)


@route_op.register_fake
def _(adapter_ids: Tensor, num_adapters: int) -> tuple[Tensor, Tensor, Tensor]:
    ids, order, sorted_ids = (
        adapter_ids.new_empty(adapter_ids.shape, dtype=torch.int32) for _ in range(3)
    )
    return ids, order, sorted_ids


def all_tables(ids: Tensor, sorted_ids: Tensor, num_adapters: int) -> list[Tensor]:
    """Each of `TABLES`, flat: a dimension of unknown size beside another is one that a compiler guards on."""
    return [table.flatten() for table in build_tables(TABLES, ids, sorted_ids, num_adapters)]


def unflattened(tables: Sequence[Tensor], num_adapters: int) -> dict[tuple[str, int], Tensor]:
    """What `all_tables` gives, as a `Routing` keeps it."""
    return {
        (kind, block): table.view(-1, min(block, num_adapters)) if is_of_tiles(kind) else table
        for (kind, block), table in zip(TABLES, tables, strict=True)
    }


tables_op = torch.library.custom_op(
    "fastlora::routing_tables",
    all_tables,
    mutates_args=(),
    schema="(Tensor ids, Tensor sorted_ids, SymInt num_adapters) -> Tensor[]",
)


@tables_op.register_fake
def _(ids: Tensor, sorted_ids: Tensor, num_adapters: int) -> list[Tensor]:
    M, L = ids.shape[0], num_adapters
    smaller: Any = torch.sym_min  # min would decide, and guard on it

    def size(kind: str, block: int) -> Any:
        if is_of_tiles(kind):
            return cdiv(M, block) * smaller(block, L)
        if kind == "blocks":
            return smaller(M, cdiv(M, block) + L)
        return smaller(M, L) + 1

    return [ids.new_empty((size(*key),)) for key in TABLES]
