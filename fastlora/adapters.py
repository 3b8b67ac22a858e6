"""The adapters of one layer as stacks, and which row of a batch uses which of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

NO_ADAPTER = -1
"""The id of a row that uses no adapter: the frozen layer alone."""


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
        new = route(adapter_ids.to(self.ids.device), self.num_adapters)
        for mine, other in (
            (self.ids, new.ids),
            (self.order, new.order),
            (self.sorted_ids, new.sorted_ids),
        ):
            mine.copy_(other)
        for key, table in self._tables.items():
            table.copy_(self._build(*key))
        self.version += 1
        return self

    def _table(self, kind: str, block: int) -> Tensor:
        table = self._tables.get((kind, block))
        if table is None:
            table = self._tables[kind, block] = self._build(kind, block)
        return table

    def _build(self, kind: str, block: int) -> Tensor:
        M, L, device = len(self), self.num_adapters, self.ids.device
        if kind == "tiles":
            tiles, width = -(-M // block), min(block, L)
            padded = torch.full((tiles * block,), NO_ADAPTER, dtype=torch.int32, device=device)
            padded[:M] = self.ids
            found = padded.view(tiles, block).sort(dim=1).values
            first = torch.ones_like(found, dtype=torch.bool)
            first[:, 1:] = found[:, 1:] != found[:, :-1]
            first &= found != NO_ADAPTER
            column = (first.cumsum(1) - 1).masked_fill(~first, width)  # the last column is a bin
            slots = found.new_full((tiles, width + 1), NO_ADAPTER)
            return slots.scatter_(1, column, found)[:, :width].contiguous()
        position = torch.arange(M, dtype=torch.int32, device=device)
        new = torch.ones(M, dtype=torch.bool, device=device)
        new[1:] = self.sorted_ids[1:] != self.sorted_ids[:-1]
        if kind == "blocks":
            begin = torch.where(new, position, 0).cummax(0).values
            new = (position - begin) % block == 0
            size = min(M, -(-M // block) + L)
        else:
            size = min(M, L) + 1
        new &= self.sorted_ids != NO_ADAPTER
        index = (new.cumsum(0) - 1).masked_fill(~new, size)
        starts = position.new_full((size + 1,), M)
        return starts.scatter_(0, index, position)[:size].contiguous()


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
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(f"adapter_ids must be a Tensor, got {type(adapter_ids).__name__}")
    if adapter_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapter_ids must be int32 or int64, got {adapter_ids.dtype}")
    if adapter_ids.dim() != 1:
        raise ValueError(f"adapter_ids must have one dimension, got {tuple(adapter_ids.shape)}")
    valid = ((adapter_ids >= NO_ADAPTER) & (adapter_ids < num_adapters)).all()
    if adapter_ids.device.type == "cpu":
        if not valid:
            wrong = adapter_ids[(adapter_ids < NO_ADAPTER) | (adapter_ids >= num_adapters)]
            raise ValueError(
                f"adapter_ids must be from -1 to {num_adapters - 1}, got {int(wrong[0])}"
            )
    else:
        torch._assert_async(valid, f"adapter_ids must be from -1 to {num_adapters - 1}")
    sorted_ids, order = adapter_ids.sort(stable=True)
    return Routing(
        # Its own copy: the caller may overwrite its ids for the next step.
        adapter_ids.to(torch.int32, copy=True),
        num_adapters,
        order.to(torch.int32),
        sorted_ids.to(torch.int32),
    )
