"""``y = x W0^T + bias + scaling * x A^T B^T`` for few rows, in one launch that streams W and A."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    add_bias,
    device_properties,
    dot,
    dot_precision,
    empty_rows,
    load_scaling,
    multiple,
    padded_columns,
    strides,
)
from .config import cdiv, decode_config, rank_block, vector
from .launch import Launch, cached_plan


@triton.jit
def _lora_decode_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, y_ptr, s_ptr, scaling,
    M, N, K, R, stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak,
    stride_bn, stride_br, stride_sm,
    SCALING_IS_TENSOR: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``s = scaling * x A^T`` and ``y = x W^T + s B^T + bias``. Grid: one program for BLOCK_N columns of y.

    Every program makes s for itself: A comes from L2, in the time in which W comes from memory. B is on
    its way before the stream begins. The first program writes s, for the gradient of B.
    """
    K, stride_xm = multiple(K, VECTOR), multiple(stride_xm, VECTOR)
    stride_wn, stride_ar = multiple(stride_wn, VECTOR), multiple(stride_ar, VECTOR)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    dtype = y_ptr.dtype.element_ty
    b = tl.load(
        b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br,
        mask=(offs_n[None, :] < N) & (offs_r[:, None] < R),
        other=0.0,
    ).to(dtype)  # [BLOCK_R, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + (k + offs_k)[None, :] * stride_xk,
            mask=(offs_m[:, None] < M) & (k + offs_k[None, :] < K),
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        w = tl.load(
            w_ptr + offs_n[None, :] * stride_wn + (k + offs_k)[:, None] * stride_wk,
            mask=(offs_n[None, :] < N) & (k + offs_k[:, None] < K),
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        a = tl.load(
            a_ptr + offs_r[None, :] * stride_ar + (k + offs_k)[:, None] * stride_ak,
            mask=(offs_r[None, :] < R) & (k + offs_k[:, None] < K),
            other=0.0,
        )  # [BLOCK_K, BLOCK_R]
        acc = dot(x, w, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
        s = dot(x, a.to(dtype), s, PRECISION)  # [BLOCK_M, BLOCK_R]
    rounded = (s * load_scaling(scaling, SCALING_IS_TENSOR)).to(dtype)
    if tl.program_id(0) == 0:
        tl.store(
            s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :],
            rounded,
            mask=(offs_m[:, None] < M) & (offs_r[None, :] < R),
        )
    acc = dot(rounded, b, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
    if HAS_BIAS:
        acc = add_bias(acc, bias_ptr, offs_n, N)
    tl.store(
        y_ptr + offs_m[:, None] * N + offs_n[None, :],
        acc.to(dtype),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    w_shape: tuple[int, ...],
    w_stride: tuple[int, ...],
    R: int,
    a_stride: tuple[int, ...],
    b_stride: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    itemsize: int,
    a_itemsize: int,
    scaling_dtype: torch.dtype | None,
    device: torch.device,
    precision: str,
) -> Launch:
    (M, K), N = shape, w_shape[0]
    major, num_sms = device_properties(device)
    step = math.gcd(vector(K), stride[0], w_stride[0], a_stride[0])
    dense = stride[1] == w_stride[1] == a_stride[1] == 1
    by_vectors = dense and step * itemsize % 16 == 0
    c = decode_config(N, R, (itemsize, a_itemsize), by_vectors, num_sms, major)
    return Launch(
        _lora_decode_kernel, (cdiv(N, c.BLOCK_N),), device,
        M, N, K, R, *strides(shape, stride), *strides(w_shape, w_stride),
        *strides((R, K), a_stride), *strides((N, R), b_stride), padded_columns(R, itemsize),
        fixed=True, SCALING_IS_TENSOR=scaling_dtype is not None, HAS_BIAS=dtypes[-1] is not None,
        PRECISION=precision, VECTOR=step if by_vectors else 1,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=rank_block(R),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_decode(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = scaling * x A^T`` and ``y = x W0^T + s B^T + bias`` in one launch, for what `decodes` admits.

    Args:
        x (Tensor): ``[M, K]``, any strides, M at most `DECODE_ROWS`.
        weight (Tensor): ``[N, K]`` in the dtype of x, any strides.
        lora_A (Tensor): ``[R, K]``, any strides, cast to the dtype of x for the product.
        lora_B (Tensor): ``[N, R]``, any strides, likewise.
        scaling (float | Tensor): a float, or a 0-dim tensor on x's device.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.

    Returns:
        tuple: y ``[M, N]``, contiguous, and s ``[M, R]``, its rows padded to 16 bytes, both in x's dtype.
    """
    M, N, R = x.shape[0], weight.shape[0], lora_A.shape[0]
    launch = _plan(
        x.shape, x.stride(), weight.shape, weight.stride(), R, lora_A.stride(), lora_B.stride(),
        (x.dtype, lora_A.dtype, lora_B.dtype, None if bias is None else bias.dtype),
        x.element_size(), lora_A.element_size(),
        scaling.dtype if isinstance(scaling, Tensor) else None, x.device, dot_precision(x.dtype),
    )  # fmt: skip
    y, s = x.new_empty((M, N)), empty_rows(M, R, x.dtype, x.device)
    launch(
        x, weight, lora_A, lora_B, bias, y, s,
        scaling if isinstance(scaling, Tensor) else float(scaling),
    )  # fmt: skip
    return y, s
