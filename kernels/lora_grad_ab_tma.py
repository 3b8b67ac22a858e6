"""dA and dB as `lora_grad_ab`, by TMA and wgmma; ``ds = scaling * dy B`` in the same launch as well."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    aligned,
    device_properties,
    dot,
    empty_rows,
    for_tma,
    has_pdl,
    has_tma,
    let_next_kernel_start,
    load_scaling,
    multiple,
    rows_fit_tma,
)
from .config import (
    DS_ROWS,
    cdiv,
    grad_ab_makes_ds,
    grad_ab_tma_config,
    rank_block,
    vector,
)
from .dropout import load_words, mask_word, where_kept
from .launch import Launch, cached_plan
from .ready import Ready, announce, new_marks, wait_until_all_ready


@triton.jit
def _sum_over_rows(
    x_desc, ds_desc, out_ptr, start_c, M, C, R, stride_oc, stride_or,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``out[c, r] = sum_m x[m, c] ds[m, r]`` for BLOCK_C columns from ``start_c`` on.

    Tensor cores read both operands where TMA has put them: there is little else for a program to do.
    """
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m in range(0, M, BLOCK_M):
        x = x_desc.load([m, start_c])  # [BLOCK_M, BLOCK_C]
        ds = ds_desc.load([m, 0])  # [BLOCK_M, BLOCK_R]
        acc = dot(x.T, ds, acc, "tf32")  # [BLOCK_C, BLOCK_R]
    offs_c = start_c + tl.arange(0, BLOCK_C).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    tl.store(
        out_ptr + offs_c[:, None] * stride_oc + offs_r[None, :] * stride_or,
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_c[:, None] < C) & (offs_r[None, :] < R),
    )


