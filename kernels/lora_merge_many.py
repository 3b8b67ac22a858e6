"""``out = weight + scaling * B A`` for many layers of one shape, in one launch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cached_plan
from .lora_merge import merge_launch, merge_tile

_ROW = struct.Struct("<4qf12x")  # what a layer has in the table: a multiple of 16 bytes
_WORDS = _ROW.size // 8
_TYPES: dict[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32
}  # fmt: skip


@triton.jit
def _pointer(row, WHICH: tl.constexpr, DTYPE: tl.constexpr):
    """The address in a row of the table as a pointer, its 16 bytes of alignment said for vector loads."""
    address = tl.load(row + WHICH)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _lora_merge_many_kernel(
    table_ptr, N, K, R,
    stride_wn, stride_wk, stride_on, stride_ok, stride_ar, stride_ak, stride_bn, stride_br,
    WORDS: tl.constexpr,
    W_DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr, A_DTYPE: tl.constexpr, B_DTYPE: tl.constexpr,
    SAME_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    R_STEPS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``out_l = w_l + scaling_l * B_l A_l``. Grid: the tiles of a layer, layers.

    A row of the table: addresses of w, out, A and B, then the bits of scaling in fp32, then padding.
    """
    row = table_ptr + tl.program_id(1) * WORDS
    scaling = tl.load(row + 4).to(tl.int32).to(tl.float32, bitcast=True)
    merge_tile(
        _pointer(row, 0, W_DTYPE), _pointer(row, 1, OUT_DTYPE),
        _pointer(row, 2, A_DTYPE), _pointer(row, 3, B_DTYPE), scaling, N, K, R,
        stride_wn, stride_wk, stride_on, stride_ok, stride_ar, stride_ak, stride_bn, stride_br,
        SAME_DTYPE, BLOCK_N, BLOCK_K, R_STEPS, BLOCK_R,
    )  # fmt: skip


@cached_plan
def _plan(
    shape: tuple[int, ...],
    strides_of: tuple[tuple[int, ...], ...],
    R: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
    device: torch.device,
    layers: int,
) -> Launch:
    """The launch for ``layers`` weights of ``shape``; strides and dtypes of w, out, A and B."""
    w, out, a, b = dtypes
    return merge_launch(
        _lora_merge_many_kernel, shape, strides_of, R, (a, b), device, layers, fixed=True,
        WORDS=_WORDS, W_DTYPE=_TYPES[w], OUT_DTYPE=_TYPES[out], A_DTYPE=_TYPES[a], B_DTYPE=_TYPES[b],
    )  # fmt: skip


def lora_merge_many(
    groups: Sequence[Sequence[tuple[Tensor, Tensor, Tensor, Tensor, float]]],
) -> None:
    """``out = weight + scaling * lora_B lora_A`` of many layers, bit for bit as `lora_merge` gives it.

    A table of addresses goes to the device first, then a launch for each group. While a CUDA graph is
    captured that cannot be done: its replays would read a host buffer which is long another's.

    Args:
        groups (Sequence[Sequence[tuple]]): ``(weight, out, lora_A, lora_B, scaling)`` of each layer, as
            `lora_merge` takes them, all on one device and each tensor at a multiple of 16 bytes. Those of a
            group, at most 65535, have the same shapes, strides and dtypes. No ``out`` may overlap a tensor
            of another layer.
    """
    packed = bytearray(_ROW.size * sum(map(len, groups)))
    at = 0
    for group in groups:
        for weight, out, a, b, scaling in group:
            addresses = weight.data_ptr(), out.data_ptr(), a.data_ptr(), b.data_ptr()
            _ROW.pack_into(packed, at, *addresses, scaling)
            at += _ROW.size
    device = groups[0][0][0].device
    table = torch.frombuffer(packed, dtype=torch.int64)
    if device.type == "cuda":  # pinned: from pageable memory the driver may wait for the stream
        table = table.pin_memory()
    rows = table.to(device, non_blocking=True).split([_WORDS * len(group) for group in groups])
    for group, rows_of_group in zip(groups, rows, strict=True):
        weight, out, a, b, _ = group[0]
        launch = _plan(
            weight.shape,
            (weight.stride(), out.stride(), a.stride(), b.stride()),
            a.shape[0],
            (weight.dtype, out.dtype, a.dtype, b.dtype),
            device,
            len(group),
        )
        launch(rows_of_group)
