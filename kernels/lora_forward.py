"""``y = g * (x W0^T + s B^T) + bias``: the frozen GEMM, with the rank product in the same accumulator."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    add_bias,
    add_frozen_product,
    add_rank_product,
    aligned,
    device_properties,
    dot,
    dot_precision,
    for_tma,
    has_pdl,
    has_tma,
    late_wait_step,
    rows_fit_tma,
    scale_columns,
    store_tile,
    strides,
    tile_of,
    wait_for_previous_kernel,
)
from .config import (
    cdiv,
    gemm_boxes,
    gemm_pointer_config,
    gemm_tma_config,
    rank_step,
    runs_beside,
)
from .launch import Launch, cached_plan
from .tuned import choose


@triton.jit
def _lora_forward_tma_kernel(
    x_desc, w_desc, s_desc, b_desc, y_desc, z_desc, bias_ptr, g_ptr, M, N, K, R,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, KEEP_Z: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """``y = g * z + bias`` with ``z = [x s] [W B]^T``, by TMA. Grid: persistent, one program an SM.

    The rank product is the last steps of the K loop, read from other tensors: one pipeline for both,
    which a product after the loop would drain. Flattening prefetches the next tile during a store. The
    kernel that makes s may still run beside the first tile: it is waited for shortly before s is read.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    k_steps = tl.cdiv(K, BLOCK_K)
    wait_at = late_wait_step(k_steps)
    if wait_at == 0:
        wait_for_previous_kernel(PDL)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(0, k_steps + tl.cdiv(R, BLOCK_K)):
            if step == wait_at:
                wait_for_previous_kernel(PDL)
            if step < k_steps:
                left, right, start_k = x_desc, w_desc, step * BLOCK_K
            else:
                left, right, start_k = s_desc, b_desc, (step - k_steps) * BLOCK_K
            a = left.load([start_m, start_k])  # [BLOCK_M, BLOCK_K]
            b = right.load([start_n, start_k])  # [BLOCK_N, BLOCK_K]
            acc = dot(a, b.T, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
        if KEEP_Z:
            store_tile(z_desc, acc, start_m, start_n, BLOCK_M, BLOCK_N, SUBTILES)
        if HAS_SCALE:
            acc = scale_columns(acc, g_ptr, start_n.to(tl.int64) + tl.arange(0, BLOCK_N), N)
        if HAS_BIAS:
            acc = add_bias(acc, bias_ptr, start_n.to(tl.int64) + tl.arange(0, BLOCK_N), N)
        store_tile(y_desc, acc, start_m, start_n, BLOCK_M, BLOCK_N, SUBTILES)


@triton.jit
def _lora_forward_pointer_kernel(
    x_ptr, w_ptr, y_ptr, z_ptr, s_ptr, b_ptr, bias_ptr, g_ptr,
    M, N, K, R, stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, KEEP_Z: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``y = g * z + bias`` with ``z = x W^T + s B^T``, any strides. Grid: one program a tile of y."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = add_frozen_product(
        acc, x_ptr, w_ptr, offs_m, offs_n, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    acc = add_rank_product(
        acc, s_ptr, b_ptr, offs_m, offs_m[:, None] < M, offs_n, N, R, R_STEPS * BLOCK_R,
        stride_sm, stride_bn, stride_br, y_ptr.dtype.element_ty, PRECISION, BLOCK_R,
    )  # fmt: skip
    if KEEP_Z:
        tl.store(
            z_ptr + offs_m[:, None] * N + offs_n[None, :],
            acc.to(z_ptr.dtype.element_ty),
            mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
        )
    if HAS_SCALE:
        acc = scale_columns(acc, g_ptr, offs_n, N)
    if HAS_BIAS:
        acc = add_bias(acc, bias_ptr, offs_n, N)
    tl.store(
        y_ptr + offs_m[:, None] * N + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    w_shape: tuple[int, ...],
    w_stride: tuple[int, ...],
    b_shape: tuple[int, ...],
    b_stride: tuple[int, ...],
    b_dtype: torch.dtype,
    s_stride: int,
    device: torch.device,
    bias_dtype: torch.dtype | None,
    has_scale: bool,
    keep_z: bool,
    is_aligned: bool,
    precision: str,
) -> tuple[bool, bool, Launch]:
    """Whether by TMA, whether that can describe s and lora_B as they are, and the launch."""
    (M, K), (N, R), itemsize = shape, b_shape, dtype.itemsize
    major, num_sms = device_properties(device)
    options: dict[str, Any] = {
        "HAS_BIAS": bias_dtype is not None, "HAS_SCALE": has_scale, "KEEP_Z": keep_z,
        "PRECISION": precision, "fixed": True,
    }  # fmt: skip
    dense = rows_fit_tma(shape, stride, itemsize) and rows_fit_tma(w_shape, w_stride, itemsize)
    if has_tma(major) and precision == "tf32" and is_aligned and dense and N * itemsize % 16 == 0:
        pdl = has_pdl(device)
        c = gemm_tma_config(M, N, itemsize, num_sms, beside=runs_beside(M, N, num_sms))
        c = choose(
            "lora_forward_tma", c, device, itemsize, precision, R, {"M": M, "K": K, "N": N},
            scale=has_scale, z=keep_z,
        )  # fmt: skip
        tiles = cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N)
        described = b_dtype == dtype and rows_fit_tma(b_shape, b_stride, itemsize)
        described &= rows_fit_tma((M, R), (s_stride, 1), itemsize)
        return True, described, Launch(
            _lora_forward_tma_kernel, (min(num_sms, tiles),), device, M, N, K, R,
            boxes=gemm_boxes(c, rank_product=True, outputs=2 if keep_z else 1),
            BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, GROUP_M=c.GROUP_M,
            SUBTILES=c.SUBTILES, num_warps=c.num_warps, num_stages=c.num_stages,
            PDL=pdl, launch_pdl=pdl, **options,
        )  # fmt: skip
    c, block_r = gemm_pointer_config(itemsize, precision), rank_step(R, itemsize)
    c = choose(
        "lora_forward_pointer", c, device, itemsize, precision, R, {"M": M, "K": K, "N": N},
        scale=has_scale, z=keep_z, fp32_adapters=b_dtype != dtype,
        x_strided=stride[1] != 1, w_strided=w_stride[1] != 1,
    )  # fmt: skip
    return False, True, Launch(
        _lora_forward_pointer_kernel, (cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N),), device,
        M, N, K, R, *strides(shape, stride), *strides(w_shape, w_stride),
        s_stride, *strides(b_shape, b_stride),
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, GROUP_M=c.GROUP_M,
        R_STEPS=cdiv(R, block_r), BLOCK_R=block_r,
        num_warps=c.num_warps, num_stages=c.num_stages, **options,
    )  # fmt: skip


