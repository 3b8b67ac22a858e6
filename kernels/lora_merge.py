"""``out = weight + scaling * B A``: one read and one write of the weight, rounded once."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dot, strides
from .config import cdiv, merge_config, rank_step
from .launch import Launch, cached_plan


@triton.jit
def merge_tile(
    w_ptr, out_ptr, a_ptr, b_ptr, scaling, N, K, R,
    stride_wn, stride_wk, stride_on, stride_ok, stride_ar, stride_ak, stride_bn, stride_br,
    SAME_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``out[n, k] = w[n, k] + scaling * sum_r B[n, r] A[r, k]`` for the tile that program_id(0) counts.

    fp32 operands are multiplied exactly, whatever torch's switch for TF32 says: what is merged stays in
    the weights. ``out`` may be ``w``, since a program reads its own tile alone.
    """
    tiles_k = tl.cdiv(K, BLOCK_K)
    offs_n = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = (tl.program_id(0) % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for r in tl.range(0, R_STEPS * BLOCK_R, BLOCK_R, num_stages=1):
        offs_r = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
        b = tl.load(
            b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br,
            mask=(offs_n[:, None] < N) & (offs_r[None, :] < R),
            other=0.0,
        )  # [BLOCK_N, BLOCK_R]
        a = tl.load(
            a_ptr + offs_r[:, None] * stride_ar + offs_k[None, :] * stride_ak,
            mask=(offs_r[:, None] < R) & (offs_k[None, :] < K),
            other=0.0,
        )  # [BLOCK_R, BLOCK_K]
        if not SAME_DTYPE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = dot(b, a, acc, "ieee")  # [BLOCK_N, BLOCK_K]
    mask_nk = (offs_n[:, None] < N) & (offs_k[None, :] < K)
    w = tl.load(
        w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk, mask=mask_nk, other=0.0
    )  # [BLOCK_N, BLOCK_K]
    acc = w.to(tl.float32) + acc * scaling
    tl.store(
        out_ptr + offs_n[:, None] * stride_on + offs_k[None, :] * stride_ok,
        acc.to(out_ptr.dtype.element_ty),
        mask=mask_nk,
    )


@triton.jit
def _lora_merge_kernel(
    w_ptr, out_ptr, a_ptr, b_ptr, scaling, N, K, R,
    stride_wn, stride_wk, stride_on, stride_ok, stride_ar, stride_ak, stride_bn, stride_br,
    SAME_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``out = w + scaling * B A``. Grid: one program a tile."""
    merge_tile(
        w_ptr, out_ptr, a_ptr, b_ptr, scaling, N, K, R,
        stride_wn, stride_wk, stride_on, stride_ok, stride_ar, stride_ak, stride_bn, stride_br,
        SAME_DTYPE, BLOCK_N, BLOCK_K, R_STEPS, BLOCK_R,
    )  # fmt: skip


def merge_launch(
    kernel: Any,
    shape: tuple[int, ...],
    strides_of: tuple[tuple[int, ...], ...],
    R: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    layers: int = 1,
    **options: Any,
) -> Launch:
    """The launch of `merge_tile` on every tile of weights of ``shape``.

    Args:
        kernel: `_lora_merge_kernel`, or one with its sizes and constexpr parameters.
        shape (tuple[int, ...]): ``(N, K)``.
        strides_of (tuple[tuple[int, ...], ...]): of weight, out, lora_A and lora_B.
        R (int): the rank.
        dtypes (tuple[torch.dtype, torch.dtype]): of lora_A and lora_B.
        device (torch.device): where all of them are.
        layers (int): weights of a launch, the second dimension of the grid. Default: 1.
        **options: further constexpr parameters, and what `Launch` takes.

    Returns:
        Launch: called with the kernel's leading arguments.
    """
    N, K = shape
    itemsize = max(dtype.itemsize for dtype in dtypes)
    c, block_r = merge_config(itemsize), rank_step(R, itemsize)
    shapes = (shape, shape, (R, K), (N, R))
    return Launch(
        kernel, (cdiv(N, c.BLOCK_N) * cdiv(K, c.BLOCK_K), layers), device, N, K, R,
        *(s for pair in zip(shapes, strides_of, strict=True) for s in strides(*pair)),
        SAME_DTYPE=dtypes[0] == dtypes[1], BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K,
        R_STEPS=cdiv(R, block_r), BLOCK_R=block_r,
        num_warps=c.num_warps, num_stages=c.num_stages, **options,
    )  # fmt: skip


_plan = cached_plan(functools.partial(merge_launch, _lora_merge_kernel))


def lora_merge(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, out: Tensor
) -> Tensor:
    """``out = weight + scaling * lora_B lora_A``, summed in fp32 and rounded once.

    Args:
        weight (Tensor): ``[N, K]``, any strides.
        lora_A (Tensor): ``[R, K]``, any strides, in the dtype of weight or fp32.
        lora_B (Tensor): ``[N, R]``, likewise.
        scaling (float): factor of the product.
        out (Tensor): ``[N, K]`` in the dtype of weight, any strides; it may be weight itself.

    Returns:
        Tensor: ``out``.
    """
    strides_of = (weight.stride(), out.stride(), lora_A.stride(), lora_B.stride())
    dtypes = (lora_A.dtype, lora_B.dtype)
    launch = _plan(weight.shape, strides_of, lora_A.shape[0], dtypes, weight.device)
    launch(weight, out, lora_A, lora_B, float(scaling))
    return out
