"""How a program says that something is made, to programs that run at the same time and wait for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import IS_INTERPRETED
from .launch import new_ticket


class Ready(NamedTuple):
    """Marks in memory, each of which says that a block of rows is there once it is ``ticket``."""

    marks: Tensor
    """int64; numbers that are used once need not be cleared before."""
    ticket: int
    read: tuple[Tensor, ...] = ()
    """What the kernel that sets the marks still reads: the next must not be given its memory to write to."""


def new_marks(count: int, device: torch.device) -> Ready:
    """Marks for a launch. In a CUDA graph they are cleared: each replay has the ticket of the one before."""
    marks = torch.empty(count, dtype=torch.int64, device=device)
    if marks.is_cuda and torch.cuda.is_current_stream_capturing():
        marks.zero_()
    return Ready(marks, new_ticket())


@triton.jit
def announce(ready_ptr, ticket):
    """Say that this program's writes are complete, to other programs and to their TMA loads."""
    if not IS_INTERPRETED:
        tl.inline_asm_elementwise(
            "fence.proxy.async; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    tl.atomic_xchg(ready_ptr, ticket, sem="release", scope="gpu")


@triton.jit
def wait_until_ready(ready_ptr, ticket):
    """Wait for `announce` of one mark: what it stands for may be read then, by TMA as well.

    The wait is one instruction to the compiler, for a loop in a loop would end the outer one's pipeline.
    A lane of each warp asks, and rests between: a thousand that insist would slow down those they wait
    for. In the interpreter programs run one after the other, and the first makes all that is waited for.
    """
    if not IS_INTERPRETED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred go;
            .reg .b32 lane;
            .reg .b64 found;
            mov.u32 lane, %laneid;
            setp.ne.u32 go, lane, 0;
            @go bra ready;
            ask:
            ld.acquire.gpu.global.b64 found, [$1];
            setp.eq.b64 go, found, $2;
            @go bra ready;
            nanosleep.u32 40;
            bra ask;
            ready:
            bar.warp.sync 0xffffffff;
            fence.proxy.async;
            mov.u32 $0, 0;
            }""",
            "=r,l,l", [ready_ptr.to(tl.int64), ticket], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def wait_until_all_ready(ready_ptr, marks, ticket):
    """Wait for `announce` of ``marks`` marks, as `wait_until_ready` does for one: each warp asks for all."""
    if not IS_INTERPRETED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred go;
            .reg .b32 mark;
            .reg .b64 at, found;
            mov.u32 mark, %laneid;
            next:
            setp.ge.u32 go, mark, $3;
            @go bra ready;
            mad.wide.u32 at, mark, 8, $1;
            ask:
            ld.acquire.gpu.global.b64 found, [at];
            setp.eq.b64 go, found, $2;
            @go bra asked;
            nanosleep.u32 200;
            bra ask;
            asked:
            add.u32 mark, mark, 32;
            bra next;
            ready:
            bar.warp.sync 0xffffffff;
            fence.proxy.async;
            mov.u32 $0, 0;
            }""",
            "=r,l,l,r", [ready_ptr.to(tl.int64), ticket, marks],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
