"""``dz = g * dy`` and ``dmagnitude = sum_m dy z / norm``: DoRA's scale in the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import device_properties, strides
from .config import cdiv, dora_grad_config
from .launch import Launch, cached_plan
from .reduce import sum_splits


@triton.jit
def _dora_grad_kernel(
    dy_ptr, z_ptr, g_ptr, norm_ptr, dz_ptr, parts_ptr,
    M, N, rows_per_split, stride_dym, stride_dyn,
    NEED_DZ: tl.constexpr, NEED_SUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dz[m, n] = g[n] dy[m, n]``, and ``sum_m dy[m, n] z[m, n] / norm[n]`` over a split of rows.

    Grid: ``(cdiv(N, BLOCK_C), splits)``; a program walks down its rows.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1).to(tl.int64) * rows_per_split
    last = min(first + rows_per_split, M)
    g = tl.load(g_ptr + offs_n, mask=offs_n < N, other=0.0)  # [BLOCK_C]
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_mn = (offs_m[:, None] < last) & (offs_n[None, :] < N)
        offs_mn = offs_m[:, None] * N + offs_n[None, :]
        dy = tl.load(
            dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn,
            mask=mask_mn,
            other=0.0,
        ).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        if NEED_SUM:
            acc += dy * tl.load(z_ptr + offs_mn, mask=mask_mn, other=0.0).to(tl.float32)
        if NEED_DZ:
            dz = (dy * g[None, :]).to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + offs_mn, dz, mask=mask_mn)
    if NEED_SUM:
        norm = tl.load(norm_ptr + offs_n, mask=offs_n < N, other=1.0)
        part = parts_ptr + tl.program_id(1).to(tl.int64) * N
        tl.store(part + offs_n, tl.sum(acc, 0) / norm, mask=offs_n < N)


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    need_dz: bool,
    need_sum: bool,
) -> tuple[int, Launch]:
    """Splits of rows, and the launch."""
    (M, N), num_sms = shape, device_properties(device)[1]
    c = dora_grad_config(M, N, dtype.itemsize, num_sms)
    rows_per_split = cdiv(cdiv(M, c.row_splits), c.BLOCK_M) * c.BLOCK_M
    splits = cdiv(M, rows_per_split)
    return splits, Launch(
        _dora_grad_kernel, (cdiv(N, c.BLOCK_C), splits), device,
        M, N, rows_per_split, *strides(shape, stride),
        fixed=True, NEED_DZ=need_dz, NEED_SUM=need_sum, BLOCK_M=c.BLOCK_M, BLOCK_C=c.BLOCK_C,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def dora_grad(
    dy: Tensor, z: Tensor | None, g: Tensor, norm: Tensor, dtype: torch.dtype, need_dz: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """``dz = g * dy`` and ``dmagnitude[n] = sum_m dy[m, n] z[m, n] / norm[n]`` from one read of dy and z.

    Args:
        dy (Tensor): ``[M, N]``, any strides.
        z (Tensor | None): ``[M, N]``, contiguous, as `lora_forward` writes it; ``None`` where dmagnitude is
            not wanted.
        g (Tensor): fp32 ``[N]``, contiguous.
        norm (Tensor): fp32 ``[N]``, contiguous.
        dtype (torch.dtype): that of dmagnitude.
        need_dz (bool): whether dz is wanted. Default: ``True``.

    Returns:
        tuple: dz ``[M, N]`` in the dtype of dy, contiguous, and dmagnitude ``[N]``; ``None`` where not
        wanted. Sums go in a fixed order: bit-identical from run to run.
    """
    (M, N), dz, parts = dy.shape, None, None
    splits, launch = _plan(dy.shape, dy.stride(), dy.dtype, dy.device, need_dz, z is not None)
    if need_dz:
        dz = dy.new_empty((M, N))
    if z is not None:
        parts = dy.new_empty((splits, N), dtype=torch.float32)
    launch(dy, z, g, norm, dz, parts)
    if parts is None:
        return dz, None
    dmagnitude = torch.empty((N,), dtype=dtype, device=dy.device)
    sum_splits(parts, dmagnitude)
    return dz, dmagnitude
