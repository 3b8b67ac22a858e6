"""``ds = scaling * dy B / (1 - p)`` and ``dB = dy^T s`` from one read of dy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import device_properties, dot, dot_precision, empty_rows, padded_columns, strides
from .config import cdiv, grad_b_config, keep_scale, rank_block
from .launch import Launch, cached_plan
from .lora_grad_a import lora_grad_a
from .lora_shrink import lora_shrink
from .reduce import sum_splits
from .tuned import choose


@triton.jit
def _lora_grad_b_kernel(
    dy_ptr, s_ptr, b_ptr, ds_parts_ptr, db_parts_ptr,
    M, N, R, rows_per_split, stride_dym, stride_dyn, stride_sm, stride_dsm, stride_bn, stride_br,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums: ``ds`` over a block of columns, ``dB`` over a split of rows.

    Grid: ``(cdiv(N, BLOCK_C), splits)``. A program keeps its ``B`` and ``dB`` columns and walks down
    its rows of dy; neither product changes an operand in registers.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    first = tl.program_id(1).to(tl.int64) * rows_per_split
    last = min(first + rows_per_split, M)
    b = tl.load(
        b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :].to(tl.int64) * stride_br,
        mask=(offs_n[:, None] < N) & (offs_r[None, :] < R),
        other=0.0,
    ).to(dy_ptr.dtype.element_ty)  # [BLOCK_C, BLOCK_R]
    ds_part = ds_parts_ptr + tl.program_id(0).to(tl.int64) * M * stride_dsm
    db = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        dy = tl.load(
            dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn,
            mask=(offs_m[:, None] < last) & (offs_n[None, :] < N),
            other=0.0,
        )  # [BLOCK_M, BLOCK_C]
        s = tl.load(
            s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :],
            mask=(offs_m[:, None] < last) & (offs_r[None, :] < R),
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        zero = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        ds = dot(dy, b, zero, PRECISION)  # [BLOCK_M, BLOCK_R]
        db = dot(dy.T, s, db, PRECISION)  # [BLOCK_C, BLOCK_R]
        tl.store(  # zeros where rows are padded, which `sum_splits` reads
            ds_part + offs_m[:, None] * stride_dsm + offs_r[None, :],
            ds,
            mask=(offs_m[:, None] < last) & (offs_r[None, :] < stride_dsm),
        )
    db_part = db_parts_ptr + tl.program_id(1).to(tl.int64) * N * R
    tl.store(
        db_part + offs_n[:, None] * R + offs_r[None, :],
        db,
        mask=(offs_n[:, None] < N) & (offs_r[None, :] < R),
    )


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    R: int,
    b_stride: tuple[int, ...],
    s_stride: int,
    device: torch.device,
    precision: str,
) -> tuple[int, int, int, Launch] | None:
    """Blocks of columns, splits of rows, the row stride of ds, and the launch; ``None``: two passes."""
    (M, N), num_sms = shape, device_properties(device)[1]
    c = grad_b_config(M, N, R, dtype.itemsize, num_sms)
    if c is None:
        return None
    c = choose(
        "lora_grad_b", c, device, dtype.itemsize, precision, R, {"M": M, "N": N},
        dy_strided=stride[1] != 1, b_strided=b_stride[1] != 1,
    )  # fmt: skip
    rows_per_split = cdiv(cdiv(M, c.row_splits), c.BLOCK_M) * c.BLOCK_M
    splits, column_blocks = cdiv(M, rows_per_split), cdiv(N, c.BLOCK_C)
    padded = padded_columns(R, dtype.itemsize)
    return column_blocks, splits, padded, Launch(
        _lora_grad_b_kernel, (column_blocks, splits), device,
        M, N, R, rows_per_split, *strides(shape, stride), s_stride, padded,
        *strides((N, R), b_stride),
        PRECISION=precision,
        BLOCK_M=c.BLOCK_M, BLOCK_C=c.BLOCK_C, BLOCK_R=rank_block(R),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_grad_b(
    dy: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
    *,
    need_ds: bool = True,
    need_db: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """``ds = scaling * dy B / (1 - p)`` and ``dB = dy^T s``.

    Args:
        dy (Tensor): ``[M, N]``, any strides.
        s (Tensor): ``[M, R]``, rows dense, in the dtype of dy, with scaling in it.
        lora_B (Tensor): ``[N, R]``, any strides.
        scaling (float | Tensor): a float, or a 0-dim tensor on dy's device.
        dropout_p (float): puts ``1 / (1 - p)`` into ds. Default: 0.0.
        need_ds (bool): whether ds is wanted. Default: ``True``.
        need_db (bool): whether dB is wanted. Default: ``True``.

    Returns:
        tuple: ds ``[M, R]`` in the dtype of dy, dB ``[N, R]`` in the dtype of lora_B; ``None`` where not
        wanted. Sums go in a fixed order: bit-identical from run to run.
    """
    (M, N), R = dy.shape, lora_B.shape[1]
    plan = _plan(
        dy.shape, dy.stride(), dy.dtype, R, lora_B.stride(), 0 if s is None else s.stride(0),
        dy.device, dot_precision(dy.dtype),
    )  # fmt: skip
    if plan is None or not (need_ds and need_db):
        factor = keep_scale(dropout_p)
        ds = lora_shrink(dy, lora_B.t(), scaling, factor=factor)[0] if need_ds else None
        db = lora_grad_a(dy, s, None, lora_B.dtype).t() if need_db else None
        return ds, db
    column_blocks, splits, padded, launch = plan
    ds = empty_rows(M, R, dy.dtype, dy.device)
    db = torch.empty((N, R), dtype=lora_B.dtype, device=dy.device)
    ds_parts = dy.new_empty((column_blocks, M, padded), dtype=torch.float32)
    db_parts = dy.new_empty((splits, N, R), dtype=torch.float32)
    launch(dy, s, lora_B, ds_parts, db_parts)
    sum_splits(ds_parts, ds, scaling, keep_scale(dropout_p), other=(db_parts, db))
    return ds, db
