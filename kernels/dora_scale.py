"""``g * W0`` and ``g * B``, row by row: DoRA's scale on the smaller side of its backward's products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import strides
from .config import cdiv, dora_scale_config, rank_block
from .launch import Launch, cached_plan


@triton.jit
def _dora_scale_kernel(
    w_ptr, b_ptr, g_ptr, scaled_w_ptr, scaled_b_ptr,
    N, K, R, stride_wn, stride_wk, stride_bn, stride_br,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``scaled_w[n, k] = g[n] w[n, k]`` and ``scaled_b[n, r] = g[n] B[n, r]``.

    Grid: ``(cdiv(K, BLOCK_K), cdiv(N, BLOCK_N))``, one program a tile of W; the first of a row of tiles takes
    the rows of B as well.
    """
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    g = tl.load(g_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]  # [BLOCK_N, 1]
    mask_nk = (offs_n[:, None] < N) & (offs_k[None, :] < K)
    w = tl.load(
        w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk, mask=mask_nk, other=0.0
    )  # [BLOCK_N, BLOCK_K]
    scaled_w = (g * w.to(tl.float32)).to(scaled_w_ptr.dtype.element_ty)
    tl.store(scaled_w_ptr + offs_n[:, None] * K + offs_k[None, :], scaled_w, mask=mask_nk)
    if tl.program_id(0) == 0:
        offs_r = tl.arange(0, BLOCK_R)
        mask_nr = (offs_n[:, None] < N) & (offs_r[None, :] < R)
        b = tl.load(
            b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br,
            mask=mask_nr,
            other=0.0,
        )  # [BLOCK_N, BLOCK_R]
        scaled_b = (g * b.to(tl.float32)).to(scaled_b_ptr.dtype.element_ty)
        tl.store(scaled_b_ptr + offs_n[:, None] * R + offs_r[None, :], scaled_b, mask=mask_nr)


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    R: int,
    b_stride: tuple[int, ...],
    b_dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    (N, K), c = shape, dora_scale_config(dtype.itemsize)
    return Launch(
        _dora_scale_kernel, (cdiv(K, c.BLOCK_C), cdiv(N, c.BLOCK_M)), device,
        N, K, R, *strides(shape, stride), *strides((N, R), b_stride),
        fixed=True, BLOCK_N=c.BLOCK_M, BLOCK_K=c.BLOCK_C, BLOCK_R=rank_block(R),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def dora_scale(weight: Tensor, lora_B: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of W0 and of B times g, for ``dx = dy (g W0) + ds A`` and ``ds = scaling * dy (g B)``.

    Args:
        weight (Tensor): ``[N, K]``, any strides.
        lora_B (Tensor): ``[N, R]``, any strides.
        g (Tensor): fp32 ``[N]``, contiguous.

    Returns:
        tuple: ``g W0`` in the dtype of weight, and ``g B`` in that of lora_B, both contiguous.
    """
    (N, K), R = weight.shape, lora_B.shape[1]
    launch = _plan(
        weight.shape, weight.stride(), weight.dtype, R, lora_B.stride(), lora_B.dtype, weight.device
    )
    scaled_w, scaled_b = weight.new_empty((N, K)), lora_B.new_empty((N, R))
    launch(weight, lora_B, g, scaled_w, scaled_b)
    return scaled_w, scaled_b
