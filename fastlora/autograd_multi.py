"""The fused LoRA linear of many adapters for autograd: the launches, what is saved, which gradients.

`LoRALinearMultiFunction` is the eager form; its routing keeps the tables that layers share.
`fastlora.ops_multi` registers the same functions with `torch.library`; there the tables are tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.adapters import Routing
from fastlora.autograd import (
    BackwardFunction,
    KernelFunction,
    as_made,
    waited_for,
    weight_gradient,
)
from fastlora.kernels.config import LaunchConfig, dropout_threshold, keep_scale
from fastlora.kernels.config_multi import (
    FEW_BLOCK_M,
    MULTI_BLOCK_M,
    makes_pairs,
    multi_reads_rows,
)
from fastlora.kernels.multi_add import frozen_linear, lora_multi_add
from fastlora.kernels.multi_add_blocks import lora_multi_add_blocks
from fastlora.kernels.multi_decode import lora_multi_decode
from fastlora.kernels.multi_gemm import lora_multi_gemm, multi_gemm_tiles
from fastlora.kernels.multi_grad import lora_multi_grad
from fastlora.kernels.multi_shrink import lora_multi_shrink
from fastlora.kernels.multi_shrink_blocks import lora_multi_shrink_blocks
from fastlora.kernels.multi_shrink_rows import lora_multi_shrink_rows
from fastlora.reference import rows_of, shaped

FEW = ("decode", "add")
"""The kinds of `multi_gemm_tiles` where each row gathers its own adapter."""


def _rows(routing: Routing) -> tuple[Tensor, Tensor]:
    """What the kernels that take rows adapter by adapter go by."""
    return routing.order, routing.sorted_ids


def _blocks(routing: Routing, block_m: int = MULTI_BLOCK_M) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels that take blocks of rows of one adapter go by."""
    return (*_rows(routing), routing.block_starts(block_m))


def _tiles(routing: Routing, kind: str, block_m: int) -> tuple[Tensor, ...]:
    """What the kernels that take tiles of rows go by, one of which may take them sorted."""
    tiles = routing.ids, routing.tile_slots(block_m)
    if kind != "tma":
        return tiles
    return (*tiles, routing.order, routing.sorted_tile_slots(block_m))


def _slots_of_pairs(
    x: Tensor, lora_A: Tensor, routing: Routing, begun: tuple[str, LaunchConfig | Tensor] | None
) -> Tensor | None:
    """The slots of tiles, where s is wanted for those of two adapters too."""
    if begun is None or begun[0] != "tma" or isinstance(begun[1], Tensor):
        return None
    wanted = x.dtype == lora_A.dtype and makes_pairs(lora_A.shape[1], x.element_size())
    return routing.tile_slots(begun[1].BLOCK_M) if wanted else None


def _begin(
    x: Tensor,
    weight: Tensor,
    R: int,
    routing: Routing,
    bias: Tensor | None = None,
    masked: bool = False,
) -> tuple[str, LaunchConfig | Tensor]:
    """Which kernel makes the product, and its tiles; or, where cuBLAS makes it, the frozen part of it.

    Before s: the kernel that reads s comes onto the GPU early and waits for that of s alone, so that its
    own tables, and y if it adds to that, have to be there by then.
    """
    kind, c = multi_gemm_tiles(x, weight, R, masked)
    if c is None:
        if not multi_reads_rows(len(x)):
            routing.block_starts(FEW_BLOCK_M)
        return kind, frozen_linear(x, weight, bias)
    if kind not in FEW:
        _tiles(routing, kind, c.BLOCK_M)
    return kind, c


