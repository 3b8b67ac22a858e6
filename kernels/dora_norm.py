"""``g = magnitude / norm``, DoRA's column scale, and the norms of the rows of ``W0 + scaling * B A``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dot, dot_precision, load_scaling, strides
from .config import cdiv, dora_norm_config, rank_block
from .launch import Launch, cached_plan


@triton.jit
def _dora_norm_kernel(
    w_ptr, a_ptr, b_ptr, magnitude_ptr, g_ptr, norm_ptr, scaling,
    N, K, R, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    SCALING_IS_TENSOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``norm[n]^2 = sum_k (w[n, k] + scaling * sum_r B[n, r] A[r, k])^2``, ``g = magnitude / norm``.

    Grid: ``cdiv(N, BLOCK_N)``; a program takes its rows over all of K. It forms the sum a tile at a time,
    in registers: the expanded square, of ``W A^T`` and ``A A^T``, takes as many products and cancels where
    the two parts do.
    """
    dtype = w_ptr.dtype.element_ty
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    factor = load_scaling(scaling, SCALING_IS_TENSOR)
    b = tl.load(
        b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br,
        mask=(offs_n[:, None] < N) & (offs_r[None, :] < R),
        other=0.0,
    ).to(dtype)  # [BLOCK_N, BLOCK_R]
    following = tl.load(
        w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk,
        mask=(offs_n[:, None] < N) & (offs_k[None, :] < K),
        other=0.0,
    )  # [BLOCK_N, BLOCK_K]
    squares = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        # W is loaded a step ahead by hand: only what a product reads is pipelined.
        w, next_k = following, k + BLOCK_K + offs_k
        following = tl.load(
            w_ptr + offs_n[:, None] * stride_wn + next_k[None, :] * stride_wk,
            mask=(offs_n[:, None] < N) & (next_k[None, :] < K),
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        a = tl.load(
            a_ptr + offs_r[:, None] * stride_ar + (k + offs_k)[None, :] * stride_ak,
            mask=(offs_r[:, None] < R) & (k + offs_k[None, :] < K),
            other=0.0,
        )  # [BLOCK_R, BLOCK_K]
        zero = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        row = w.to(tl.float32) + factor * dot(b, a.to(dtype), zero, PRECISION)  # [BLOCK_N, BLOCK_K]
        squares += row * row
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    magnitude = tl.load(magnitude_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    tl.store(g_ptr + offs_n, tl.div_rn(magnitude, norm), mask=offs_n < N)
    tl.store(norm_ptr + offs_n, norm, mask=offs_n < N)


@cached_plan
def _plan(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    R: int,
    strides_of: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    scaling_dtype: torch.dtype | None,
    device: torch.device,
    precision: str,
) -> Launch:
    """The launch for a weight of ``shape``; ``strides_of`` weight, lora_A and lora_B."""
    N, K = shape
    c = dora_norm_config(dtype.itemsize, R, precision)
    shapes = (shape, (R, K), (N, R))
    return Launch(
        _dora_norm_kernel, (cdiv(N, c.BLOCK_N),), device, N, K, R,
        *(s for pair in zip(shapes, strides_of, strict=True) for s in strides(*pair)),
        fixed=True, SCALING_IS_TENSOR=scaling_dtype is not None, PRECISION=precision,
        BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=rank_block(R),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def dora_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float | Tensor
) -> tuple[Tensor, Tensor]:
    """``g = magnitude / norm`` and the norms of the rows of ``W0 + scaling * B A``, from one read of W0.

    Args:
        weight (Tensor): ``[N, K]``, any strides.
        lora_A (Tensor): ``[R, K]``, any strides, cast to the dtype of weight for the product.
        lora_B (Tensor): ``[N, R]``, likewise.
        magnitude (Tensor): ``[N]``, contiguous.
        scaling (float | Tensor): a float, or a 0-dim tensor on the device of weight.

    Returns:
        tuple: g and norm, fp32 ``[N]``.
    """
    N, R, device = weight.shape[0], lora_A.shape[0], weight.device
    launch = _plan(
        weight.shape, weight.dtype, R, (weight.stride(), lora_A.stride(), lora_B.stride()),
        (lora_A.dtype, lora_B.dtype, magnitude.dtype),
        scaling.dtype if isinstance(scaling, Tensor) else None, device,
        dot_precision(weight.dtype, R),
    )  # fmt: skip
    g = torch.empty((N,), dtype=torch.float32, device=device)
    norm = torch.empty((N,), dtype=torch.float32, device=device)
    launch(
        weight, lora_A, lora_B, magnitude, g, norm,
        scaling if isinstance(scaling, Tensor) else float(scaling),
    )  # fmt: skip
    return g, norm