@triton.jit
def _masked_sum_over_rows(
    x_desc, ds_desc, mask_ptr, out_ptr, start_c, M, C, R,
    MASK_WORD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``out[r, c] = sum_m ds[m, r] keep[m, c] x[m, c]`` for BLOCK_C columns from ``start_c`` on.

    The masked operand is the right one, which a wgmma reads from shared memory; the left one has 64 ranks
    at least, without which it would not be a wgmma.
    """
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for m in range(0, M, BLOCK_M):
        x = x_desc.load([m, start_c])  # [BLOCK_M, BLOCK_C]
        ds = ds_desc.load([m, 0])  # [BLOCK_M, BLOCK_R]
        offs_m = m + tl.arange(0, BLOCK_M)
        words = load_words(mask_ptr, offs_m, start_c, M, C, BLOCK_M, BLOCK_C, MASK_WORD)
        acc = dot(ds.T, where_kept(x, words, BLOCK_M, BLOCK_C), acc, "tf32")  # [BLOCK_R, BLOCK_C]
    offs_c = start_c + tl.arange(0, BLOCK_C).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    tl.store(
        out_ptr + offs_r[:, None] * C + offs_c[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_r[:, None] < R) & (offs_c[None, :] < C),
    )


@triton.jit
def _make_ds(
    dy_desc, b_desc, ds_ptr, start_m, factor, M, N, R, stride_dsm,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``ds[m, r] = factor * sum_n dy[m, n] B[n, r]`` for BLOCK_M rows from ``start_m`` on."""
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for n in tl.range(0, N, BLOCK_C, num_stages=STAGES):
        dy = dy_desc.load([start_m, n])  # [BLOCK_M, BLOCK_C]
        b = b_desc.load([n, 0])  # [BLOCK_C, BLOCK_R]
        acc = dot(dy, b, acc, "tf32")  # [BLOCK_M, BLOCK_R]
    offs_m = start_m + tl.arange(0, BLOCK_M).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    tl.store(
        ds_ptr + offs_m[:, None] * stride_dsm + offs_r[None, :],
        (acc * factor).to(ds_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_r[None, :] < R),
    )


@triton.jit(do_not_specialize=["ticket"])
def _lora_grad_ab_tma_kernel(
    x_desc, dy_desc, s_desc, ds_desc, b_desc, mask_ptr, ds_ptr, da_ptr, db_ptr, ready_ptr, scaling,
    keep_scale, ticket, M, K, N, R, makers, stride_dsm,
    MAKES_DS: tl.constexpr, SCALING_IS_TENSOR: tl.constexpr, MASK_WORD: tl.constexpr, PDL: tl.constexpr,
    DS_VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    DS_STAGES: tl.constexpr, BLOCK_DS: tl.constexpr,
):  # fmt: skip
    """``dB = dy^T s`` and ``dA = ds^T (mask * x)``; with MAKES_DS ``ds = scaling * dy B`` before, by TMA.

    Grid: persistent. A program takes BLOCK_C columns of dy over all rows, then others, then those of x.
    The first ``makers`` programs, which have columns of dy alone, make ds to begin with and mark its
    blocks of BLOCK_M rows, for the others and for the GEMM of dx, which runs beside. So programs wait for
    programs before them alone.
    """
    let_next_kernel_start(PDL)
    stride_dsm = multiple(stride_dsm, DS_VECTOR)
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks_a, blocks_b, marks = tl.cdiv(K, BLOCK_C), tl.cdiv(N, BLOCK_C), tl.cdiv(M, BLOCK_M)
    if MAKES_DS:  # noqa: SIM102 - decided when compiling, so it stands alone
        if program < makers:
            factor = load_scaling(scaling, SCALING_IS_TENSOR) * keep_scale
            for mark in range(program, marks, makers):
                _make_ds(
                    dy_desc, b_desc, ds_ptr, mark * BLOCK_M, factor, M, N, R, stride_dsm,
                    BLOCK_M, BLOCK_C, BLOCK_R, DS_STAGES,
                )  # fmt: skip
                announce(ready_ptr + mark, ticket)
    for block in range(program, blocks_b, programs):
        _sum_over_rows(
            dy_desc, s_desc, db_ptr, block * BLOCK_C, M, N, R, R, 1, BLOCK_M, BLOCK_C, BLOCK_R
        )
    first_a = (program + programs - blocks_b % programs) % programs
    if MAKES_DS:  # noqa: SIM102
        if first_a < blocks_a:
            wait_until_all_ready(ready_ptr, marks, ticket)
    for block in range(first_a, blocks_a, programs):
        if MASK_WORD > 0:
            _masked_sum_over_rows(
                x_desc, ds_desc, mask_ptr, da_ptr, block * BLOCK_C, M, K, R,
                MASK_WORD, BLOCK_M, BLOCK_C, BLOCK_DS,
            )  # fmt: skip
        else:
            _sum_over_rows(
                x_desc, ds_desc, da_ptr, block * BLOCK_C, M, K, R, 1, K, BLOCK_M, BLOCK_C, BLOCK_R
            )


@cached_plan
def _plan(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    N: int,
    R: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    word: int,
    makes_ds: bool,
    tensor_scaling: torch.dtype | None,
    strides_of: tuple[tuple[int, ...], ...],
) -> Launch:
    """The launch; strides are those of what is described to TMA."""
    (M, K), num_sms, block_r = shape, device_properties(device)[1], rank_block(R)
    c, programs, makers, ds_stages = grad_ab_tma_config(K, N, R, num_sms)
    block_ds = max(block_r, 64) if word > 0 else block_r
    wide, narrow = (c.BLOCK_M, c.BLOCK_C), (c.BLOCK_M, block_r)
    # With a mask the GEMM of dx leaves so many registers.
    options: dict[str, Any] = {"maxnreg": 112} if word > 0 else {}
    return Launch(
        _lora_grad_ab_tma_kernel, (programs,), device, M, K, N, R, makers, strides_of[3][0],
        boxes=(wide, wide, narrow, (c.BLOCK_M, block_ds), (c.BLOCK_C, block_r)), fixed=True,
        MAKES_DS=makes_ds, SCALING_IS_TENSOR=tensor_scaling is not None, MASK_WORD=word,
        PDL=has_pdl(device), DS_VECTOR=vector(strides_of[3][0]),
        BLOCK_M=c.BLOCK_M, BLOCK_C=c.BLOCK_C, BLOCK_R=block_r, DS_STAGES=ds_stages, BLOCK_DS=block_ds,
        num_warps=c.num_warps, num_stages=c.num_stages, **options,
    )  # fmt: skip


@cached_plan
def _fits(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    dy_shape: tuple[int, ...],
    dy_stride: tuple[int, ...],
    device: torch.device,
) -> bool:
    by_tma = has_tma(device_properties(device)[0]) and dtype.itemsize == 2
    return by_tma and rows_fit_tma(shape, stride, 2) and rows_fit_tma(dy_shape, dy_stride, 2)


def _fit(x: Tensor, dy: Tensor) -> bool:
    """Whether TMA can describe both, and tensor cores multiply them as they are."""
    return _fits(x.shape, x.stride(), x.dtype, dy.shape, dy.stride(), x.device) and aligned(x, dy)


def fits_grad_ab_tma(x: Tensor, dy: Tensor, s: Tensor, ds: Tensor) -> bool:
    """Whether `lora_grad_ab_tma` takes these tensors: those of `lora_grad_ab`, without a mask."""
    return s.shape[1] <= 128 and _fit(x, dy) and _fit(s, ds)


def makes_ds(x: Tensor, dy: Tensor, R: int, *, dropout: bool) -> bool:
    """Whether `lora_grad_ab_ds` takes these tensors, and is faster than a launch for ds before.

    Args:
        x (Tensor): ``[M, K]``.
        dy (Tensor): ``[M, N]`` in the dtype of x.
        R (int): the rank.
        dropout (bool): whether dA is to be made with a mask.
    """
    (M, K), N, num_sms = x.shape, dy.shape[1], device_properties(x.device)[1]
    return _fit(x, dy) and grad_ab_makes_ds(M, K, N, R, num_sms, dropout)


def lora_grad_ab_tma(
    x: Tensor,
    ds: Tensor,
    dy: Tensor,
    s: Tensor,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``dA = ds^T x`` and ``dB = dy^T s``; arguments are those of `lora_grad_ab`."""
    (_, K), (_, N), R = x.shape, dy.shape, ds.shape[1]
    launch = _plan(
        x.shape, x.dtype, N, R, (a_dtype, b_dtype), x.device, 0, False, None,
        (x.stride(), dy.stride(), s.stride(), ds.stride(), s.stride()),
    )  # fmt: skip
    da = torch.empty((R, K), dtype=a_dtype, device=x.device)
    db = torch.empty((N, R), dtype=b_dtype, device=x.device)
    launch(x, dy, s, ds, s, None, ds, da, db, None, 1.0, 1.0, 0)  # nothing is read of a B
    return da, db


def lora_grad_ab_ds(
    x: Tensor,
    mask: Tensor | None,
    dy: Tensor,
    s: Tensor,
    lora_B: Tensor,
    a_dtype: torch.dtype,
    scaling: float | Tensor,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Ready]:
    """``ds = factor * scaling * dy B``, and dA and dB as `lora_grad_ab` makes them; dx may be made beside it.

    Args:
        x (Tensor): ``[M, K]``, as `makes_ds` wants it.
        mask (Tensor | None): packed keep mask of `lora_shrink`, or ``None``.
        dy (Tensor): ``[M, N]``, as well.
        s (Tensor): ``[M, R]`` in the dtype of x, with scaling in it.
        lora_B (Tensor): ``[N, R]``, any strides, cast to the dtype of x; its own is dB's.
        a_dtype (torch.dtype): dtype of dA.
        scaling (float | Tensor): a float, or a 0-dim tensor on x's device.
        factor (float): one more factor, applied in fp32. Default: 1.0.

    Returns:
        tuple: ds ``[M, R]``, dA ``[R, K]``, dB ``[N, R]``, and what tells `lora_grad_x` that rows of ds are
        there; the caller keeps that until dx has been launched.
    """
    (M, K), (_, N), R = x.shape, dy.shape, s.shape[1]
    b, s = for_tma(lora_B, x.dtype), for_tma(s, x.dtype)
    ds = empty_rows(M, R, x.dtype, x.device)
    launch = _plan(
        x.shape, x.dtype, N, R, (a_dtype, lora_B.dtype), x.device, mask_word(mask, K), True,
        scaling.dtype if isinstance(scaling, Tensor) else None,
        (x.stride(), dy.stride(), s.stride(), ds.stride(), b.stride()),
    )  # fmt: skip
    da = torch.empty((R, K), dtype=a_dtype, device=x.device)
    db = torch.empty((N, R), dtype=lora_B.dtype, device=x.device)
    ready = new_marks(cdiv(M, DS_ROWS), x.device)._replace(read=(b, s))
    launch(
        x, dy, s, ds, b, mask, ds, da, db, ready.marks,
        scaling if isinstance(scaling, Tensor) else float(scaling), factor, ready.ticket,
    )  # fmt: skip
    return ds, da, db, ready
