"""``s = scaling * dropout(x) A^T``: one read of x, the mask drawn in registers."""

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
    has_pdl,
    let_next_kernel_start,
    load_scaling,
    multiple,
    padded_columns,
    strides,
)
from .config import (
    cdiv,
    dropout_threshold,
    keep_scale,
    rank_block,
    runs_beside,
    shrink_beside_config,
    shrink_config,
    shrink_splits,
    vector,
)
from .dropout import draw_words, pack_bits, where_kept
from .launch import Launch, cached_plan
from .reduce import sum_splits
from .tuned import choose


@triton.jit(do_not_specialize=["threshold"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, s_ptr, mask_ptr, seed_ptr, scaling, threshold, keep_scale,
    M, K, R, depth, columns, stride_xm, stride_xk, stride_ar, stride_ak, stride_sm,
    SCALING_IS_TENSOR: tl.constexpr, SCALING_PER_RANK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    R_VECTOR: tl.constexpr, AK_VECTOR: tl.constexpr, SM_VECTOR: tl.constexpr,
    PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``s[m, r] = scaling * keep_scale * sum_k keep[m, k] x[m, k] A[r, k]``.

    Grid: ``(cdiv(M, BLOCK_M), splits)``; a program takes its rows over ``depth`` of K, a multiple of
    BLOCK_K, and writes their keep bits too. With more than one split, ``s`` are fp32 parts of the sum.
    ``columns`` are those to be written: R, or a row with its padding, which is zeros then.
    """
    let_next_kernel_start(PDL)
    R, stride_sm = multiple(R, R_VECTOR), multiple(stride_sm, SM_VECTOR)
    stride_ak = multiple(stride_ak, AK_VECTOR)
    first = tl.program_id(1) * depth
    last = tl.minimum(first + depth, K)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_g = tl.arange(0, BLOCK_K // 8)
    row_bytes = (K + 7) // 8
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(first, last, BLOCK_K):
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + (k + offs_k)[None, :] * stride_xk,
            mask=(offs_m[:, None] < M) & (k + offs_k[None, :] < K),
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        a = tl.load(
            a_ptr + offs_r[None, :] * stride_ar + (k + offs_k)[:, None] * stride_ak,
            mask=(offs_r[None, :] < R) & (k + offs_k[:, None] < K),
            other=0.0,
        )  # [BLOCK_K, BLOCK_R]
        if HAS_DROPOUT:
            groups = k // 8 + offs_g
            words = draw_words(seed, offs_m[:, None], groups[None, :], threshold)
            tl.store(
                mask_ptr + offs_m[:, None] * row_bytes + groups[None, :],
                pack_bits(words),
                mask=(offs_m[:, None] < M) & (groups[None, :] < row_bytes),
            )
            x = where_kept(x, words, BLOCK_M, BLOCK_K)
        acc = dot(x, a.to(x.dtype), acc, PRECISION)  # [BLOCK_M, BLOCK_R]
    if SCALING_PER_RANK:
        factors = tl.load(scaling + offs_r, mask=offs_r < R, other=0.0)  # [BLOCK_R]
        acc *= factors[None, :] * keep_scale
    else:
        acc *= load_scaling(scaling, SCALING_IS_TENSOR) * keep_scale
    part_ptr = s_ptr + tl.program_id(1).to(tl.int64) * M * stride_sm
    tl.store(
        part_ptr + offs_m[:, None] * stride_sm + offs_r[None, :],
        acc.to(s_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_r[None, :] < columns),
    )


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    R: int,
    a_stride: tuple[int, ...],
    a_dtype: torch.dtype,
    s_stride: int,
    device: torch.device,
    scaling_kind: tuple[int, torch.dtype] | None,
    has_dropout: bool,
    precision: str,
    product_columns: int,
    may_split: bool,
) -> tuple[int, Launch]:
    """The number of splits and the launch."""
    (M, K), num_sms = shape, device_properties(device)[1]
    small = dtype.itemsize == 2 and R <= 32
    beside = small and product_columns > 0 and runs_beside(M, product_columns, num_sms)
    if beside:
        c = shrink_beside_config(M, num_sms)
    else:
        c = shrink_config(M, R, dtype.itemsize, num_sms, precision, has_dropout, a_dtype.itemsize)
    c = choose(
        "lora_shrink", c, device, dtype.itemsize, precision, R, {"M": M, "K": K}, dropout=has_dropout,
        fp32_adapters=a_dtype != dtype, x_strided=stride[1] != 1, a_strided=a_stride[1] != 1, beside=beside,
    )  # fmt: skip
    splits = shrink_splits(M, K, c.BLOCK_M, c.BLOCK_K, num_sms) if may_split else 1
    depth = cdiv(cdiv(K, splits), c.BLOCK_K) * c.BLOCK_K
    splits = cdiv(K, depth)
    a_strides = strides((R, K), a_stride)
    return splits, Launch(
        _lora_shrink_kernel, (cdiv(M, c.BLOCK_M), splits), device,
        M, K, R, depth, R if splits == 1 else s_stride, *strides(shape, stride), *a_strides, s_stride,
        fixed=True, SCALING_IS_TENSOR=scaling_kind is not None,
        SCALING_PER_RANK=scaling_kind is not None and scaling_kind[0] == 1,
        HAS_DROPOUT=has_dropout, PRECISION=precision,
        R_VECTOR=vector(R), AK_VECTOR=vector(a_strides[1]), SM_VECTOR=vector(s_stride),
        BLOCK_M=c.BLOCK_M, BLOCK_K=c.BLOCK_K, BLOCK_R=rank_block(R),
        num_warps=c.num_warps, num_stages=c.num_stages, PDL=has_pdl(device),
    )  # fmt: skip


def lora_shrink(
    x: Tensor,
    lora_A: Tensor,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    factor: float = 1.0,
    *,
    product_columns: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``s = factor * scaling * dropout(x) A^T``, and the packed keep mask.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        lora_A (Tensor): ``[R, K]``, any strides, cast to the dtype of x for the product.
        scaling (float | Tensor): a float, or on x's device a 0-dim tensor or an fp32 ``[R]``, dense, which
            has a factor for each rank.
        dropout_p (float): probability of dropping an element of x. Default: 0.0.
        seed (Tensor | None): 0-dim int64 on x's device; needed when ``dropout_p > 0``.
        factor (float): one more factor, applied in fp32. Default: 1.0.
        product_columns (int): columns of the GEMM that is launched next and may begin beside this kernel;
            0 for none. Default: 0.
        out (Tensor | None): ``[M, R]`` in the dtype of x, rows dense, to write s into: columns of a wider
            tensor, for example. Default: ``None``.

    Returns:
        tuple: s ``[M, R]`` in the dtype of x, its rows padded to 16 bytes (or ``out``), and the mask: uint8
        ``[M, ceil(K / 8)]`` (bit ``k % 8`` of byte ``k // 8`` is 1 where kept), ``None`` without dropout.
    """
    (M, K), R = x.shape, lora_A.shape[0]
    has_dropout = dropout_threshold(dropout_p) > 0  # a tiny p rounds to none
    splits, launch = _plan(
        x.shape, x.stride(), x.dtype, R, lora_A.stride(), lora_A.dtype,
        padded_columns(R, x.dtype.itemsize) if out is None else out.stride(0), x.device,
        (scaling.dim(), scaling.dtype) if isinstance(scaling, Tensor) else None, has_dropout,
        dot_precision(x.dtype),
        product_columns, out is None,
    )  # fmt: skip
    s = empty_rows(M, R, x.dtype, x.device) if out is None else out
    mask = torch.empty((M, cdiv(K, 8)), dtype=torch.uint8, device=x.device) if has_dropout else None
    parts = s if splits == 1 else s.new_empty((splits, M, s.stride(0)), dtype=torch.float32)
    launch(
        x, lora_A, parts, mask, seed if has_dropout else None,
        scaling if isinstance(scaling, Tensor) else float(scaling),
        dropout_threshold(dropout_p), keep_scale(dropout_p) * factor,
    )  # fmt: skip
    if splits > 1:
        sum_splits(parts, s)
    return s, mask
