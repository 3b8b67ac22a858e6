"""``y = weight[ids] + scaling * A[:, ids]^T B^T``, one gather with the rank product in it, and dA."""

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
    load_scaling,
    padded_columns,
    strides,
)
from .config import cdiv, embedding_config, rank_block
from .launch import Launch, cached_plan


@triton.jit
def _lora_embedding_kernel(
    ids_ptr, w_ptr, a_ptr, b_ptr, s_ptr, y_ptr, scaling,
    M, V, N, R, columns, stride_wv, stride_wn, stride_ar, stride_av, stride_bn, stride_br, stride_sm,
    SCALING_IS_TENSOR: tl.constexpr, HAS_S: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``y[m, n] = w[ids[m], n] + sum_r s[m, r] B[n, r]`` with ``s[m, r] = scaling * A[r, ids[m]]``.

    Grid: ``(cdiv(M, BLOCK_M), splits)``. A program gathers its columns of A once and walks along
    ``columns`` columns of its rows; the first split writes s, which the gradient of B needs.
    """
    dtype = y_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    ids = tl.load(ids_ptr + offs_m, mask=offs_m < M, other=0).to(tl.int64)
    tl.device_assert((ids >= 0) & (ids < V), "index out of range in lora_embedding")
    mask_mr = (offs_m[:, None] < M) & (offs_r[None, :] < R)
    a = tl.load(
        a_ptr + ids[:, None] * stride_av + offs_r[None, :] * stride_ar, mask=mask_mr, other=0.0
    )  # [BLOCK_M, BLOCK_R]
    s = (a.to(tl.float32) * load_scaling(scaling, SCALING_IS_TENSOR)).to(dtype)
    if HAS_S:  # noqa: SIM102 - decided when compiling, so it stands alone
        if tl.program_id(1) == 0:
            tl.store(s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], s, mask=mask_mr)
    first = tl.program_id(1).to(tl.int64) * columns
    last = min(first + columns, N)
    for n in range(first, last, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_mn = (offs_m[:, None] < M) & (offs_n[None, :] < last)
        w = tl.load(
            w_ptr + ids[:, None] * stride_wv + offs_n[None, :] * stride_wn, mask=mask_mn, other=0.0
        )  # [BLOCK_M, BLOCK_N]
        b = tl.load(
            b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br,
            mask=(offs_n[None, :] < last) & (offs_r[:, None] < R),
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        acc = dot(s, b.to(dtype), w.to(tl.float32), PRECISION)  # [BLOCK_M, BLOCK_N]
        tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(dtype), mask=mask_mn)


@cached_plan
def _plan(
    M: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    R: int,
    strides_of: tuple[tuple[int, ...], ...],
    device: torch.device,
    scaling_is_tensor: bool,
    has_s: bool,
    precision: str,
) -> Launch:
    """The launch for M ids and a table of ``shape``; ``strides_of`` weight, lora_A and lora_B."""
    V, N = shape
    num_sms = device_properties(device)[1]
    c = embedding_config(M, N, R, dtype.itemsize, num_sms, precision)
    columns = cdiv(cdiv(N, c.row_splits), c.BLOCK_C) * c.BLOCK_C
    shapes = (shape, (R, V), (N, R))
    return Launch(
        _lora_embedding_kernel, (cdiv(M, c.BLOCK_M), cdiv(N, columns)), device,
        M, V, N, R, columns,
        *(s for pair in zip(shapes, strides_of, strict=True) for s in strides(*pair)),
        padded_columns(R, dtype.itemsize),
        SCALING_IS_TENSOR=scaling_is_tensor, HAS_S=has_s, PRECISION=precision,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_C, BLOCK_R=rank_block(R),
        num_warps=c.num_warps, num_stages=c.num_stages, debug=True, sanitize_overflow=False,
    )  # fmt: skip


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    need_s: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``y = weight[ids] + s B^T`` and ``s = scaling * A[:, ids]^T``.

    An id outside ``[0, V)`` stops the GPU with an assertion, as torch's own gather does.

    Args:
        ids (Tensor): ``[M]``, int32 or int64, contiguous.
        weight (Tensor): ``[V, N]``, any strides.
        lora_A (Tensor): ``[R, V]``, any strides, cast to the dtype of weight for the product.
        lora_B (Tensor): ``[N, R]``, likewise.
        scaling (float | Tensor): a float, or a 0-dim tensor on the device of weight.
        need_s (bool): whether s is wanted. Default: ``True``.

    Returns:
        tuple: y ``[M, N]``, contiguous, and s ``[M, R]``, its rows padded to 16 bytes, or ``None``;
        both in the dtype of weight.
    """
    M, shape, dtype, device, R = (
        ids.shape[0], weight.shape, weight.dtype, weight.device, lora_A.shape[0]
    )  # fmt: skip
    launch = _plan(
        M, shape, dtype, R, (weight.stride(), lora_A.stride(), lora_B.stride()), device,
        isinstance(scaling, Tensor), need_s, dot_precision(dtype, R),
    )  # fmt: skip
    y = weight.new_empty((M, shape[1]))
    s = empty_rows(M, R, dtype, device) if need_s else None
    launch(ids, weight, lora_A, lora_B, s, y, scaling)
    return y, s


@triton.jit
def _lora_embedding_grad_a_kernel(
    sorted_ptr, order_ptr, ds_ptr, da_ptr, M, R, padding_idx, stride_dsm, stride_dsr,
    stride_ar, stride_av, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``da[r, v] = sum of ds[m, r] over ids[m] == v``, ids sorted and ``order`` where each is from.

    Grid: a program for each sorted id, and the first of equal ones sums them all, in their order.
    """
    m = tl.program_id(0).to(tl.int64)
    token = tl.load(sorted_ptr + m).to(tl.int64)
    before = tl.load(sorted_ptr + m - 1, mask=m > 0, other=-1).to(tl.int64)
    if (token != before) & (token != padding_idx):
        offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
        acc = tl.zeros((BLOCK_R,), dtype=tl.float32)
        following = token
        while following == token:
            offs_m = m + tl.arange(0, BLOCK_M)
            found = tl.load(sorted_ptr + offs_m, mask=offs_m < M, other=-1).to(tl.int64)
            rows = tl.load(order_ptr + offs_m, mask=found == token, other=0)
            ds = tl.load(
                ds_ptr + rows[:, None] * stride_dsm + offs_r[None, :] * stride_dsr,
                mask=(found == token)[:, None] & (offs_r[None, :] < R),
                other=0.0,
            )  # [BLOCK_M, BLOCK_R]
            acc += tl.sum(ds.to(tl.float32), 0)
            m += BLOCK_M
            following = tl.load(sorted_ptr + m, mask=m < M, other=-1).to(tl.int64)
        tl.store(
            da_ptr + offs_r * stride_ar + token * stride_av,
            acc.to(da_ptr.dtype.element_ty),
            mask=offs_r < R,
        )


@cached_plan
def _grad_a_plan(
    shape: tuple[int, ...], stride: tuple[int, ...], padding_idx: int, V: int, device: torch.device
) -> Launch:
    M, R = shape
    block_r = rank_block(R)
    return Launch(
        _lora_embedding_grad_a_kernel, (M,), device, M, R, padding_idx, *strides(shape, stride), V, 1,
        BLOCK_M=max(8, min(64, 2048 // block_r)), BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip


def lora_embedding_grad_a(
    ids: Tensor, ds: Tensor, vocabulary: int, padding_idx: int, dtype: torch.dtype
) -> Tensor:
    """``dA[:, v] = sum of ds[m] over ids[m] == v``, summed in fp32 and rounded once, zero elsewhere.

    Args:
        ids (Tensor): ``[M]``, int32 or int64, contiguous.
        ds (Tensor): ``[M, R]``, any strides.
        vocabulary (int): V.
        padding_idx (int): an id whose column stays zero, -1 for none.
        dtype (torch.dtype): that of dA.

    Returns:
        Tensor: ``[R, V]``, contiguous. Sums go in a fixed order: bit-identical from run to run.
    """
    order = torch.sort(ids, stable=True)
    da = torch.zeros((ds.shape[1], vocabulary), dtype=dtype, device=ds.device)
    launch = _grad_a_plan(ds.shape, ds.stride(), padding_idx, vocabulary, ds.device)
    launch(order.values, order.indices, ds, da)
    return da
