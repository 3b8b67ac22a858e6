"""`dora_grad` and ``ds = scaling * dz B`` in one pass, from dz while it is in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    device_properties,
    dot,
    dot_precision,
    empty_rows,
    load_scaling,
    padded_columns,
    strides,
)
from .config import cdiv, dora_grad_shrink_config, rank_block
from .launch import Launch, cached_plan
from .reduce import sum_splits


@triton.jit
def _load_rows(dy_ptr, z_ptr, offs_m, offs_n, M, N, stride_dym, stride_dyn):
    """A tile of dy and one of z, ``[BLOCK_M, BLOCK_C]`` each."""
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    dy = tl.load(
        dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn, mask=mask, other=0.0
    )
    return dy, tl.load(z_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask, other=0.0)


@triton.jit
def _dora_grad_shrink_kernel(
    dy_ptr, z_ptr, g_ptr, norm_ptr, b_ptr, dz_ptr, parts_ptr, ds_ptr, scaling,
    M, N, R, stride_dym, stride_dyn, stride_bn, stride_br, stride_dsm,
    SCALING_IS_TENSOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``dz[m, n] = g[n] dy[m, n]``, ``ds[m, r] = scaling * sum_n dz[m, n] B[n, r]``, and parts of dmagnitude.

    A part is ``sum_m dy[m, n] z[m, n] / norm[n]`` over a block of rows.

    Grid: ``cdiv(M, BLOCK_M)``; a program takes its rows over all of N.
    """
    dtype = dz_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
    part = parts_ptr + tl.program_id(0).to(tl.int64) * N
    dy, z = _load_rows(dy_ptr, z_ptr, offs_m, offs_c, M, N, stride_dym, stride_dyn)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for n in range(0, N, BLOCK_C):
        offs_n = n + offs_c
        # A step ahead by hand. Triton's own pipeline would keep dy, of two layouts, in shared memory without
        # a swizzle, where the product's reads conflict.
        next_dy, next_z = _load_rows(
            dy_ptr, z_ptr, offs_m, offs_n + BLOCK_C, M, N, stride_dym, stride_dyn
        )
        norm = tl.load(norm_ptr + offs_n, mask=offs_n < N, other=1.0)  # [BLOCK_C]
        g = tl.load(g_ptr + offs_n, mask=offs_n < N, other=0.0)  # [BLOCK_C]
        b = tl.load(
            b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br,
            mask=(offs_n[:, None] < N) & (offs_r[None, :] < R),
            other=0.0,
        )  # [BLOCK_C, BLOCK_R]
        dz = (dy.to(tl.float32) * g[None, :]).to(dtype)
        tl.store(
            dz_ptr + offs_m[:, None] * N + offs_n[None, :],
            dz,
            mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
        )
        acc = dot(dz, b.to(dtype), acc, PRECISION)  # [BLOCK_M, BLOCK_R]
        sums = tl.sum(dy.to(tl.float32) * z.to(tl.float32), 0)  # [BLOCK_C]
        tl.store(part + offs_n, sums / norm, mask=offs_n < N)
        dy, z = next_dy, next_z
    acc *= load_scaling(scaling, SCALING_IS_TENSOR)
    tl.store(
        ds_ptr + offs_m[:, None] * stride_dsm + offs_r[None, :],
        acc.to(dtype),
        mask=(offs_m[:, None] < M) & (offs_r[None, :] < R),
    )


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    R: int,
    b_stride: tuple[int, ...],
    b_dtype: torch.dtype,
    scaling_dtype: torch.dtype | None,
    device: torch.device,
) -> tuple[int, Launch]:
    """Blocks of rows, and the launch."""
    (M, N), num_sms = shape, device_properties(device)[1]
    c = dora_grad_shrink_config(M, num_sms)
    blocks = cdiv(M, c.BLOCK_M)
    return blocks, Launch(
        _dora_grad_shrink_kernel, (blocks,), device,
        M, N, R, *strides(shape, stride), *strides((N, R), b_stride),
        padded_columns(R, dtype.itemsize),
        fixed=True, SCALING_IS_TENSOR=scaling_dtype is not None, PRECISION=dot_precision(dtype),
        BLOCK_M=c.BLOCK_M, BLOCK_C=c.BLOCK_K, BLOCK_R=rank_block(R),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def dora_grad_shrink(
    dy: Tensor,
    z: Tensor,
    g: Tensor,
    norm: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `dora_grad` makes, and ``ds = scaling * dz B``, which then needs no pass over dz of its own.

    Args:
        dy (Tensor): ``[M, N]``, any strides, of a dtype and a rank that `dora_grad_shrinks` takes.
        z (Tensor): ``[M, N]``, contiguous, as `lora_forward` writes it.
        g (Tensor): fp32 ``[N]``, contiguous.
        norm (Tensor): fp32 ``[N]``, contiguous.
        lora_B (Tensor): ``[N, R]``, any strides, cast to the dtype of dy for the product.
        scaling (float | Tensor): a float, or a 0-dim tensor on the device of dy.
        dtype (torch.dtype): that of dmagnitude.

    Returns:
        tuple: dz ``[M, N]`` in the dtype of dy, contiguous, dmagnitude ``[N]``, and ds ``[M, R]`` in the
        dtype of dy, its rows padded to 16 bytes. Sums go in a fixed order: bit-identical from run to run.
    """
    (M, N), R = dy.shape, lora_B.shape[1]
    blocks, launch = _plan(
        dy.shape, dy.stride(), dy.dtype, R, lora_B.stride(), lora_B.dtype,
        scaling.dtype if isinstance(scaling, Tensor) else None, dy.device,
    )  # fmt: skip
    dz = dy.new_empty((M, N))
    ds = empty_rows(M, R, dy.dtype, dy.device)
    parts = dy.new_empty((blocks, N), dtype=torch.float32)
    launch(
        dy, z, g, norm, lora_B, dz, parts, ds,
        scaling if isinstance(scaling, Tensor) else float(scaling),
    )  # fmt: skip
    dmagnitude = torch.empty((N,), dtype=dtype, device=dy.device)
    sum_splits(parts, dmagnitude)
    return dz, dmagnitude, ds
