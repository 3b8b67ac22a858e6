"""Rows sorted by adapter: each row counts the rows that come before it, so that one launch sorts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import device_properties
from .config import cdiv
from .config_multi import route_block
from .launch import Launch, cached_plan

_PAST = tl.constexpr(2**31 - 1)  # an id behind every other


@triton.jit
def _count(
    acc, adapter_ids_ptr, own, first, last, stride,
    OR_EQUAL: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """``acc`` and how many of the ids from ``first`` to ``last`` are below each of ``own``, or equal to it.

    The counts ``[BLOCK, LANES]`` are those of LANES interleaved parts: a thread has a column of them.
    """
    for j in range(first, last, STEPS * LANES):
        for step in tl.static_range(STEPS):  # their loads are on the way together
            offs_j = j + step * LANES + tl.arange(0, LANES)
            other = tl.load(
                adapter_ids_ptr + offs_j.to(tl.int64) * stride, mask=offs_j < last, other=_PAST
            ).to(tl.int32)  # [LANES]
            if OR_EQUAL:
                acc += (other[None, :] <= own[:, None]).to(tl.int32)
            else:
                acc += (other[None, :] < own[:, None]).to(tl.int32)
    return acc


@triton.jit(do_not_specialize=["M", "L"])
def _lora_route_rows_kernel(
    adapter_ids_ptr, ids_ptr, order_ptr, sorted_ids_ptr, valid_ptr, M, L, stride,
    BLOCK: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``order[rank] = i`` and ``sorted_ids[rank] = id[i]`` with row i's rank in a stable sort.

    That is ``#{j < i: id[j] <= id[i]} + #{j > i: id[j] < id[i]}``. Also ``ids[i] = id[i]`` and ``valid``,
    whether each id is in [-1, L). Grid: ``(1 + cdiv(M, BLOCK),)``: the first program says whether they are
    valid, the others have BLOCK rows each. Ids that are not lose their high bits, and nothing is written
    out of bounds for them.
    """
    if tl.program_id(0) == 0:
        good = tl.full((CHUNK,), 1, dtype=tl.int32)
        for start in range(0, M, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            found = tl.load(
                adapter_ids_ptr + offs.to(tl.int64) * stride, mask=offs < M, other=-1
            )  # [CHUNK]
            good &= ((found >= -1) & (found < L)).to(tl.int32)
        tl.store(valid_ptr, tl.min(good, axis=0) != 0)
    else:
        start = (tl.program_id(0) - 1) * BLOCK
        offs_i = start + tl.arange(0, BLOCK)
        own = tl.load(
            adapter_ids_ptr + offs_i.to(tl.int64) * stride, mask=offs_i < M, other=_PAST
        ).to(tl.int32)  # [BLOCK]
        # Rows beside it: the only ones of which some come before a row and some after it.
        equal = (own[None, :] == own[:, None]) & (offs_i[None, :] < offs_i[:, None])
        rank = tl.sum(((own[None, :] < own[:, None]) | equal).to(tl.int32), axis=1)  # [BLOCK]
        acc = tl.zeros((BLOCK, LANES), dtype=tl.int32)
        acc = _count(acc, adapter_ids_ptr, own, 0, start, stride, True, LANES, STEPS)
        acc = _count(acc, adapter_ids_ptr, own, start + BLOCK, M, stride, False, LANES, STEPS)
        rank += tl.sum(acc, axis=1)
        tl.store(ids_ptr + offs_i, own, mask=offs_i < M)
        inside = (offs_i < M) & (rank < M)  # a wrong id may equal the padding
        tl.store(order_ptr + rank, offs_i, mask=inside)
        tl.store(sorted_ids_ptr + rank, own, mask=inside)


@cached_plan
def _plan(M: int, stride: int, dtype: torch.dtype, L: int, device: torch.device) -> Launch:
    block = route_block(M, device_properties(device)[1])
    return Launch(
        _lora_route_rows_kernel, (1 + cdiv(M, block),), device, M, L, stride,
        fixed=True, BLOCK=block, LANES=32, STEPS=8, CHUNK=1024, num_warps=4,
    )  # fmt: skip


def lora_route_rows(
    adapter_ids: Tensor, num_adapters: int, out: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Sort rows by adapter, stably, and say whether all ids are valid.

    Args:
        adapter_ids (Tensor): int32 or int64 ``[M]``, any stride; shares no memory with ``out``.
        num_adapters (int): ``L``.
        out (tuple[Tensor, Tensor, Tensor]): ``ids``, ``order`` and ``sorted_ids``, int32 ``[M]`` and dense,
            to write into.

    Returns:
        Tensor: bool, 0-dim: whether each id is in [-1, L). Where one is not, ``out`` is not to be used.
    """
    launch = _plan(
        adapter_ids.shape[0], adapter_ids.stride(0), adapter_ids.dtype, num_adapters,
        adapter_ids.device,
    )  # fmt: skip
    valid = torch.empty((), dtype=torch.bool, device=adapter_ids.device)
    launch(adapter_ids, *out, valid)
    return valid
