"""``dA[l] = sum over the rows of adapter l of ds^T dropout(x)``; dB is the same sum over dy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import device_properties, dot, dot_precision, rank_of, strides
from .config import cdiv, rank_block
from .config_multi import multi_grad_config
from .dropout import load_words, mask_word, where_kept
from .launch import Launch, cached_plan
from .reduce import sum_splits


@triton.jit
def _lora_multi_grad_kernel(
    x_ptr, ds_ptr, mask_ptr, parts_ptr, order_ptr, sorted_ids_ptr, segments_ptr, ranks_ptr,
    M, K, R, size, stride_xm, stride_xk, stride_dsm,
    MASK_WORD: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``parts[split, l, r, k] = sum_m ds[m, r] keep[m, k] x[m, k]`` over a split of the rows of adapter l.

    Grid: ``(cdiv(K, BLOCK_C), segments, SPLITS)``; rows are gathered. As in `lora_grad_a`, the masked
    operand is the right one, which a wgmma reads from shared memory.
    """
    begin = tl.load(segments_ptr + tl.program_id(1))
    if begin < M:
        end = tl.load(segments_ptr + tl.program_id(1) + 1)
        slot = tl.load(sorted_ids_ptr + begin).to(tl.int64)
        rank = rank_of(ranks_ptr, slot, R)
        start_k = tl.program_id(0) * BLOCK_C
        offs_k = start_k.to(tl.int64) + tl.arange(0, BLOCK_C)
        offs_r = tl.arange(0, BLOCK_R)
        per_split = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK_M) * BLOCK_M
        first = begin + tl.program_id(2) * per_split
        last = min(first + per_split, end)
        acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        for m in range(first, last, BLOCK_M):
            position = m + tl.arange(0, BLOCK_M)
            here = position < last
            offs_m = tl.load(order_ptr + position, mask=here, other=M).to(tl.int64)
            x = tl.load(
                x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk,
                mask=here[:, None] & (offs_k[None, :] < K),
                other=0.0,
            )  # [BLOCK_M, BLOCK_C]
            ds = tl.load(
                ds_ptr + offs_m[None, :] * stride_dsm + offs_r[:, None],
                mask=here[None, :] & (offs_r[:, None] < rank),
                other=0.0,
            )  # [BLOCK_R, BLOCK_M]
            if MASK_WORD > 0:
                words = load_words(mask_ptr, offs_m, start_k, M, K, BLOCK_M, BLOCK_C, MASK_WORD)
                x = where_kept(x, words, BLOCK_M, BLOCK_C)
            acc = dot(ds, x, acc, PRECISION)  # [BLOCK_R, BLOCK_C]
        part = parts_ptr + tl.program_id(2).to(tl.int64) * size + slot * R * K
        tl.store(
            part + offs_r[:, None].to(tl.int64) * K + offs_k[None, :],
            acc.to(parts_ptr.dtype.element_ty),
            mask=(offs_r[:, None] < rank) & (offs_k[None, :] < K),
        )


@cached_plan
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    out_shape: tuple[int, ...],
    ds_stride: int,
    device: torch.device,
    num_segments: int,
    word: int,
    precision: str,
) -> tuple[int, Launch]:
    """The number of splits and the launch."""
    (M, K), (L, R, _), num_sms = shape, out_shape, device_properties(device)[1]
    c = multi_grad_config(M, K, R, L, dtype.itemsize, num_sms, precision)
    return c.row_splits, Launch(
        _lora_multi_grad_kernel, (cdiv(K, c.BLOCK_C), num_segments, c.row_splits), device,
        M, K, R, L * R * K, *strides(shape, stride), ds_stride,
        MASK_WORD=word, PRECISION=precision, SPLITS=c.row_splits,
        BLOCK_M=c.BLOCK_M, BLOCK_C=c.BLOCK_C, BLOCK_R=rank_block(R),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_multi_grad(
    x: Tensor,
    ds: Tensor,
    mask: Tensor | None,
    ranks: Tensor | None,
    routing: tuple[Tensor, Tensor, Tensor],
    num_adapters: int,
    dtype: torch.dtype,
) -> Tensor:
    """``dA[l] = ds_l^T (mask * x)_l`` over each adapter's rows; with ``x=dy, ds=s`` it is dB transposed.

    Args:
        x (Tensor): ``[M, K]``, any strides.
        ds (Tensor): ``[M, R]``, rows dense, in the dtype of x.
        mask (Tensor | None): packed keep mask of `lora_multi_shrink`, or ``None``.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        routing (tuple): ``order [M]``, ``sorted_ids [M]`` and the starts of segments.
        num_adapters (int): L.
        dtype (torch.dtype): dtype of the result.

    Returns:
        Tensor: ``[L, R, K]``, zeros for adapters that do not occur and past an adapter's rank. Sums go in a
        fixed order: bit-identical from run to run.
    """
    shape = (num_adapters, ds.shape[1], x.shape[1])
    order, sorted_ids, segments = routing
    splits, launch = _plan(
        x.shape, x.stride(), x.dtype, shape, ds.stride(0), x.device,
        segments.shape[0] - 1, mask_word(mask, x.shape[1]), dot_precision(x.dtype),
    )  # fmt: skip
    out = torch.zeros(shape, dtype=dtype, device=x.device)
    parts = (
        out if splits == 1 else torch.zeros((splits, *shape), dtype=torch.float32, device=x.device)
    )
    launch(x, ds, mask, parts, order, sorted_ids, segments, ranks)
    if splits > 1:
        sum_splits(parts, out)
    return out
