"""``dA = ds^T dropout(x)`` and ``dB = dy^T s`` in one launch, made to run beside the GEMM of dx."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    device_properties,
    dot,
    dot_precision,
    has_pdl,
    let_next_kernel_start,
    multiple,
    strides,
)
from .config import cdiv, grad_ab_config, rank_block, vector
from .dropout import load_words, mask_word, where_kept
from .launch import Launch, cached_plan
from .lora_grad_ab_tma import fits_grad_ab_tma, lora_grad_ab_tma
from .tuned import choose


@triton.jit
def _sum_over_rows(
    x_ptr, ds_ptr, mask_ptr, out_ptr, start_k,
    M, K, R, stride_xm, stride_xk, stride_dsm, stride_or, stride_ok,
    MASK_WORD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``out[r, k] = sum_m ds[m, r] keep[m, k] x[m, k]`` for BLOCK_C columns from ``start_k`` on.

    The masked operand is the right one, which a tensor core reads from shared memory: the ptxas hazard
    (triton#9433) does not arise.
    """
    offs_k = start_k.to(tl.int64) + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for m in range(0, M, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk,
            mask=(offs_m[:, None] < M) & (offs_k[None, :] < K),
            other=0.0,
        )  # [BLOCK_M, BLOCK_C]
        ds = tl.load(
            ds_ptr + offs_m[None, :] * stride_dsm + offs_r[:, None],
            mask=(offs_m[None, :] < M) & (offs_r[:, None] < R),
            other=0.0,
        )  # [BLOCK_R, BLOCK_M]
        if MASK_WORD > 0:
            words = load_words(mask_ptr, offs_m, start_k, M, K, BLOCK_M, BLOCK_C, MASK_WORD)
            x = where_kept(x, words, BLOCK_M, BLOCK_C)
        acc = dot(ds, x, acc, PRECISION)  # [BLOCK_R, BLOCK_C]
    tl.store(
        out_ptr + offs_r[:, None].to(tl.int64) * stride_or + offs_k[None, :] * stride_ok,
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_r[:, None] < R) & (offs_k[None, :] < K),
    )


@triton.jit
def _lora_grad_ab_kernel(
    x_ptr, ds_ptr, mask_ptr, da_ptr, dy_ptr, s_ptr, db_ptr,
    M, K, N, R, blocks_a, stride_xm, stride_xk, stride_dsm, stride_dym, stride_dyn, stride_sm,
    MASK_WORD: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    R_VECTOR: tl.constexpr, DS_VECTOR: tl.constexpr, S_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``dA [R, K] = ds^T (mask * x)`` and ``dB [N, R] = dy^T s``.

    Grid: a program for every BLOCK_C columns of x, then of dy; each goes over all rows.
    """
    let_next_kernel_start(PDL)
    R = multiple(R, R_VECTOR)
    stride_dsm, stride_sm = multiple(stride_dsm, DS_VECTOR), multiple(stride_sm, S_VECTOR)
    block = tl.program_id(0)
    if block < blocks_a:
        _sum_over_rows(
            x_ptr, ds_ptr, mask_ptr, da_ptr, block * BLOCK_C,
            M, K, R, stride_xm, stride_xk, stride_dsm, K, 1,
            MASK_WORD, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip
    else:
        _sum_over_rows(
            dy_ptr, s_ptr, mask_ptr, db_ptr, (block - blocks_a) * BLOCK_C,
            M, N, R, stride_dym, stride_dyn, stride_sm, 1, R,
            0, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    R: int,
    ds_stride: int,
    dy_shape: tuple[int, ...],
    dy_stride: tuple[int, ...],
    s_stride: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    word: int,
    precision: str,
) -> Launch:
    (M, K), N, num_sms = shape, dy_shape[1], device_properties(device)[1]
    c = choose(
        "lora_grad_ab", grad_ab_config(K, N, R, dtype.itemsize, num_sms, precision, word > 0), device,
        dtype.itemsize, precision, R, {"M": M, "K": K, "N": N}, dropout=word > 0,
        x_strided=stride[1] != 1, dy_strided=dy_stride[1] != 1,
    )  # fmt: skip
    blocks_a = cdiv(K, c.BLOCK_C)
    return Launch(
        _lora_grad_ab_kernel, (blocks_a + cdiv(N, c.BLOCK_C),), device,
        M, K, N, R, blocks_a, *strides(shape, stride), ds_stride,
        *strides(dy_shape, dy_stride), s_stride,
        fixed=True, MASK_WORD=word, PRECISION=precision, PDL=has_pdl(device),
        R_VECTOR=vector(R), DS_VECTOR=vector(ds_stride), S_VECTOR=vector(s_stride),
        BLOCK_M=c.BLOCK_M, BLOCK_C=c.BLOCK_C, BLOCK_R=rank_block(R),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_grad_ab(
    x: Tensor,
    ds: Tensor,
    mask: Tensor | None,
    dy: Tensor,
    s: Tensor,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``dA = ds^T (mask * x)`` and ``dB = dy^T s``; the GEMM launched next may run beside it.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        ds (Tensor): ``[M, R]``, rows dense, in the dtype of x, with scaling and 1 / (1 - p) in it.
        mask (Tensor | None): packed keep mask of `lora_shrink`, or ``None``.
        dy (Tensor): ``[M, N]``, any strides, in the dtype of x.
        s (Tensor): ``[M, R]``, rows dense, in the dtype of x, with scaling in it.
        a_dtype (torch.dtype): dtype of dA.
        b_dtype (torch.dtype): dtype of dB.

    Returns:
        tuple: dA ``[R, K]`` and dB ``[N, R]``, contiguous. A program sums all rows in order:
        bit-identical from run to run.
    """
    if mask is None and fits_grad_ab_tma(x, dy, s, ds):
        return lora_grad_ab_tma(x, ds, dy, s, a_dtype, b_dtype)
    (_, K), (_, N), R = x.shape, dy.shape, ds.shape[1]
    launch = _plan(
        x.shape, x.stride(), x.dtype, R, ds.stride(0), dy.shape, dy.stride(), s.stride(0),
        (a_dtype, b_dtype), x.device, mask_word(mask, K), dot_precision(x.dtype),
    )  # fmt: skip
    da = torch.empty((R, K), dtype=a_dtype, device=x.device)
    db = torch.empty((N, R), dtype=b_dtype, device=x.device)
    launch(x, ds, mask, da, dy, s, db)
    return da, db
