"""``y = x W^T + bias + u`` for few rows: the stream of W, behind which the kernels that make u hide."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    add_bias,
    add_frozen_product,
    dot_precision,
    has_pdl,
    let_next_kernel_start,
    strides,
    tile_of,
    wait_for_previous_kernel,
)
from .config import LaunchConfig, cdiv, multi_decode_overlaps
from .launch import Launch, cached_plan


@triton.jit
def _lora_multi_decode_kernel(
    x_ptr, w_ptr, y_ptr, u_ptr, bias_ptr, ids_ptr,
    M, N, K, split_k, stride_xm, stride_xk, stride_wn, stride_wk,
    HAS_BIAS: tl.constexpr, IN_PARTS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``y = x W^T + u + bias``, or a part of ``x W^T`` over ``split_k`` of K in fp32.

    Grid: ``(tiles of y, parts)``. u counts only where a row has an adapter.
    """
    let_next_kernel_start(PDL)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_k = tl.program_id(1).to(tl.int64) * split_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = add_frozen_product(
        acc, x_ptr + first_k * stride_xk, w_ptr + first_k * stride_wk, offs_m, offs_n, M, N,
        min(split_k, K - first_k), stride_xm, stride_xk, stride_wn, stride_wk, PRECISION, BLOCK_K,
    )  # fmt: skip
    inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tile = offs_m[:, None] * N + offs_n[None, :]
    if IN_PARTS:
        y_ptr += tl.program_id(1).to(tl.int64) * M * N
        wait_for_previous_kernel(PDL)  # the next kernel waits for this one alone
    else:
        adapted = tl.load(ids_ptr + offs_m, mask=offs_m < M, other=-1) >= 0
        wait_for_previous_kernel(PDL)
        acc += tl.load(u_ptr + tile, mask=inside & adapted[:, None], other=0.0)
        if HAS_BIAS:
            acc = add_bias(acc, bias_ptr, offs_n, N)
    tl.store(y_ptr + tile, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lora_multi_sum_kernel(
    parts_ptr, u_ptr, bias_ptr, ids_ptr, y_ptr, M, N, parts,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``y = sum of parts + u + bias``, in order. Grid: ``(rows, blocks of columns)``."""
    m = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, row = offs_n < N, m * N + offs_n
    adapted = tl.load(ids_ptr + m) >= 0
    wait_for_previous_kernel(PDL)
    acc = tl.load(u_ptr + row, mask=inside & adapted, other=0.0)
    for part in range(0, parts):
        acc += tl.load(parts_ptr + tl.cast(part, tl.int64) * M * N + row, mask=inside, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, acc.to(y_ptr.dtype.element_ty), mask=inside)


@cached_plan
def _plan(
    c: LaunchConfig,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    w_shape: tuple[int, ...],
    w_stride: tuple[int, ...],
    device: torch.device,
    bias_dtype: torch.dtype | None,
    precision: str,
) -> tuple[int, Launch, Launch]:
    """Parts of K, the launch of the product, and the one that sums the parts."""
    (M, K), N, has_bias = shape, w_shape[0], bias_dtype is not None
    pdl = has_pdl(device) and multi_decode_overlaps(M)
    split_k = cdiv(cdiv(K, c.SPLITS), c.BLOCK_K) * c.BLOCK_K
    parts = cdiv(K, split_k)
    product = Launch(
        _lora_multi_decode_kernel, (cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N), parts), device,
        M, N, K, split_k, *strides(shape, stride), *strides(w_shape, w_stride),
        fixed=True, HAS_BIAS=has_bias and parts == 1, IN_PARTS=parts > 1, PRECISION=precision, PDL=pdl,
        launch_pdl=pdl, BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, GROUP_M=c.GROUP_M,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    block_n = 512
    total = Launch(
        _lora_multi_sum_kernel, (M, cdiv(N, block_n)), device, M, N, parts,
        fixed=True, HAS_BIAS=has_bias, PDL=pdl, launch_pdl=pdl, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return parts, product, total


def lora_multi_decode(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    ids: Tensor,
    c: LaunchConfig,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = x W^T + bias + u`` in the dtype of x, contiguous; u only where a row has an adapter.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        weight (Tensor): ``[N, K]`` in the dtype of x, any strides.
        u (Tensor): fp32 ``[M, N]``, as `lora_multi_expand` gives it.
        ids (Tensor): int32 ``[M]``, -1 for rows without an adapter.
        c (LaunchConfig): of `multi_decode_config`.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.

    Returns:
        Tensor: ``[M, N]``. Sums go in a fixed order: bit-identical from run to run.
    """
    (M, K), N = x.shape, weight.shape[0]
    parts, product, total = _plan(
        c, x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), x.device,
        None if bias is None else bias.dtype, dot_precision(x.dtype, K),
    )  # fmt: skip
    y = x.new_empty((M, N))
    if parts == 1:
        product(x, weight, y, u, bias, ids)
        return y
    sums = torch.empty((parts, M, N), dtype=torch.float32, device=x.device)
    product(x, weight, sums, u, None, ids)
    total(sums, u, bias, ids, y)
    return y