def _finish(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    ranks: Tensor | None,
    routing: Routing,
    begun: tuple[str, LaunchConfig | Tensor],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    pair: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias + mask * (s B[l]^T)``; few rows have no mask.

    s is ``[parts, M, R]``, of the kernel before; only few rows have more than one part.
    """
    kind, how = begun
    if isinstance(how, Tensor):
        if multi_reads_rows(len(how)):
            return lora_multi_add(how, s, lora_B, ranks, _rows(routing), early=True)
        return lora_multi_add_blocks(
            how, s, lora_B, ranks, _blocks(routing, FEW_BLOCK_M), early=True
        )
    if kind == "decode":
        return lora_multi_decode(x, weight, s, lora_B, ranks, routing.ids, how, bias)
    tiles = _tiles(routing, kind, how.BLOCK_M)
    return lora_multi_gemm(x, weight, s[0], lora_B, ranks, tiles, (kind, how), bias, mask, pair)


def fused_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    ranks: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    need_s: bool,
    routing: Routing,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Take x ``[M, K]``, weight ``[N, K]``, bias ``[N]``, lora_A ``[L, R, K]``, lora_B ``[L, N, R]``.

    Give y ``[M, N]``, s ``[M, R]``, ``None`` unless ``need_s``, and the mask ``[M, ceil(K / 8)]``, ``None``
    without dropout. The gradient of lora_B is what needs s.
    """
    begun = _begin(x, weight, lora_A.shape[1], routing, bias)
    few, mask, pair = begun[0] in FEW, None, None
    if need_s or not few or dropout_threshold(dropout_p) > 0:  # backward wants s as one tensor
        s, mask, pair = lora_multi_shrink(
            x, lora_A, scaling, ranks, _blocks(routing), MULTI_BLOCK_M, dropout_p, seed,
            early=few, tile_slots=_slots_of_pairs(x, lora_A, routing, begun),
        )  # fmt: skip
        s = s[None]
    elif multi_reads_rows(len(x)):
        s = lora_multi_shrink_rows(x, lora_A, scaling, ranks, _rows(routing), early=True)
    else:
        blocks = _blocks(routing, FEW_BLOCK_M)
        s = lora_multi_shrink_blocks(x, lora_A, scaling, ranks, blocks, early=True)
    y = _finish(x, weight, s, lora_B, ranks, routing, begun, bias, pair=pair)
    return y, s[0] if need_s else None, mask


def fused_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    mask: Tensor | None,
    scaling: Tensor,
    ranks: Tensor | None,
    dropout_p: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    routing: Routing,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Take dy ``[M, N]`` and what `keep` saved; give dx, dA and dB where they are needed.

    x may be ``None`` where dA is not needed, and s where dB is not.
    """
    if not (need_x or need_a or need_b):
        return None, None, None
    if dy.stride(1) != 1:
        dy = dy.contiguous()  # e.g. the expanded gradient of a sum: TMA wants dense rows
    dx = da = db = ds = None
    turned = weight.t()
    begun = None
    if need_x:
        begun = _begin(dy, turned, lora_A.shape[1], routing, masked=mask is not None)
    if need_x or need_a:
        ds, _, pair = lora_multi_shrink(
            dy, lora_B.transpose(1, 2), scaling, ranks, _blocks(routing), MULTI_BLOCK_M,
            factor=keep_scale(dropout_p), early=begun is not None and begun[0] in FEW,
            tile_slots=_slots_of_pairs(dy, lora_A, routing, begun) if mask is None else None,
        )  # fmt: skip
        if begun is not None:
            up = lora_A.transpose(1, 2)
            dx = _finish(dy, turned, ds[None], up, ranks, routing, begun, mask=mask, pair=pair)
    if need_a and ds is not None:
        da = lora_multi_grad(
            x,
            ds,
            mask,
            ranks,
            (*_rows(routing), routing.segment_starts()),
            len(lora_A),
            lora_A.dtype,
        )
    if need_b:
        db = lora_multi_grad(
            dy,
            s,
            None,
            ranks,
            (*_rows(routing), routing.segment_starts()),
            len(lora_B),
            lora_B.dtype,
        ).transpose(1, 2)
    return dx, da, db


def keep(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...], tables: tuple[Tensor, ...] = ()
) -> None:
    """Keep what the needed gradients need: x, s ``[M, R]``, the parameters, the mask's bits, the tables.

    ``inputs`` are those of `fused_forward` but for its routing.
    """
    x, weight, bias, lora_A, lora_B, scaling, ranks, _, dropout_p, need_s = inputs
    _, s, mask = output
    need_x, need_w, _, need_a, need_b = ctx.needs_input_grad[:5]
    keep_mask = (need_x or need_a) and dropout_threshold(dropout_p) > 0
    ctx.save_for_backward(
        x if need_w or need_a else None, weight, lora_A, lora_B,
        s if need_b and need_s else None, mask if keep_mask else None, scaling, ranks, *tables,
    )  # fmt: skip
    ctx.dropout_p = dropout_p
    ctx.bias_dtype = None if bias is None else bias.dtype


def gradients(
    ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    """Take dy ``[M, N]``; give dx, dW, dbias, dA and dB where they are needed, each in its own dtype.

    ``backward`` takes the arguments of `fused_backward`, and the saved tables in place of the routing.
    """
    x, weight, lora_A, lora_B, s, mask, scaling, ranks, *tables = ctx.saved_tensors
    s, mask, scaling, ranks, *tables = as_made(s, mask, scaling, ranks, *tables)
    need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    if need_b and s is None:
        raise ValueError("need_s must be True where lora_B requires a gradient, got False")
    dx, da, db = backward(
        dy, x, weight, lora_A, lora_B, s, mask, scaling, ranks, ctx.dropout_p,
        need_x, need_a, need_b, tables,
    )  # fmt: skip
    dw = weight_gradient(dy, x) if need_w else None
    dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need_bias else None
    return dx, dw, dbias, da, db


class LoRALinearMultiForward(KernelFunction):
    """y ``(..., N)`` for an x ``(..., K)``, where no gradient is needed: a call that can be replayed."""

    NUMBER = -1

    @staticmethod
    def forward(x: Tensor, *args: Any) -> tuple[Tensor]:
        """`fused_forward` of the rows of x: its arguments up to dropout_p, and what `Routing.made` gives."""
        num_adapters, kinds, *tables = args[8:]
        routing = Routing.with_tables(num_adapters, kinds, tables)
        y, _, _ = fused_forward(rows_of(x), *args[:8], False, routing)  # type: ignore[call-arg]
        return (shaped(y, x.shape[:-1]),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        """Keep nothing."""


class _LoRALinearMultiBackward(BackwardFunction):
    """Where a graph of the backward of many adapters is recorded."""

    forward = staticmethod(fused_backward)


class LoRALinearMultiFunction(torch.autograd.Function):
    """``y[m] = x[m] W0^T + bias + scaling[l] * dropout(x[m]) A[l]^T B[l]^T``, ``l = ids[m]``, fused."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Take the arguments of `fused_forward`; give y ``[M, N]``."""
        output = fused_forward(*inputs)
        keep(ctx, inputs[:-1], output)
        # The tables of this step: an in-place update for the next one must not reach this backward.
        ctx.routing, ctx.routing_version = inputs[-1], inputs[-1].version
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Take dy ``[M, N]``; give the gradients that are needed, each in its own dtype."""
        routing: Routing = ctx.routing
        if routing.version != ctx.routing_version:
            raise RuntimeError(
                "the routing of this forward was changed by update_ before its backward"
            )

        def backward(*args: Any) -> tuple[Tensor | None, ...]:
            made: tuple[Tensor | None, ...] = _LoRALinearMultiBackward.run(*args[:-1], routing)
            return made

        return (*gradients(ctx, waited_for(dy), backward), *[None] * 6)
