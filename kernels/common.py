"""What every kernel needs: the dot product, tile order, and what the launchers ask of a tensor."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs  # since 3.4: with an older one dispatch sees an ImportError

from .config import cdiv

INTERPRETED = knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1) rather than on a GPU."""

IS_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` in fp32; the interpreter multiplies bf16 wrongly, so there operands are upcast."""
    if IS_INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def multiple(size, DIVISOR: tl.constexpr):
    """A size that DIVISOR divides, in a form that tells the compiler so: it then loads by vectors.

    Triton itself looks for 16 alone, so that masked rows of rank 8 would be loaded element by element.
    """
    return size // DIVISOR * DIVISOR


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of an output tile, ``GROUP_M`` rows at a time so that operands stay in L2."""
    per_group = GROUP_M * tiles_n
    first_m = (tile // per_group) * GROUP_M
    group = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (tile % per_group) % group, (tile % per_group) // group


@triton.jit
def let_next_kernel_start(PDL: tl.constexpr):
    """Programmatic dependent launch: the next kernel may come onto the GPU beside this one.

    `tl.extra.cuda.gdc_launch_dependents`, which Triton 3.4 cannot compile; likewise `gdc_wait` below.
    """
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """The other half of it: wait until the kernel before is complete, its writes included."""
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def late_wait_step(k_steps):
    """The step in a pipelined loop at which to wait for the kernel whose result step ``k_steps`` reads.

    Loads are issued up to seven steps ahead of their use.
    """
    return tl.maximum(k_steps - 8, 0)


@triton.jit
def add_frozen_product(
    acc, x_ptr, w_ptr, offs_m, offs_n, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc + x W^T`` for one output tile by pointers: x ``[M, K]`` and W ``[N, K]`` of any strides."""
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
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
    return acc


@triton.jit
def rank_of(ranks_ptr, slot, R):
    """The ranks of the adapters in slots: R for all where there is no table of ranks."""
    if ranks_ptr is None:
        return R
    else:
        return tl.minimum(tl.load(ranks_ptr + slot), R)


@triton.jit
def adapters_of_rows(ids_ptr, ranks_ptr, offs_m, M, R):
    """Slot and rank of each row; slot 0 and rank 0 where it has no adapter."""
    slots = tl.load(ids_ptr + offs_m, mask=offs_m < M, other=-1)  # [BLOCK_M]
    held = tl.maximum(slots, 0)
    ranks = tl.where(slots >= 0, rank_of(ranks_ptr, held, R), 0)
    return held.to(tl.int64), ranks


@triton.jit
def block_of_rows(order_ptr, sorted_ids_ptr, start, slot, M, BLOCK_M: tl.constexpr):
    """Which places from ``start`` on hold a row of the adapter in ``slot``, and the rows: a block of them."""
    position = start + tl.arange(0, BLOCK_M)
    here = position < M
    here &= tl.load(sorted_ids_ptr + position, mask=here, other=-1) == slot
    offs_m = tl.load(order_ptr + position, mask=here, other=0).to(tl.int64)  # [BLOCK_M]
    return here, offs_m


@triton.jit
def add_rank_product(
    acc, s_ptr, b_ptr, offs_m, rows, offs_n, N, R, end_r, stride_sm, stride_bn, stride_br,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``acc + s B^T`` for one output tile and the ``rows`` ``[BLOCK_M, 1]`` of it that take part.

    s ``[M, R]`` has dense rows. Ranks go to ``end_r``, R or past it.
    """
    for r in tl.range(0, end_r, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        s = tl.load(
            s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :],
            mask=rows & (offs_r[None, :] < R),
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        b = tl.load(
            b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None].to(tl.int64) * stride_br,
            mask=(offs_n[None, :] < N) & (offs_r[:, None] < R),
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        acc = dot(s.to(DTYPE), b.to(DTYPE), acc, PRECISION)  # [BLOCK_M, BLOCK_N]
    return acc


@triton.jit
def add_bias(acc, bias_ptr, offs_n, N):
    """``acc + bias`` over the rows of a tile."""
    return acc + tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def scale_columns(acc, g_ptr, offs_n, N):
    """``g * acc``, a factor for each column of a tile."""
    return acc * tl.load(g_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile."""
    return acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


@triton.jit
def _store_halves(desc, acc, start_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    desc.store([start_m, start_n], left.to(desc.dtype))  # [BLOCK_M, BLOCK_N / 2]
    desc.store([start_m, start_n + BLOCK_N // 2], right.to(desc.dtype))


@triton.jit
def store_tile(
    desc, acc, start_m, start_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Store a tile by TMA, whole or in 2 or 4 parts, one after the other in a part's shared memory.

    Not by recursion: Triton 3.4, looking for what a function calls, would not come to an end.
    """
    if SUBTILES == 1:
        desc.store([start_m, start_n], acc.to(desc.dtype))  # [BLOCK_M, BLOCK_N]
    elif SUBTILES == 2:
        _store_halves(desc, acc, start_m, start_n, BLOCK_M, BLOCK_N)
    else:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _store_halves(desc, left, start_m, start_n, BLOCK_M, BLOCK_N // 2)
        _store_halves(desc, right, start_m, start_n + BLOCK_N // 2, BLOCK_M, BLOCK_N // 2)


@triton.jit
def load_scaling(scaling, IS_TENSOR: tl.constexpr):
    """The scaling factor as fp32, from a launch scalar or from device memory."""
    if IS_TENSOR:
        return tl.load(scaling).to(tl.float32)
    else:
        return scaling


@functools.lru_cache(maxsize=64)
def device_properties(device: torch.device) -> tuple[int, int]:
    """``(compute capability major, number of SMs)`` of a device; an H100 for the interpreter."""
    if device.type != "cuda":
        return 9, 4
    props = torch.cuda.get_device_properties(device)
    return props.major, props.multi_processor_count


def tf32_allowed() -> bool:
    """Whether torch's own fp32 matmul may use TF32.

    By the setting that torch 2.9 introduced where there is one: the older then raises if the newer was set.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32 if precision is None else precision == "tf32")


def dot_precision(dtype: torch.dtype, depth: int = 2) -> str:
    """`input_precision` of products over ``depth``: for fp32 TF32 only if torch's own matmul may use it.

    A sum of a single term is exact in any case: Triton 3.6 builds a TF32 wgmma for it that reads past the
    end of shared memory.
    """
    if dtype == torch.float32 and (depth == 1 or not tf32_allowed()):
        return "ieee"
    return "tf32"


def strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor for a pointer kernel, the last one 0 for a single column.

    A contiguous ``[N, 1]`` has strides (1, 1), from which Triton 3.6 builds a TF32 wgmma that reads past
    the end of shared memory.
    """
    return (*stride[:-1], stride[-1] if shape[-1] > 1 else 0)


def rows_fit_tma(shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int) -> bool:
    """Whether a TMA descriptor can describe such rows: dense, a multiple of 16 bytes apart."""
    rows, columns = stride
    return columns == 1 and rows >= shape[1] and rows * itemsize % 16 == 0


def aligned(*tensors: Tensor) -> bool:
    """Whether tensors begin at a multiple of 16 bytes, as TMA asks too."""
    address = 0
    for t in tensors:
        address |= t.data_ptr()
    return address & 15 == 0


def fits_tma(t: Tensor) -> bool:
    """Whether a TMA descriptor can describe a tensor."""
    return aligned(t) and rows_fit_tma(t.shape, t.stride(), t.element_size())


def has_tma(major: int) -> bool:
    """Whether the TMA variants run: on sm_90. Newer GPUs have TMA too, but nobody has tried them there."""
    return major == 9


def has_pdl(device: torch.device) -> bool:
    """Whether a kernel is launched early, to wait for the kernel before it: saves a launch's microseconds.

    The persistent GEMMs are, and the kernels of few rows. Others that come early crowd onto the SMs that
    happen to be free, which costs more than it saves (8192 x 4096, p = 0.1: 42 us more for the forward
    pair). At least one program of a kernel that comes early has to wait, whatever there is to do: what is
    launched after it waits for it alone, and may write over what the kernel before still reads or writes.
    """
    return device.type != "cpu" and has_tma(device_properties(device)[0])


def empty_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty ``[rows, columns]`` whose row stride is a multiple of 16 bytes, as TMA wants it."""
    padded = padded_columns(columns, dtype.itemsize)
    made = torch.empty((rows, padded), dtype=dtype, device=device)
    return made if padded == columns else made[:, :columns]


def padded_columns(columns: int, itemsize: int) -> int:
    """The row stride that `empty_rows` gives: the next multiple of 16 bytes."""
    quantum = 16 // itemsize
    return cdiv(columns, quantum) * quantum


def for_tma(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A small 2-D tensor as TMA can read it: itself, or a copy in ``dtype`` with padded rows."""
    if t.dtype == dtype and fits_tma(t):
        return t
    if t.dtype != dtype and t.shape[1] * dtype.itemsize % 16 == 0:
        return t.to(dtype).contiguous()
    return empty_rows(t.shape[0], t.shape[1], dtype, t.device).copy_(t)
