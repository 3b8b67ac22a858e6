"""``y = x W^T + bias + s B[id]^T``: where a tile's rows share an adapter, as fast as with a single one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    add_bias,
    aligned,
    device_properties,
    dot,
    dot_precision,
    has_pdl,
    late_wait_step,
    multiple,
    rank_of,
    rows_fit_tma,
    store_tile,
    tile_of,
    wait_for_previous_kernel,
)
from .config import LaunchConfig, cdiv, gemm_boxes, next_power_of_2, rank_step, vector
from .config_multi import (
    MULTI_GATHER_ABOVE,
    MULTI_RING_CHUNK,
    multi_ring_config,
    slots_at_once,
)
from .launch import Launch, cached_plan
from .multi_slots import add_slot_products


@triton.jit
def _slot(slots_ptr, ranks_ptr, tile_m, place, here, R, width):
    """The slot at a place of a tile's list, and its rank: -1 and 0 where there is none."""
    slot = tl.load(
        slots_ptr + tile_m.to(tl.int64) * width + place, mask=here & (place < width), other=-1
    )
    rank = tl.where(slot >= 0, rank_of(ranks_ptr, tl.maximum(slot, 0), R), 0)
    return slot, rank


@triton.jit
def _adapters_of_tile(slots_ptr, ranks_ptr, tile_m, here, R, width, MOST: tl.constexpr):
    """How many adapters a tile's rows have, one at least: up to MOST, 1 or 2, that TMA can read, or 0.

    TMA begins at multiples of 16 bytes, and what it reads past a rank could not be masked.
    """
    _, rank = _slot(slots_ptr, ranks_ptr, tile_m, 0, here, R, width)
    second, second_rank = _slot(slots_ptr, ranks_ptr, tile_m, 1, here, R, width)
    after, _ = _slot(slots_ptr, ranks_ptr, tile_m, MOST, here, R, width)
    fits = here & (after < 0) & (rank % 8 == 0) & (second_rank % 8 == 0)
    return tl.where(fits, 1 + (second >= 0).to(tl.int32), 0)


