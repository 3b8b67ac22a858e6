"""``y = x W0^T + bias + s B^T``: the frozen GEMM, with the rank product in the same accumulator."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import device_properties, dot, dot_precision, fits_tma, has_tma, store_tile, tile_of
from .config import cdiv, gemm_pointer_config, gemm_tma_config, rank_step


@triton.jit
def _add_rank_product(
    acc, s_ptr, b_ptr, offs_m, offs_n, M, N, R, stride_bn, stride_br,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``acc + s B^T`` for one output tile; s is contiguous ``[M, R]``."""
    for r in tl.range(0, R_STEPS * BLOCK_R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        s = tl.load(
            s_ptr + offs_m[:, None] * R + offs_r[None, :],
            mask=(offs_m[:, None] < M) & (offs_r[None, :] < R),
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        b = tl.load(
            b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None].to(tl.int64) * stride_br,
            mask=(offs_n[None, :] < N) & (offs_r[:, None] < R),
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        acc = dot(s, b.to(DTYPE), acc, PRECISION)  # [BLOCK_M, BLOCK_N]
    return acc


@triton.jit
def _add_bias(acc, bias_ptr, offs_n, N):
    """``acc + bias`` over the rows of a tile."""
    return acc + tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _lora_forward_tma_kernel(
    x_desc, w_desc, y_desc, s_ptr, b_ptr, bias_ptr,
    M, N, K, R, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """``y = x W^T + s B^T + bias`` by TMA loads and stores. Grid: persistent, one program an SM."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            x = x_desc.load([start_m, k * BLOCK_K])  # [BLOCK_M, BLOCK_K]
            w = w_desc.load([start_n, k * BLOCK_K])  # [BLOCK_N, BLOCK_K]
            acc = dot(x, w.T, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
        offs_m = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        offs_n = start_n.to(tl.int64) + tl.arange(0, BLOCK_N)
        acc = _add_rank_product(
            acc, s_ptr, b_ptr, offs_m, offs_n, M, N, R, stride_bn, stride_br,
            y_desc.dtype, PRECISION, R_STEPS, BLOCK_R,
        )  # fmt: skip
        if HAS_BIAS:
            acc = _add_bias(acc, bias_ptr, offs_n, N)
        store_tile(y_desc, acc, start_m, start_n, BLOCK_M, BLOCK_N, SUBTILES)


@triton.jit
def _lora_forward_pointer_kernel(
    x_ptr, w_ptr, y_ptr, s_ptr, b_ptr, bias_ptr,
    M, N, K, R, stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``y = x W^T + s B^T + bias`` for any strides. Grid: one program a tile of y."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
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
        acc = dot(x, w, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
    acc = _add_rank_product(
        acc, s_ptr, b_ptr, offs_m, offs_n, M, N, R, stride_bn, stride_br,
        y_ptr.dtype.element_ty, PRECISION, R_STEPS, BLOCK_R,
    )  # fmt: skip
    if HAS_BIAS:
        acc = _add_bias(acc, bias_ptr, offs_n, N)
    tl.store(
        y_ptr + offs_m[:, None] * N + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


def lora_forward(
    x: Tensor, weight: Tensor, s: Tensor, lora_B: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``y = x W0^T + bias + s B^T`` in the dtype of x, contiguous.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        weight (Tensor): ``[N, K]`` in the dtype of x, any strides.
        s (Tensor): ``[M, R]`` contiguous, in the dtype of x, as `lora_shrink` gives it.
        lora_B (Tensor): ``[N, R]``, any strides, cast to the dtype of x for the product.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.

    Returns:
        Tensor: ``[M, N]``.
    """
    (M, K), N, R = x.shape, weight.shape[0], lora_B.shape[1]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    precision, block_r = dot_precision(x.dtype), rank_step(R, x.element_size())
    major, num_sms = device_properties(x.device)
    flags = {
        "HAS_BIAS": bias is not None,
        "PRECISION": precision,
        "R_STEPS": cdiv(R, block_r),
        "BLOCK_R": block_r,
    }
    if has_tma(major) and precision == "tf32" and fits_tma(x, weight, y):
        c = gemm_tma_config(M, N, R, x.element_size(), num_sms)
        _lora_forward_tma_kernel[(min(num_sms, cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N)),)](
            TensorDescriptor.from_tensor(x, [c.BLOCK_M, c.BLOCK_K]),
            TensorDescriptor.from_tensor(weight, [c.BLOCK_N, c.BLOCK_K]),
            TensorDescriptor.from_tensor(y, [c.BLOCK_M, c.BLOCK_N // c.SUBTILES]),
            s, lora_B, bias, M, N, K, R, lora_B.stride(0), lora_B.stride(1),
            BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, GROUP_M=c.GROUP_M,
            SUBTILES=c.SUBTILES, num_warps=c.num_warps, num_stages=c.num_stages, **flags,
        )  # fmt: skip
        return y
    c = gemm_pointer_config(x.element_size(), precision)
    _lora_forward_pointer_kernel[(cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N),)](
        x, weight, y, s, lora_B, bias, M, N, K, R,
        x.stride(0), x.stride(1), weight.stride(0), weight.stride(1),
        lora_B.stride(0), lora_B.stride(1),
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, GROUP_M=c.GROUP_M,
        num_warps=c.num_warps, num_stages=c.num_stages, **flags,
    )  # fmt: skip
    return y
