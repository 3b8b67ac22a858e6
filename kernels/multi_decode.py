"""``y = x W^T + bias + s B[id]^T`` for few rows: a stream of W, each row's own B gathered beside it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    adapters_of_rows,
    add_bias,
    add_frozen_product,
    dot_precision,
    has_pdl,
    let_next_kernel_start,
    multiple,
    strides,
    tile_of,
    wait_for_previous_kernel,
)
from .config import LaunchConfig, cdiv, vector
from .config_multi import rows_ranks
from .launch import Launch, cached_plan
from .multi_add import near_ranks, sum_of_parts


@triton.jit
def gather_rows(
    b_ptr, slots, ranks, offs_n, start_r, N, R, stride_bl, stride_bn, stride_br,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``B[l, n, r]`` of each row's adapter l, as far as its rank rounded up to 8; no more is read."""
    offs_r = start_r + tl.arange(0, BLOCK_R)
    inside = (offs_n[None, :, None] < N) & (offs_r[None, None, :] < R)
    return tl.load(
        b_ptr + slots[:, None, None] * stride_bl
        + offs_n[None, :, None] * stride_bn + offs_r[None, None, :].to(tl.int64) * stride_br,
        mask=inside & near_ranks(start_r, ranks[:, None, None], BLOCK_R),
        other=0.0,
    )  # [BLOCK_M, BLOCK_N, BLOCK_R]  # fmt: skip


@triton.jit
def update_of_rows(
    b, s_ptr, ranks, offs_m, start_r, stride_sp, stride_sm, PARTS: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """``sum_r s[m, r] B[l, n, r]`` of one block of ranks, in fp32."""
    offs_r = start_r + tl.arange(0, BLOCK_R)
    s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :]
    mask = offs_r[None, :] < ranks[:, None]
    s = sum_of_parts(s_ptrs, mask, stride_sp, PARTS)  # [BLOCK_M, BLOCK_R]
    b = tl.where(mask[:, None, :], b, 0.0)  # what is there from an adapter before
    return tl.sum(s[:, None, :] * b.to(tl.float32), axis=2)  # [BLOCK_M, BLOCK_N]


@triton.jit
def _lora_multi_decode_kernel(
    x_ptr, w_ptr, y_ptr, s_ptr, b_ptr, bias_ptr, ids_ptr, ranks_ptr,
    M, N, K, R, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_sp, stride_sm, stride_bl, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, S_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, R_VECTOR: tl.constexpr, BN_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``y[m] = x[m] W^T + bias + s[m] B[ids[m]]^T``. Grid: one program a tile of y.

    The first ranks of B are on their way before the stream of W, and s is waited for after it.
    """
    let_next_kernel_start(PDL)
    R, stride_bn = multiple(R, R_VECTOR), multiple(stride_bn, BN_VECTOR)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    slots, ranks = adapters_of_rows(ids_ptr, ranks_ptr, offs_m, M, R)
    b = gather_rows(b_ptr, slots, ranks, offs_n, 0, N, R, stride_bl, stride_bn, stride_br, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = add_frozen_product(
        acc, x_ptr, w_ptr, offs_m, offs_n, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    wait_for_previous_kernel(PDL)
    acc += update_of_rows(b, s_ptr, ranks, offs_m, 0, stride_sp, stride_sm, S_PARTS, BLOCK_R)
    for r in range(BLOCK_R, tl.max(ranks, axis=0), BLOCK_R):
        b = gather_rows(
            b_ptr, slots, ranks, offs_n, r, N, R, stride_bl, stride_bn, stride_br, BLOCK_R
        )
        acc += update_of_rows(b, s_ptr, ranks, offs_m, r, stride_sp, stride_sm, S_PARTS, BLOCK_R)
    if HAS_BIAS:
        acc = add_bias(acc, bias_ptr, offs_n, N)
    tl.store(
        y_ptr + offs_m[:, None] * N + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


@cached_plan
def _plan(
    c: LaunchConfig,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    w_shape: tuple[int, ...],
    w_stride: tuple[int, ...],
    s_shape: tuple[int, ...],
    s_stride: tuple[int, ...],
    b_stride: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    itemsize: int,
    device: torch.device,
    has_ranks: bool,
    precision: str,
) -> Launch:
    (M, K), N, (parts, _, R), pdl = shape, w_shape[0], s_shape, has_pdl(device)
    b_strides = strides((0, N, R), b_stride)
    return Launch(
        _lora_multi_decode_kernel, (cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N),), device,
        M, N, K, R, *strides(shape, stride), *strides(w_shape, w_stride),
        *s_stride[:2], *b_strides,
        fixed=True, HAS_BIAS=dtypes[-1] is not None, S_PARTS=parts, PRECISION=precision,
        PDL=pdl, launch_pdl=pdl,
        R_VECTOR=vector(R), BN_VECTOR=vector(b_strides[1]),
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, GROUP_M=c.GROUP_M,
        BLOCK_R=rows_ranks(R, c.BLOCK_M * c.BLOCK_N, c.num_warps, itemsize),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_multi_decode(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    ranks: Tensor | None,
    ids: Tensor,
    c: LaunchConfig,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = x W^T + bias + s B[l]^T`` in the dtype of x, contiguous; l is each row's adapter.

    What a row adds is summed in fp32, without tensor cores: the work is that of reading B.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        weight (Tensor): ``[N, K]`` in the dtype of x, any strides.
        s (Tensor): ``[parts, M, R]``, rows dense, of `lora_multi_shrink` or its kin.
        lora_B (Tensor): ``[L, N, R]``, any strides.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        ids (Tensor): int32 ``[M]``, -1 for rows without an adapter.
        c (LaunchConfig): of `multi_decode_config`.
        bias (Tensor | None): ``[N]`` contiguous. Default: ``None``.

    Returns:
        Tensor: ``[M, N]``. Sums go in a fixed order: bit-identical from run to run.
    """
    (M, K), N = x.shape, weight.shape[0]
    launch = _plan(
        c, x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), s.shape, s.stride(),
        lora_B.stride(), (s.dtype, lora_B.dtype, None if bias is None else bias.dtype),
        lora_B.dtype.itemsize, x.device, ranks is not None, dot_precision(x.dtype, K),
    )  # fmt: skip
    y = x.new_empty((M, N))
    launch(x, weight, y, s, lora_B, bias, ids, ranks)
    return y
