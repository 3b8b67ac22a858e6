"""``dA = ds^T dropout(x)``: one read of x, the mask from its packed bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import device_properties, dot, dot_precision, multiple, strides
from .config import cdiv, grad_a_config, rank_block, vector
from .dropout import load_words, mask_word, where_kept
from .launch import Launch, cached_plan
from .reduce import sum_splits
from .tuned import choose


@triton.jit
def _lora_grad_a_kernel(
    x_ptr, ds_ptr, mask_ptr, parts_ptr,
    M, K, R, rows_per_split, stride_xm, stride_xk, stride_dsm,
    MASK_WORD: tl.constexpr, PRECISION: tl.constexpr,
    R_VECTOR: tl.constexpr, DS_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``parts[split, r, k] = sum_m ds[m, r] keep[m, k] x[m, k]`` over the rows of a split.

    Grid: ``(cdiv(K, BLOCK_C), splits)``. The masked operand is the right one: a wgmma reads it from
    shared memory, so the register-operand hazard of ptxas (triton#9433) does not arise.
    """
    R, stride_dsm = multiple(R, R_VECTOR), multiple(stride_dsm, DS_VECTOR)
    start_k = tl.program_id(0) * BLOCK_C
    offs_k = start_k.to(tl.int64) + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    first = tl.program_id(1).to(tl.int64) * rows_per_split
    last = min(first + rows_per_split, M)
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk,
            mask=(offs_m[:, None] < last) & (offs_k[None, :] < K),
            other=0.0,
        )  # [BLOCK_M, BLOCK_C]
        ds = tl.load(
            ds_ptr + offs_m[None, :] * stride_dsm + offs_r[:, None],
            mask=(offs_m[None, :] < last) & (offs_r[:, None] < R),
            other=0.0,
        )  # [BLOCK_R, BLOCK_M]
        if MASK_WORD > 0:
            words = load_words(mask_ptr, offs_m, start_k, M, K, BLOCK_M, BLOCK_C, MASK_WORD)
            x = where_kept(x, words, BLOCK_M, BLOCK_C)
        acc = dot(ds, x, acc, PRECISION)  # [BLOCK_R, BLOCK_C]
    part = parts_ptr + tl.program_id(1).to(tl.int64) * R * K
    tl.store(
        part + offs_r[:, None].to(tl.int64) * K + offs_k[None, :],
        acc.to(parts_ptr.dtype.element_ty),
        mask=(offs_r[:, None] < R) & (offs_k[None, :] < K),
    )


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    R: int,
    ds_stride: int,
    device: torch.device,
    word: int,
    precision: str,
) -> tuple[int, Launch]:
    """The number of splits and the launch."""
    M, K = shape
    num_sms = device_properties(device)[1]
    c = grad_a_config(M, K, R, dtype.itemsize, num_sms, precision, word > 0)
    c = choose(
        "lora_grad_a", c, device, dtype.itemsize, precision, R, {"M": M, "K": K},
        dropout=word > 0, x_strided=stride[1] != 1,
    )  # fmt: skip
    rows_per_split = cdiv(cdiv(M, c.row_splits), c.BLOCK_M) * c.BLOCK_M
    splits = cdiv(M, rows_per_split)
    return splits, Launch(
        _lora_grad_a_kernel, (cdiv(K, c.BLOCK_C), splits), device,
        M, K, R, rows_per_split, *strides(shape, stride), ds_stride,
        MASK_WORD=word, PRECISION=precision,
        R_VECTOR=vector(R), DS_VECTOR=vector(ds_stride),
        BLOCK_M=c.BLOCK_M, BLOCK_C=c.BLOCK_C, BLOCK_R=rank_block(R),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_grad_a(x: Tensor, ds: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``dA = ds^T (mask * x)``; with ``x=dy, ds=s`` it is dB transposed.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        ds (Tensor): ``[M, R]``, rows dense, in the dtype of x, with scaling and 1 / (1 - p) in it.
        mask (Tensor | None): packed keep mask of `lora_shrink`, or ``None``.
        dtype (torch.dtype): dtype of the result.

    Returns:
        Tensor: ``[R, K]``, contiguous. Sums go in a fixed order: bit-identical from run to run.
    """
    R, K = ds.shape[1], x.shape[1]
    splits, launch = _plan(
        x.shape, x.stride(), x.dtype, R, ds.stride(0), x.device,
        mask_word(mask, K), dot_precision(x.dtype),
    )  # fmt: skip
    out = torch.empty((R, K), dtype=dtype, device=x.device)
    parts = (
        out if splits == 1 else torch.empty((splits, R, K), dtype=torch.float32, device=x.device)
    )
    launch(x, ds, mask, parts)
    if splits > 1:
        sum_splits(parts, out)
    return out