@triton.jit
def _load_right(
    desc, slot, row, column, N, NK: tl.constexpr, DEPTH: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Columns of one slot of a right operand, ``[slots N, depth]`` or ``[slots, depth, N]``."""
    if NK:
        return desc.load([slot * N + column, row]).T  # [DEPTH, BLOCK_N]
    else:
        return desc.load([slot, row, column]).reshape(DEPTH, BLOCK_N)


@triton.jit
def _tiles_with(
    slots_ptr, ranks_ptr, first, programs, tiles_m, tiles_n, R, width,
    COUNT: tl.constexpr, MOST: tl.constexpr, GROUP_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Which of a program's next CHUNK tiles have COUNT adapters, four bits a number, and how many.

    A number, since a flattened loop that finds them as it goes would carry a variable, and not be pipelined.
    """
    offs = tl.arange(0, CHUNK)
    tile = first + offs * programs
    here = tile < tiles_m * tiles_n
    tile_m, _ = tile_of(tile, tiles_m, tiles_n, GROUP_M)
    adapters = _adapters_of_tile(slots_ptr, ranks_ptr, tile_m, here, R, width, MOST)  # [CHUNK]
    found = adapters == COUNT
    at = tl.cumsum(found.to(tl.int32), 0) - 1
    numbers = tl.sum(tl.where(found, offs.to(tl.int64) << (4 * at), 0), axis=0)
    return numbers, tl.sum(found.to(tl.int32), axis=0)


@triton.jit
def _make_tiles_with(
    x_desc, w_desc, s_desc, b_desc, y_desc, bias_ptr, slots_ptr, ranks_ptr,
    M, N, K, R, width, tiles_m, tiles_n, tiles, wait_at,
    COUNT: tl.constexpr, MOST: tl.constexpr,
    W_IS_NK: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """The tiles with COUNT adapters, by a flattened loop whose last steps are their rank products."""
    programs = tl.num_programs(0)
    k_steps, r_steps = tl.cdiv(K, BLOCK_K), tl.cdiv(R, BLOCK_K)
    first = tl.program_id(0)
    while first < tiles:
        numbers, count = _tiles_with(
            slots_ptr, ranks_ptr, first, programs, tiles_m, tiles_n, R, width, COUNT, MOST, GROUP_M, CHUNK
        )  # fmt: skip
        for i in tl.range(0, count, flatten=True):
            tile = first + ((numbers >> (4 * i)) & 15).to(tl.int32) * programs
            tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
            start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
            slot, rank = _slot(slots_ptr, ranks_ptr, tile_m, 0, True, R, width)
            if COUNT == 2:
                second, second_rank = _slot(slots_ptr, ranks_ptr, tile_m, 1, True, R, width)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for step in range(0, k_steps + COUNT * r_steps):
                if step == wait_at:
                    wait_for_previous_kernel(PDL)
                if step < k_steps:
                    left, right, row, held, start_k = x_desc, w_desc, start_m, 0, step * BLOCK_K
                else:
                    left, right, row, held = s_desc, b_desc, start_m, tl.maximum(slot, 0)
                    start_k = rank - (step - k_steps + 1) * BLOCK_K
                    if COUNT == 2:  # noqa: SIM102 - decided when compiling
                        if step >= k_steps + r_steps:
                            row, held = start_m + M, second
                            start_k = second_rank - (step - k_steps - r_steps + 1) * BLOCK_K
                a = left.load([row, start_k])  # [BLOCK_M, BLOCK_K]
                b = _load_right(right, held, start_k, start_n, N, W_IS_NK, BLOCK_K, BLOCK_N)
                acc = dot(a, b, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
            if HAS_BIAS:
                acc = add_bias(acc, bias_ptr, start_n.to(tl.int64) + tl.arange(0, BLOCK_N), N)
            store_tile(y_desc, acc, start_m, start_n, BLOCK_M, BLOCK_N, SUBTILES)
        first += programs * CHUNK


@triton.jit
def _is_scattered(slots_ptr, tiles_m, width, LIMIT: tl.constexpr, CHUNK: tl.constexpr):
    """Whether more than half of the tiles have more than LIMIT adapters."""
    count = 0
    if width > LIMIT:
        for start in range(0, tiles_m, CHUNK):
            tile_m = start + tl.arange(0, CHUNK)
            slot = tl.load(
                slots_ptr + tile_m.to(tl.int64) * width + LIMIT, mask=tile_m < tiles_m, other=-1
            )  # [CHUNK]
            count += tl.sum((slot >= 0).to(tl.int32), axis=0)
    return 2 * count > tiles_m


@triton.jit
def _lora_multi_gemm_ring_kernel(
    x_desc, w_desc, s_desc, b_desc, y_desc,
    x_ptr, y_ptr, s_ptr, b_ptr, bias_ptr, ids_ptr, slots_ptr, order_ptr, sorted_slots_ptr, ranks_ptr,
    M, N, K, R, width, stride_xm, stride_sm, stride_bl, stride_bn, stride_br,
    W_IS_NK: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, K_VECTOR: tl.constexpr,
    CHUNK: tl.constexpr, MIXED_STAGES: tl.constexpr, MOST: tl.constexpr, GATHER_ABOVE: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """``y = [x s] [W B[id]]^T + bias`` by TMA. Grid: persistent, one program an SM.

    Tiles whose rows share an adapter go through a flattened loop, as in `_lora_forward_tma_kernel`, with the
    rank product as last steps. The last of these ends where the adapter's rank does, and begins in front of
    the first column, where TMA reads zeros: what is past a rank is not read, and a tile without an adapter
    adds zeros. Tiles of two adapters, if MOST is 2, go through another: ``s_desc`` has s twice then, where
    the first M rows are zeros but for the first adapter of their tile, and the others but for the second.
    The other tiles follow, each with a pipeline of its own. Both loops in the body of a third, ptxas would
    wait for every wgmma. Tables are read before the kernel that makes s is waited for.

    Where most tiles have more than GATHER_ABOVE adapters, all are made of sorted rows instead, which have
    few: rows of x are gathered by pointers, and those of y scattered.
    """
    R, stride_xm, stride_sm = multiple(R, 8), multiple(stride_xm, 8), multiple(stride_sm, 8)
    stride_bl = multiple(stride_bl, 8)  # as all of these are where TMA can describe s and B
    if W_IS_NK:
        stride_bn = multiple(stride_bn, 8)
    else:
        stride_br = multiple(stride_br, 8)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    gathered = 0
    if _is_scattered(slots_ptr, tiles_m, width, GATHER_ABOVE, 128):
        tiles, gathered = 0, tiles
    programs = tl.num_programs(0)
    k_steps = tl.cdiv(K, BLOCK_K)
    wait_at = late_wait_step(k_steps)
    if wait_at == 0:
        wait_for_previous_kernel(PDL)
    for COUNT in tl.static_range(1, MOST + 1):
        _make_tiles_with(
            x_desc, w_desc, s_desc, b_desc, y_desc, bias_ptr, slots_ptr, ranks_ptr,
            M, N, K, R, width, tiles_m, tiles_n, tiles, wait_at, COUNT, MOST,
            W_IS_NK, HAS_BIAS, PRECISION, PDL, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK, GROUP_M, SUBTILES,
        )  # fmt: skip
    for tile in range(tl.program_id(0), tiles, programs):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        if _adapters_of_tile(slots_ptr, ranks_ptr, tile_m, True, R, width, MOST) == 0:
            start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
            offs_n = start_n.to(tl.int64) + tl.arange(0, BLOCK_N)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in tl.range(0, k_steps, num_stages=MIXED_STAGES):
                x = x_desc.load([start_m, k * BLOCK_K])  # [BLOCK_M, BLOCK_K]
                w = _load_right(w_desc, 0, k * BLOCK_K, start_n, N, W_IS_NK, BLOCK_K, BLOCK_N)
                acc = dot(x, w, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
            wait_for_previous_kernel(PDL)
            acc = add_slot_products(
                acc, s_ptr, b_ptr, ids_ptr, slots_ptr, ranks_ptr, tile_m,
                start_m.to(tl.int64) + tl.arange(0, BLOCK_M), offs_n, M, N, R, width,
                stride_sm, stride_bl, stride_bn, stride_br, y_desc.dtype, PRECISION, WIDTH, SLOTS, BLOCK_R,
            )  # fmt: skip
            if HAS_BIAS:
                acc = add_bias(acc, bias_ptr, offs_n, N)
            store_tile(y_desc, acc, start_m, start_n, BLOCK_M, BLOCK_N, SUBTILES)
    for tile in range(tl.program_id(0), gathered, programs):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        start_n = tile_n * BLOCK_N
        offs_n = start_n.to(tl.int64) + tl.arange(0, BLOCK_N)
        position = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_m = tl.load(order_ptr + position, mask=position < M, other=M).to(tl.int64)  # [BLOCK_M]
        offs_k = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + tl.minimum(offs_m, M - 1)[:, None] * stride_xm + offs_k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, k_steps, num_stages=MIXED_STAGES):
            x = tl.load(
                x_ptrs + k * BLOCK_K,
                mask=offs_k[None, :] < multiple(K, K_VECTOR) - k * BLOCK_K,
                other=0.0,
            )  # [BLOCK_M, BLOCK_K]
            w = _load_right(w_desc, 0, k * BLOCK_K, start_n, N, W_IS_NK, BLOCK_K, BLOCK_N)
            acc = dot(x, w, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
        wait_for_previous_kernel(PDL)
        acc = add_slot_products(
            acc, s_ptr, b_ptr, ids_ptr, sorted_slots_ptr, ranks_ptr, tile_m, offs_m, offs_n,
            M, N, R, width,
            stride_sm, stride_bl, stride_bn, stride_br, y_desc.dtype, PRECISION, WIDTH, SLOTS, BLOCK_R,
        )  # fmt: skip
        if HAS_BIAS:
            acc = add_bias(acc, bias_ptr, offs_n, N)
        tl.store(
            y_ptr + offs_m[:, None] * N + offs_n[None, :],
            acc.to(y_ptr.dtype.element_ty),
            mask=(offs_m[:, None] < M) & (offs_n[None, :] < multiple(N, 8)),
        )


@cached_plan
def _plan(
    c: LaunchConfig,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    w_stride: tuple[int, ...],
    b_shape: tuple[int, ...],
    b_stride: tuple[int, ...],
    b_dtype: torch.dtype,
    s_stride: tuple[int, ...],
    device: torch.device,
    width: int,
    has_bias: bool,
    is_aligned: bool,
    precision: str,
    most: int,
) -> Launch | None:
    """The launch, or ``None`` where TMA cannot describe s or lora_B as they are."""
    (M, K), (L, N, R), itemsize = shape, b_shape, dtype.itemsize
    nk = w_stride[1] == 1
    by_slot, by_n, by_r = b_stride
    if nk:  # slots one below the other
        fits = by_slot == N * by_n and rows_fit_tma((L * N, R), (by_n, by_r), itemsize)
        fits &= L * N < 2**30
    else:
        fits = by_slot * itemsize % 16 == 0 and rows_fit_tma((R, N), (by_r, by_n), itemsize)
    fits &= rows_fit_tma((M, R), s_stride, itemsize) and is_aligned
    if not fits or itemsize != 2 or b_dtype != dtype or R % 8 != 0:
        return None
    c, mixed_stages = multi_ring_config(c)
    num_sms, pdl = device_properties(device)[1], has_pdl(device)
    block_r = min(rank_step(R, itemsize), 32)  # adapters of lower rank pad less
    x_box, w_box, s_box, b_box, y_box = gemm_boxes(c, nk=nk, rank_product=True)
    boxes: tuple[tuple[int, ...], ...] = (x_box, w_box, s_box, b_box, y_box)
    if not nk:
        boxes = (x_box, (1, *w_box), s_box, (1, *b_box), y_box)
    return Launch(
        _lora_multi_gemm_ring_kernel, (min(num_sms, cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N)),), device,
        M, N, K, R, width, stride[0], s_stride[0], *b_stride,
        boxes=boxes, W_IS_NK=nk, HAS_BIAS=has_bias, PRECISION=precision, PDL=pdl, launch_pdl=pdl,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K,
        WIDTH=next_power_of_2(width), BLOCK_R=block_r, K_VECTOR=vector(K), CHUNK=MULTI_RING_CHUNK,
        MIXED_STAGES=mixed_stages, MOST=most, GATHER_ABOVE=MULTI_GATHER_ABOVE,
        SLOTS=slots_at_once(width, block_r, itemsize, itemsize),
        GROUP_M=c.GROUP_M, SUBTILES=c.SUBTILES, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_multi_gemm_ring(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    ranks: Tensor | None,
    routing: tuple[Tensor, ...],
    c: LaunchConfig,
    bias: Tensor | None = None,
    pair: Tensor | None = None,
) -> Tensor | None:
    """`lora_multi_gemm` without a mask, of tensors that fit TMA.

    Args:
        x (Tensor): ``[M, K]``, as TMA can describe it.
        weight (Tensor): ``[N, K]`` in the dtype of x; it or its transpose as TMA can describe it.
        s (Tensor): ``[M, R]``, zeros in rows without an adapter, as `lora_multi_shrink` gives it.
        lora_B (Tensor): ``[L, N, R]``.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        routing (tuple): ``ids [M]``, the slots of tiles of BLOCK_M rows, ``order [M]`` and the slots of tiles
            of sorted rows, complete before the kernel that makes s began.
        c (LaunchConfig): of `multi_gemm_tiles`.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.
        pair (Tensor | None): s for tiles of two adapters, ``[2 M, R]``, as `lora_multi_shrink` gives it.
            Default: ``None``.

    Returns:
        Tensor | None: ``[M, N]``; ``None`` where the kernel cannot take these tensors.
    """
    ids, slots, order, sorted_slots = routing
    launch = _plan(
        c, x.shape, x.stride(), x.dtype, weight.stride(), lora_B.shape, lora_B.stride(), lora_B.dtype,
        s.stride(), x.device, slots.shape[1], bias is not None, aligned(s, lora_B),
        dot_precision(x.dtype, x.shape[1]), 1 if pair is None else 2,
    )  # fmt: skip
    if launch is None:
        return None
    y = torch.empty((x.shape[0], lora_B.shape[1]), dtype=x.dtype, device=x.device)
    if weight.stride(1) == 1:
        w, b = weight, lora_B.flatten(0, 1)  # [N, K], [L N, R]
    else:
        w, b = weight.t().unsqueeze(0), lora_B.transpose(1, 2)  # [1, K, N], [L, R, N]
    by_tma = s if pair is None else pair
    launch(x, w, by_tma, b, y, x, y, s, lora_B, bias, ids, slots, order, sorted_slots, ranks)
    return y
