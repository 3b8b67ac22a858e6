"""``y = x W^T + s B^T + bias`` and ``s = scaling * x A^T`` in one launch."""

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
    empty_rows,
    for_tma,
    has_tma,
    load_scaling,
    padded_columns,
    rows_fit_tma,
    store_tile,
    tile_of,
)
from .config import LaunchConfig, cdiv, gemm_boxes, gemm_tma_config, rank_block
from .config_one_pass import one_pass_makers, one_pass_stages
from .launch import Launch, cached_plan
from .ready import announce, new_marks, wait_until_ready


@triton.jit(do_not_specialize=["ticket"])
def _lora_one_pass_tma_kernel(
    x_desc, w_desc, a_desc, s_desc, b_desc, y_desc, s_ptr, ready_ptr, bias_ptr, scaling, ticket,
    M, N, K, R, stride_sm, makers,
    HAS_BIAS: tl.constexpr, SCALING_IS_TENSOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr, SHRINK_STAGES: tl.constexpr, WAIT_STEPS: tl.constexpr,
):  # fmt: skip
    """``y = [x s] [W B]^T + bias`` and ``s = scaling * x A^T``, by TMA. Grid: persistent, one program an SM.

    The first ``makers`` programs, those that have fewer tiles of y than others if there are enough, make s
    to begin with and mark its rows. A tile of y waits for the mark of its rows before its last steps. So
    programs wait for the first ones alone, which are there at once.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    k_steps = tl.cdiv(K, BLOCK_K)
    program, programs = tl.program_id(0), tl.num_programs(0)
    if program < makers:
        factor = load_scaling(scaling, SCALING_IS_TENSOR)
        for tile_m in range(program, tiles_m, makers):
            start_m = tile_m * BLOCK_M
            acc_s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for step in tl.range(0, k_steps, num_stages=SHRINK_STAGES):
                x = x_desc.load([start_m, step * BLOCK_K])  # [BLOCK_M, BLOCK_K]
                a = a_desc.load([0, step * BLOCK_K]).T  # [BLOCK_K, BLOCK_R]
                acc_s = dot(x, a, acc_s, "tf32")  # [BLOCK_M, BLOCK_R]
            offs_m = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
            offs_r = tl.arange(0, BLOCK_R)
            tl.store(
                s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :],
                (acc_s * factor).to(s_ptr.dtype.element_ty),
                mask=(offs_m[:, None] < M) & (offs_r[None, :] < R),
            )
            announce(ready_ptr + tile_m, ticket)
    wait_at = k_steps - WAIT_STEPS
    for tile in tl.range(programs - 1 - program, tiles_m * tiles_n, programs, flatten=True):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(0, k_steps + tl.cdiv(R, BLOCK_K)):
            if step == wait_at:
                wait_until_ready(ready_ptr + tile_m, ticket)
            if step < k_steps:
                left, right, start_k = x_desc, w_desc, step * BLOCK_K
            else:
                left, right, start_k = s_desc, b_desc, (step - k_steps) * BLOCK_K
            x = left.load([start_m, start_k])  # [BLOCK_M, BLOCK_K]
            w = right.load([start_n, start_k]).T  # [BLOCK_K, BLOCK_N]
            acc = dot(x, w, acc, "tf32")  # [BLOCK_M, BLOCK_N]
        if HAS_BIAS:
            acc = add_bias(acc, bias_ptr, start_n.to(tl.int64) + tl.arange(0, BLOCK_N), N)
        store_tile(y_desc, acc, start_m, start_n, BLOCK_M, BLOCK_N, SUBTILES)


def _tiles(M: int, N: int, device: torch.device) -> tuple[LaunchConfig, int, int]:
    """Tiles of y, how many there are, and the number of programs."""
    num_sms = device_properties(device)[1]
    c = gemm_tma_config(M, N, 2, num_sms)
    programs = 1 if device.type == "cpu" else num_sms  # the interpreter's go one after the other
    return c, cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N), programs


@cached_plan
def _fits(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    w_shape: tuple[int, ...],
    w_stride: tuple[int, ...],
    R: int,
    device: torch.device,
) -> bool:
    (M, K), N, itemsize = shape, w_shape[0], dtype.itemsize
    if not (has_tma(device_properties(device)[0]) and itemsize == 2 and N % 8 == 0):
        return False
    dense = rows_fit_tma(shape, stride, itemsize) and rows_fit_tma(w_shape, w_stride, itemsize)
    return dense and one_pass_makers(M, K, R, *_tiles(M, N, device)) > 0


def fits_one_pass(x: Tensor, weight: Tensor, R: int) -> bool:
    """Whether `lora_one_pass` takes these tensors, and is faster than a kernel for s and one for y.

    Args:
        x (Tensor): ``[M, K]``; no dropout.
        weight (Tensor): ``[N, K]`` in the dtype of x.
        R (int): the rank.
    """
    return _fits(
        x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), R, x.device
    ) and aligned(x, weight)


@cached_plan
def _plan(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    N: int,
    R: int,
    device: torch.device,
    tensor_scaling: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    strides_of: tuple[tuple[int, ...], ...],
) -> tuple[int, Launch]:
    """The number of rows of tiles, and the launch; strides are those of what is described to TMA."""
    (M, K), block_r = shape, rank_block(R)
    c, tiles, programs = _tiles(M, N, device)
    x_box, w_box, s_box, b_box, y_box = gemm_boxes(c, rank_product=True)
    makers = max(1, one_pass_makers(M, K, R, c, tiles, programs))
    return cdiv(M, c.BLOCK_M), Launch(
        _lora_one_pass_tma_kernel, (programs,), device, M, N, K, R, padded_columns(R, 2), makers,
        boxes=(x_box, w_box, (block_r, c.BLOCK_K), s_box, b_box, y_box), fixed=True,
        HAS_BIAS=bias_dtype is not None, SCALING_IS_TENSOR=tensor_scaling is not None,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=block_r,
        GROUP_M=c.GROUP_M, SUBTILES=c.SUBTILES, SHRINK_STAGES=one_pass_stages(block_r),
        WAIT_STEPS=c.num_stages + 1, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_one_pass(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = x W0^T + s B^T + bias`` and ``s = scaling * x A^T``.

    Args:
        x (Tensor): ``[M, K]``, as `fits_one_pass` wants it.
        weight (Tensor): ``[N, K]``, as well.
        lora_A (Tensor): ``[R, K]``, any strides, cast to the dtype of x.
        lora_B (Tensor): ``[N, R]``, any strides, cast to the dtype of x.
        scaling (float | Tensor): a float, or a 0-dim tensor on x's device.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.

    Returns:
        tuple: y ``[M, N]`` and s ``[M, R]`` in the dtype of x.
    """
    (M, _), N, R = x.shape, weight.shape[0], lora_A.shape[0]
    lora_A, lora_B = for_tma(lora_A, x.dtype), for_tma(lora_B, x.dtype)
    rows, launch = _plan(
        x.shape, x.dtype, N, R, x.device, scaling.dtype if isinstance(scaling, Tensor) else None,
        None if bias is None else bias.dtype,
        (x.stride(), weight.stride(), lora_A.stride(), lora_B.stride()),
    )  # fmt: skip
    y, s = x.new_empty((M, N)), empty_rows(M, R, x.dtype, x.device)
    ready = new_marks(rows, x.device)
    launch(
        x, weight, lora_A, s, lora_B, y, s, ready.marks, bias,
        scaling if isinstance(scaling, Tensor) else float(scaling), ready.ticket,
    )  # fmt: skip
    return y, s
