"""The adapters of one layer as stacks, and which row of a batch uses which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.device_numbers import constants
from fastlora.routing_ops import (
    TABLES,
    all_tables,
    build_tables,
    copy_all,
    route_op,
    sort_rows,
    tables_op,
)


@dataclass(frozen=True)
class AdapterStack:
    """``L`` adapters of one layer, in slots: what `fastlora.lora_linear_multi` gathers from.

    Slot ``l`` computes ``scaling[l] * x lora_A[l, :r]^T lora_B[l, :, :r]^T`` with ``r = ranks[l]``. What a
    slot holds past its rank is never read, so a slot may be reused for a smaller adapter as it is. All
    of it may change between calls without a recompilation, and between replays of a CUDA graph.

    Args:
        lora_A (Tensor): ``[L, R, K]``.
        lora_B (Tensor): ``[L, N, R]``.
        scaling (Tensor | float): ``[L]``, or one number for all. Default: 1.0.
        ranks (Tensor | None): int32 ``[L]``, each from 0 to R; 0 is an empty adapter. Default: ``None``,
            all R.

    Example:
        >>> import torch, fastlora
        >>> stack = fastlora.AdapterStack(torch.randn(4, 8, 64), torch.randn(4, 32, 8), scaling=2.0)
        >>> len(stack)
        4
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor | float = 1.0
    ranks: Tensor | None = None

    def __len__(self) -> int:
        return self.lora_A.shape[0]


