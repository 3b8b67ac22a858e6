"""The tables of a routing, several of them in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import cdiv
from .config_multi import ROUTE_TILE, route_chunk
from .launch import Launch, cached_plan, recording
from .tape import CannotRecordError


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _starts(starts_ptr, sorted_ids_ptr, M, size, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Positions where an adapter begins, or, with ROWS > 0, where each ROWS of its rows begin; then M.

    One program walks over all positions, CHUNK at a time: what it carries is how many it has written, and
    where the last adapter began.
    """
    count, begin = 0, 0
    for start in range(0, M, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        ids = tl.load(sorted_ids_ptr + offs, mask=offs < M, other=-1)  # [CHUNK]
        before = tl.load(sorted_ids_ptr + offs - 1, mask=(offs > 0) & (offs < M), other=-1)
        here = ids != before
        if ROWS > 0:
            begins = tl.associative_scan(tl.where(here, offs, begin), 0, _larger)  # [CHUNK]
            begin = tl.max(begins, axis=0)
            here = (offs - begins) % ROWS == 0
        here &= ids >= 0
        index = count + tl.cumsum(here.to(tl.int32), axis=0) - 1  # [CHUNK]
        tl.store(starts_ptr + index, offs, mask=here & (index < size))
        count += tl.sum(here.to(tl.int32), axis=0)
    for start in range(count, size, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        tl.store(starts_ptr + offs, tl.zeros((CHUNK,), dtype=tl.int32) + M, mask=offs < size)


@triton.jit
def _slots(slots_ptr, ids_ptr, tile, M, L, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The adapters that occur in one tile of BLOCK rows, ascending, then -1.

    Its rows are compared with STEP of them at a time, which keeps the registers few.
    """
    width = tl.minimum(L, BLOCK)
    offs = tl.arange(0, BLOCK)
    rows = tile * BLOCK + offs
    ids = tl.load(ids_ptr + rows, mask=rows < M, other=-1)  # [BLOCK]
    seen = tl.zeros((BLOCK, STEP), dtype=tl.int32)  # rows before it of the same adapter
    column = tl.zeros((BLOCK, STEP), dtype=tl.int32)  # adapters below its own
    for j in range(0, BLOCK, STEP):
        offs_j = j + tl.arange(0, STEP)
        others = tl.load(
            ids_ptr + tile * BLOCK + offs_j, mask=tile * BLOCK + offs_j < M, other=-1
        )  # [STEP]
        before = (ids[None, :] == others[:, None]) & (offs[None, :] < offs_j[:, None])
        counts = (others >= 0) & (tl.sum(before.to(tl.int32), axis=1) == 0)  # [STEP]
        column += (counts[None, :] & (others[None, :] < ids[:, None])).to(tl.int32)
        same = (others[None, :] == ids[:, None]) & (offs_j[None, :] < offs[:, None])
        seen += same.to(tl.int32)
    first = (ids >= 0) & (tl.sum(seen, axis=1) == 0)  # [BLOCK]: an adapter's first row
    at = tl.sum(column, axis=1)  # [BLOCK]
    count = tl.sum(first.to(tl.int32), axis=0)
    to = slots_ptr + tile * width
    tl.store(to + at, ids, mask=first & (at < width))
    tl.store(to + offs, tl.full((BLOCK,), -1, tl.int32), mask=(offs >= count) & (offs < width))


@triton.jit(do_not_specialize=["M", "L"])
def _lora_route_tables_kernel(
    ids_ptr, sorted_ids_ptr, blocks_ptr, other_blocks_ptr, segments_ptr, tiles_ptr, other_tiles_ptr,
    sorted_tiles_ptr, M, L,
    ROWS: tl.constexpr, OTHER_ROWS: tl.constexpr,
    TILE: tl.constexpr, OTHER_TILE: tl.constexpr, SORTED_TILE: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Tables of `fastlora.adapters.Routing`: blocks of two sizes, segments, the slots of tiles of two sizes.

    And the slots of tiles of the sorted rows.

    Those without a pointer are left out. Grid: one program for the blocks of a size, one for the segments,
    then one for each tile.
    """
    program = tl.program_id(0)
    if blocks_ptr is not None:
        if program == 0:
            size = tl.minimum(M, tl.cdiv(M, ROWS) + L)
            _starts(blocks_ptr, sorted_ids_ptr, M, size, ROWS, CHUNK)
        program -= 1
    if other_blocks_ptr is not None:
        if program == 0:
            size = tl.minimum(M, tl.cdiv(M, OTHER_ROWS) + L)
            _starts(other_blocks_ptr, sorted_ids_ptr, M, size, OTHER_ROWS, CHUNK)
        program -= 1
    if segments_ptr is not None:
        if program == 0:
            _starts(segments_ptr, sorted_ids_ptr, M, tl.minimum(M, L) + 1, 0, CHUNK)
        program -= 1
    if tiles_ptr is not None:
        tiles = tl.cdiv(M, TILE)
        if (program >= 0) & (program < tiles):
            _slots(tiles_ptr, ids_ptr, program, M, L, TILE, STEP)
        program -= tiles
    if other_tiles_ptr is not None:
        tiles = tl.cdiv(M, OTHER_TILE)
        if (program >= 0) & (program < tiles):
            _slots(other_tiles_ptr, ids_ptr, program, M, L, OTHER_TILE, STEP)
        program -= tiles
    if sorted_tiles_ptr is not None:  # noqa: SIM102 - decided when compiling, so it stands alone
        if program >= 0:
            _slots(sorted_tiles_ptr, sorted_ids_ptr, program, M, L, SORTED_TILE, STEP)


@cached_plan
def _plan(
    M: int,
    L: int,
    rows: int | None,
    other_rows: int | None,
    has_segments: bool,
    tile: int | None,
    other_tile: int | None,
    sorted_tile: int | None,
    device: torch.device,
) -> Launch:
    blocks = [block for block in (tile, other_tile, sorted_tile) if block is not None]
    tiles = sum(cdiv(M, block) for block in blocks)
    starts = (rows is not None) + (other_rows is not None) + has_segments
    return Launch(
        _lora_route_tables_kernel, (starts + tiles,), device, M, L,
        fixed=True, ROWS=rows or 0, OTHER_ROWS=other_rows or 0, TILE=tile or 0,
        OTHER_TILE=other_tile or 0, SORTED_TILE=sorted_tile or 0,
        CHUNK=route_chunk(M), STEP=min([16, *blocks]), num_warps=8,
    )  # fmt: skip


def makes_table(kind: str, block: int) -> bool:
    """Whether `lora_route_tables` makes tables of a kind with such a block.

    Args:
        kind (str): ``"blocks"``, ``"segments"``, ``"tiles"`` or ``"sorted_tiles"``.
        block (int): rows of a block or a tile.
    """
    return kind in ("blocks", "segments") or (0 < block <= ROUTE_TILE and block & (block - 1) == 0)


def lora_route_tables(
    keys: Sequence[tuple[str, int]],
    ids: Tensor,
    sorted_ids: Tensor,
    num_adapters: int,
    out: Sequence[Tensor],
) -> None:
    """Write tables of a routing: up to two of blocks and two of tiles in a launch, one of the other kinds.

    Args:
        keys (Sequence[tuple[str, int]]): the kind and the block of each, which `makes_table` says yes to.
        ids (Tensor): int32 ``[M]``, M > 0, dense.
        sorted_ids (Tensor): likewise.
        num_adapters (int): ``L``.
        out (Sequence[Tensor]): where to write them: int32, dense.

    Raises:
        CannotRecordError: this thread is recording: the layers of a step share the tables, so that none of
            them is to make its own each time.
    """
    if recording.tape is not None:
        raise CannotRecordError("a table of a routing among what it makes")
    left: dict[str, list[tuple[int, Tensor]]] = {
        "blocks": [], "segments": [], "tiles": [], "sorted_tiles": []
    }  # fmt: skip
    for (kind, block), table in zip(keys, out, strict=True):
        left[kind].append((block, table))

    def take(kind: str) -> tuple[int, Tensor] | tuple[None, None]:
        return left[kind].pop(0) if left[kind] else (None, None)

    while any(left.values()):
        (rows, blocks), (other_rows, other_blocks) = take("blocks"), take("blocks")
        (_, segments), (tile, tiles), (other_tile, other_tiles), (sorted_tile, sorted_tiles) = map(
            take, ("segments", "tiles", "tiles", "sorted_tiles")
        )
        launch = _plan(
            ids.shape[0], num_adapters, rows, other_rows, segments is not None, tile, other_tile,
            sorted_tile, ids.device,
        )  # fmt: skip
        launch(ids, sorted_ids, blocks, other_blocks, segments, tiles, other_tiles, sorted_tiles)