def lora_forward(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    column_scale: Tensor | None = None,
    z: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``y = g * z + bias`` in the dtype of x, contiguous, with ``z = x W0^T + s B^T``; g is 1 for LoRA.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        weight (Tensor): ``[N, K]`` in the dtype of x, any strides.
        s (Tensor): ``[M, R]`` in the dtype of x, rows dense, as `lora_shrink` gives it.
        lora_B (Tensor): ``[N, R]``, any strides, cast to the dtype of x for the product.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.
        column_scale (Tensor | None): g, fp32 ``[N]`` contiguous. Default: ``None``.
        z (Tensor | None): ``[M, N]`` in the dtype of x, contiguous and aligned as torch allocates, to write
            z into as well. Default: ``None``.
        out (Tensor | None): likewise, to write y into. Default: ``None``.

    Returns:
        Tensor: ``[M, N]``.
    """
    (M, K), N = x.shape, weight.shape[0]
    by_tma, described, launch = _plan(
        x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), lora_B.shape, lora_B.stride(),
        lora_B.dtype, s.stride(0), x.device, None if bias is None else bias.dtype,
        column_scale is not None, z is not None, aligned(x, weight), dot_precision(x.dtype, K),
    )  # fmt: skip
    if by_tma and not (described and aligned(s, lora_B)):
        s, lora_B = for_tma(s, x.dtype), for_tma(lora_B, x.dtype)
        return lora_forward(x, weight, s, lora_B, bias, column_scale, z, out)
    y = x.new_empty((M, N)) if out is None else out
    if by_tma:
        launch(x, weight, s, lora_B, y, z, bias, column_scale)
    else:
        launch(x, weight, y, z, s, lora_B, bias, column_scale)
    return y
