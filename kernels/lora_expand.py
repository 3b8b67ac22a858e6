"""``u = keep * (s B^T) + bias``: the rank product alone, for a frozen product that is added to it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import add_bias, add_rank_product, dot_precision, multiple, strides, tile_of
from .config import cdiv, expand_config, rank_step, vector
from .dropout import keep_tile, load_packed, mask_word
from .launch import Launch, cached_plan


@triton.jit
def _lora_expand_kernel(
    s_ptr, b_ptr, mask_ptr, bias_ptr, u_ptr, M, N, R, stride_sm, stride_bn, stride_br,
    MASK_WORD: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    R_VECTOR: tl.constexpr, SM_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``u[m, n] = keep[m, n] * sum_r s[m, r] B[n, r] + bias[n]``. Grid: one program a tile of u."""
    R, stride_sm = multiple(R, R_VECTOR), multiple(stride_sm, SM_VECTOR)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if MASK_WORD > 0:
        packed = load_packed(mask_ptr, offs_m, tile_n * BLOCK_N, M, N, BLOCK_N, MASK_WORD)
    acc = add_rank_product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), s_ptr, b_ptr,
        offs_m, offs_m[:, None] < M, offs_n, N, R, R_STEPS * BLOCK_R,
        stride_sm, stride_bn, stride_br, u_ptr.dtype.element_ty, PRECISION, BLOCK_R,
    )  # fmt: skip
    if MASK_WORD > 0:
        acc = tl.where(
            keep_tile(packed, BLOCK_M, BLOCK_N, MASK_WORD), acc, 0.0
        )  # [BLOCK_M, BLOCK_N]
    if HAS_BIAS:
        acc = add_bias(acc, bias_ptr, offs_n, N)
    tl.store(
        u_ptr + offs_m[:, None] * N + offs_n[None, :],
        acc.to(u_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


@cached_plan
def _plan(
    M: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    s_stride: int,
    device: torch.device,
    word: int,
    precision: str,
) -> Launch:
    (N, R), itemsize = shape, dtypes[0].itemsize  # type: ignore[union-attr]
    c, block_r = expand_config(M, itemsize), rank_step(R, itemsize)
    return Launch(
        _lora_expand_kernel, (cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N),), device,
        M, N, R, s_stride, *strides(shape, stride),
        fixed=True, MASK_WORD=word, HAS_BIAS=dtypes[2] is not None, PRECISION=precision,
        R_VECTOR=vector(R), SM_VECTOR=vector(s_stride),
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, GROUP_M=c.GROUP_M,
        R_STEPS=cdiv(R, block_r), BLOCK_R=block_r, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_expand(
    s: Tensor,
    lora_B: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``u = keep * (s B^T) + bias`` in the dtype of s, contiguous.

    Args:
        s (Tensor): ``[M, R]``, rows dense, as `lora_shrink` gives it.
        lora_B (Tensor): ``[N, R]``, any strides, cast to the dtype of s for the product.
        mask (Tensor | None): packed bits ``[M, ceil(N / 8)]`` of the elements that are kept. Default:
            ``None``, all kept.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.
        out (Tensor | None): ``[M, N]`` in the dtype of s, contiguous, to write u into. Default: ``None``.

    Returns:
        Tensor: ``[M, N]``.
    """
    M, N = s.shape[0], lora_B.shape[0]
    launch = _plan(
        M, lora_B.shape, lora_B.stride(),
        (s.dtype, lora_B.dtype, None if bias is None else bias.dtype),
        s.stride(0), s.device, mask_word(mask, N), dot_precision(s.dtype),
    )  # fmt: skip
    u = s.new_empty((M, N)) if out is None else out
    launch(s, lora_B, mask, bias, u)
    return u
