"""What every kernel needs: the dot product, tile order, and what the launchers ask of a tensor."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs  # since 3.4: with an older one dispatch sees an ImportError

INTERPRETED = knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1) rather than on a GPU."""

_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` in fp32; the interpreter multiplies bf16 wrongly, so there operands are upcast."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of an output tile, ``GROUP_M`` rows at a time so that operands stay in L2."""
    per_group = GROUP_M * tiles_n
    first_m = (tile // per_group) * GROUP_M
    group = min(tiles_m - first_m, GROUP_M)
    return first_m + (tile % per_group) % group, (tile % per_group) // group


@triton.jit
def store_tile(
    desc, acc, start_m, start_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Store a tile by TMA in 1, 2 or 4 column slices: smaller ones need less shared memory."""
    if SUBTILES == 1:
        desc.store([start_m, start_n], acc.to(desc.dtype))  # [BLOCK_M, BLOCK_N]
    else:
        half: tl.constexpr = BLOCK_N // 2
        left, right = acc.reshape(BLOCK_M, 2, half).permute(0, 2, 1).split()
        store_tile(desc, left, start_m, start_n, BLOCK_M, half, SUBTILES // 2)
        store_tile(desc, right, start_m, start_n + half, BLOCK_M, half, SUBTILES // 2)


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


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of the products: as torch's own matmul does for fp32, TF32 only if allowed."""
    if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return "ieee"
    return "tf32"


def fits_tma(*tensors: Tensor) -> bool:
    """Whether TMA descriptors can describe these: rows dense, base and row stride 16-byte aligned."""
    return all(
        t.stride(1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) >= t.shape[1]
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def has_tma(major: int) -> bool:
    """Whether the TMA variants' tiles fit: sm_90 and sm_100 (sm_120 has TMA, but 99 KB of shared memory)."""
    return major in (9, 10)