@dataclass(eq=False)
class Routing:
    """Which rows use which adapter, as the kernels want it: made by `route` on the device, without a sync.

    One routing serves every layer of a step. Its tables have sizes that depend on the number of rows and
    slots alone, so a captured CUDA graph stays valid when the ids change: capture `route` with the
    layers, or keep the routing and call `update_` before each replay.
    """

    ids: Tensor
    """int32 ``[M]``: the slot of each row, -1 for none."""
    num_adapters: int
    """``L``: ids lie below it."""
    order: Tensor
    """int32 ``[M]``: rows sorted by id, stably; rows without an adapter come first."""
    sorted_ids: Tensor
    """int32 ``[M]``: ``ids[order]``."""
    version: int = 0
    """How often `update_` has changed it."""
    _tables: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _complete: tuple[Tensor, ...] = ()
    """What `complete_` made: apart, so that compiled code does not guard on what eager calls have made."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    def block_starts(self, block: int) -> Tensor:
        """Blocks of at most ``block`` rows of one adapter each, as positions in ``order``.

        Args:
            block (int): rows of a block.

        Returns:
            Tensor: int32 ``[min(M, cdiv(M, block) + L)]``; entries that are not used hold M.
        """
        return self._table("blocks", block)

    def segment_starts(self) -> Tensor:
        """Where each adapter that occurs begins in ``order``: int32 ``[min(M, L) + 1]``, then M."""
        return self._table("segments", 0)

    def tile_slots(self, block: int) -> Tensor:
        """The adapters that occur in each tile of ``block`` neighbouring rows.

        Args:
            block (int): rows of a tile.

        Returns:
            Tensor: int32 ``[cdiv(M, block), min(block, L)]``, ascending; -1 after the last one.
        """
        return self._table("tiles", block)

    def sorted_tile_slots(self, block: int) -> Tensor:
        """The adapters that occur in each tile of ``block`` sorted rows, as `tile_slots`.

        Args:
            block (int): rows of a tile.

        Returns:
            Tensor: int32 ``[cdiv(M, block), min(block, L)]``, ascending; -1 after the last one.
        """
        return self._table("sorted_tiles", block)

    def complete_(self) -> Routing:
        """Make every table now that a layer may ask for: compiled layers then share them, too.

        Compiled code takes them as they are. Of a routing without them each compiled layer makes its own,
        unless the compiler merges that work, which it does where there are gradients. A routing that
        compiled code made itself is complete.

        Returns:
            Routing: itself.
        """
        self._complete = tuple(all_tables(self.ids, self.sorted_ids, self.num_adapters))
        return self

    def update_(self, adapter_ids: Tensor) -> Routing:
        """Take other ids for the same number of rows, in place: tables keep their addresses.

        Args:
            adapter_ids (Tensor): as `route` takes it.

        Returns:
            Routing: itself.

        Raises:
            TypeError: as `route`.
            ValueError: as `route`, or the number of rows differs.
        """
        if tuple(adapter_ids.shape) != (len(self),):
            raise ValueError(
                f"adapter_ids must have shape ({len(self)},), as this routing, "
                f"got {tuple(adapter_ids.shape)}"
            )
        _check_ids(adapter_ids)
        adapter_ids, L = adapter_ids.to(self.ids.device), self.num_adapters
        rows = self.ids, self.order, self.sorted_ids
        if torch.compiler.is_compiling():
            copy_all(route_op(adapter_ids, L), rows)
        else:
            sort_rows(adapter_ids, L, out=rows)
        keys = (*self._tables, *(TABLES if self._complete else ()))
        tables = (*self._tables.values(), *self._complete)
        build_tables(keys, self.ids, self.sorted_ids, L, out=tables)
        self.version += 1
        return self

    def made(self) -> tuple[tuple[tuple[str, int], ...], tuple[Tensor, ...]]:
        """The tables that layers have asked for so far, for `with_tables`: what each is, and all tensors."""
        return tuple(self._tables), (self.ids, self.order, self.sorted_ids, *self._tables.values())

    @staticmethod
    def with_tables(
        num_adapters: int, kinds: Sequence[tuple[str, int]], tensors: Sequence[Tensor]
    ) -> Routing:
        """A routing with what `made` gave of one."""
        ids, order, sorted_ids, *tables = tensors
        known = dict(zip(kinds, tables, strict=True))
        return Routing(ids, num_adapters, order, sorted_ids, _tables=known)

    def _table(self, kind: str, block: int) -> Tensor:
        table = self._tables.get((kind, block))
        if table is None:
            (table,) = build_tables([(kind, block)], self.ids, self.sorted_ids, self.num_adapters)
            self._tables[kind, block] = table
        return table


def route(adapter_ids: Tensor, num_adapters: int) -> Routing:
    """Sort the rows of a batch by adapter, on their device and without a sync.

    Args:
        adapter_ids (Tensor): integer ``[M]``, one id a row of x; -1 is no adapter.
        num_adapters (int): number of slots ``L``; ids must be below it, which is asserted on the device,
            as `torch.nn.Embedding` does.

    Returns:
        Routing: to be passed to `fastlora.lora_linear_multi` of every layer of the step.

    Raises:
        TypeError: ``adapter_ids`` is not an integer tensor.
        ValueError: it is not one-dimensional, or, on the CPU, an id is outside [-1, num_adapters).

    Example:
        >>> import torch, fastlora
        >>> routing = fastlora.route(torch.tensor([2, -1, 0, 2]), num_adapters=4)
        >>> routing.order.tolist()
        [1, 2, 0, 3]
    """
    _check_ids(adapter_ids)
    if not torch.compiler.is_compiling():
        ids, order, sorted_ids = sort_rows(adapter_ids, num_adapters)
        return Routing(ids, num_adapters, order, sorted_ids)
    ids, order, sorted_ids = route_op(adapter_ids, num_adapters)
    tables = tuple(tables_op(ids, sorted_ids, num_adapters))
    return Routing(ids, num_adapters, order, sorted_ids, _complete=tables)


def _check_ids(adapter_ids: Tensor) -> None:
    """Raise unless they are integers in one dimension."""
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(f"adapter_ids must be a Tensor, got {type(adapter_ids).__name__}")
    if adapter_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapter_ids must be int32 or int64, got {adapter_ids.dtype}")
    if adapter_ids.dim() != 1:
        raise ValueError(f"adapter_ids must have one dimension, got {tuple(adapter_ids.shape)}")


def stack_adapters(
    adapters: Sequence[tuple[Tensor, Tensor]], scaling: Sequence[float] | float = 1.0
) -> AdapterStack:
    """Adapters that are parameters of their own, as one stack: for training several in one batch.

    Slot ``l`` holds the l-th pair, padded with zeros to the largest rank. Gradients reach each
    parameter in its own shape, so that each may have its own rank, optimizer and learning rate, and a
    parameter that no row uses gets zeros. What is past a rank costs no compute. Build the stack anew at
    every step: it copies the values of the parameters.

    Args:
        adapters (Sequence[tuple[Tensor, Tensor]]): pairs of ``lora_A [r, K]`` and ``lora_B [N, r]``, with
            one K, N, dtype and device for all and a rank each.
        scaling (Sequence[float] | float): one for each, or one for all. Default: 1.0.

    Returns:
        AdapterStack: for `fastlora.lora_linear_multi`.

    Raises:
        TypeError: an element is no pair of tensors, or a scaling is no number.
        ValueError: there is none, or shapes, dtypes or devices do not go together.

    Example:
        >>> import torch, fastlora
        >>> pairs = [(torch.randn(r, 64, requires_grad=True), torch.zeros(32, r)) for r in (4, 8)]
        >>> stack = fastlora.stack_adapters(pairs, scaling=[2.0, 1.0])
        >>> stack.lora_A.shape, stack.ranks.tolist()
        (torch.Size([2, 8, 64]), [4, 8])
    """
    pairs = list(adapters)
    if not pairs:
        raise ValueError("adapters must hold at least one pair, got none")
    for i, pair in enumerate(pairs):
        if (
            not isinstance(pair, tuple)
            or len(pair) != 2
            or not all(isinstance(t, Tensor) for t in pair)
        ):
            raise TypeError(f"adapters[{i}] must be a pair of Tensors (lora_A, lora_B)")
    first_a, first_b = pairs[0]
    for i, (lora_a, lora_b) in enumerate(pairs):
        if lora_a.dim() != 2 or lora_b.dim() != 2 or not lora_a.shape[0] == lora_b.shape[1] > 0:
            raise ValueError(
                f"adapters[{i}] must be (r, in_features) and (out_features, r), "
                f"got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            )
        for t, first in ((lora_a, first_a), (lora_b, first_b)):
            axis = 1 if t is lora_a else 0
            if t.shape[axis] != first.shape[axis]:
                raise ValueError(
                    f"adapters[{i}] must fit one layer, whose features are {first.shape[axis]} in "
                    f"adapters[0], got {t.shape[axis]}"
                )
            if (t.dtype, t.device) != (first_a.dtype, first_a.device):
                raise ValueError(
                    f"adapters[{i}] must be {first_a.dtype} on {first_a.device}, as adapters[0], "
                    f"got {t.dtype} on {t.device}"
                )
    if isinstance(scaling, Sequence) and len(scaling) != len(pairs):
        raise ValueError(f"scaling must have {len(pairs)} entries, got {len(scaling)}")
    factors = tuple(scaling) if isinstance(scaling, Sequence) else (scaling,) * len(pairs)
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"scaling must be numbers, got {factor!r}")
    ranks = tuple(lora_a.shape[0] for lora_a, _ in pairs)
    return AdapterStack(
        *padded_stacks(pairs),
        constants(
            factors, torch.float32, first_a.device
        ).clone(),  # the caller may change it in place
        constants(ranks, torch.int32, first_a.device).clone(),
    )


def padded_stacks(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """``lora_A [L, R, K]`` and ``lora_B [L, N, R]`` of pairs, zeros past a rank: differentiable in each."""
    R = max(lora_a.shape[0] for lora_a, _ in pairs)
    return (
        torch.stack([F.pad(a, (0, 0, 0, R - len(a))) if len(a) < R else a for a, _ in pairs]),
        torch.stack([F.pad(b, (0, R - b.shape[1])) if b.shape[1] < R else b for _, b in pairs]),
    )
