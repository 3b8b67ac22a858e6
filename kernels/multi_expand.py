"""``u = s B[id]^T`` with each row's own adapter: what `lora_multi_gemm` adds to few rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    add_rank_product,
    device_properties,
    dot_precision,
    has_pdl,
    let_next_kernel_start,
    rank_of,
    strides,
    wait_for_previous_kernel,
)
from .config import cdiv, multi_decode_overlaps, multi_expand_config, rank_step
from .launch import Launch, cached_plan


@triton.jit
def _lora_multi_expand_kernel(
    s_ptr, b_ptr, u_ptr, order_ptr, sorted_ids_ptr, starts_ptr, ranks_ptr,
    M, N, R, stride_sp, stride_sm, stride_bl, stride_bn, stride_br,
    DTYPE: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``u[m, n] = sum_r s[m, r] B[l, n, r]`` for blocks of rows that share adapter l.

    Grid: ``(blocks of rows, splits of columns)``, few enough to be on the GPU at once with the next kernel,
    which may begin beside this one; this one then waits for the kernel that makes s.
    """
    let_next_kernel_start(PDL)
    start = tl.load(starts_ptr + tl.program_id(0))
    if start < M:
        slot = tl.load(sorted_ids_ptr + start).to(tl.int64)
        position = start + tl.arange(0, BLOCK_M)
        here = position < M
        here &= tl.load(sorted_ids_ptr + position, mask=here, other=-1) == slot
        offs_m = tl.load(order_ptr + position, mask=here, other=0).to(tl.int64)
        rank = rank_of(ranks_ptr, slot, R)
        wait_for_previous_kernel(PDL)
        for n in range(tl.program_id(1) * BLOCK_N, N, tl.num_programs(1) * BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N).to(tl.int64)
            u = add_rank_product(
                tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
                s_ptr,
                b_ptr + slot * stride_bl,
                offs_m,
                here[:, None],
                offs_n,
                N,
                rank,
                rank,
                stride_sp,
                stride_sm,
                stride_bn,
                stride_br,
                DTYPE,
                PRECISION,
                PARTS,
                BLOCK_R,
            )  # [BLOCK_M, BLOCK_N]
            tl.store(
                u_ptr + offs_m[:, None] * N + offs_n[None, :],
                u,
                mask=here[:, None] & (offs_n[None, :] < N),
            )
    else:  # complete only when the kernel before is: the next one waits for this one alone
        wait_for_previous_kernel(PDL)


@cached_plan
def _plan(
    dtype: torch.dtype,
    s_shape: tuple[int, ...],
    s_stride: tuple[int, ...],
    b_shape: tuple[int, ...],
    b_stride: tuple[int, ...],
    device: torch.device,
    blocks: int,
    block_m: int,
    precision: str,
) -> Launch:
    (parts, M, R), N = s_shape, b_shape[1]
    c = multi_expand_config(block_m, R, dtype.itemsize)
    splits = max(1, min(cdiv(N, c.BLOCK_N), 4 * device_properties(device)[1] // blocks))
    pdl = has_pdl(device) and multi_decode_overlaps(M)
    names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return Launch(
        _lora_multi_expand_kernel, (blocks, splits), device,
        M, N, R, *s_stride[:2], *strides(b_shape, b_stride),
        DTYPE=names[dtype], PARTS=parts, PRECISION=precision, PDL=pdl, launch_pdl=pdl,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_R=min(rank_step(R, dtype.itemsize), 32),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def lora_multi_expand(
    s: Tensor,
    lora_B: Tensor,
    ranks: Tensor | None,
    routing: tuple[Tensor, Tensor, Tensor],
    block_m: int,
    dtype: torch.dtype,
) -> Tensor:
    """``u[m] = s[m] B[l]^T`` in fp32; l is each row's adapter.

    Args:
        s (Tensor): ``[parts, M, R]``, rows dense, as `lora_multi_shrink` gives it.
        lora_B (Tensor): ``[L, N, R]``, any strides, cast to ``dtype`` for the product.
        ranks (Tensor | None): int32 ``[L]``, or ``None`` for R everywhere.
        routing (tuple): ``order [M]``, ``sorted_ids [M]`` and the starts of blocks of ``block_m`` rows.
        block_m (int): rows of a block.
        dtype (torch.dtype): of the product's operands, that of x.

    Returns:
        Tensor: fp32 ``[M, N]``. Rows without an adapter are left unwritten: no consumer reads them.
    """
    order, sorted_ids, starts = routing
    launch = _plan(
        dtype, s.shape, s.stride(), lora_B.shape, lora_B.stride(), s.device,
        starts.shape[0], block_m, dot_precision(dtype),
    )  # fmt: skip
    u = torch.empty((s.shape[1], lora_B.shape[1]), dtype=torch.float32, device=s.device)
    launch(s, lora_B, u, order, sorted_ids, starts, ranks)
    return u
