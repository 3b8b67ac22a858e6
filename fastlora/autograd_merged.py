"""The fused linear of which some slices of outputs are adapted, for autograd.

`LoRAMergedLinearFunction` is the eager form; `fastlora.ops_merged` registers the same functions with
`torch.library`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.autograd import (
    BackwardFunction,
    KernelFunction,
    as_made,
    factor_on,
    waited_for,
    weight_gradient,
)
from fastlora.kernels.config import dropout_threshold
from fastlora.kernels.lora_forward_sliced import Slices, lora_forward_sliced
from fastlora.kernels.lora_grad_a import lora_grad_a
from fastlora.kernels.lora_grad_b import lora_grad_b
from fastlora.kernels.lora_product import lora_dx
from fastlora.kernels.lora_shrink import lora_shrink


def fused_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling_tensor: Tensor | None,
    scaling: float,
    dropout_p: float,
    slices: Slices,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take x ``[M, K]``, weight ``[N, K]``, lora_A ``[G R, K]``, lora_B ``[rows, R]``.

    Give y ``[M, N]``, s ``[G, M, R]``, and the mask ``[M, ceil(K / 8)]``, ``None`` without dropout.
    """
    factor = factor_on(scaling, scaling_tensor, x.device)
    stacked, mask = lora_shrink(x, lora_A, factor, dropout_p, seed)  # [M, G R]
    groups, R = len(slices), lora_B.shape[1]
    s = stacked.view(-1, groups, R).transpose(0, 1).contiguous()
    return lora_forward_sliced(x, weight, s, lora_B, slices, bias), s, mask


def fused_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor | None,
    mask: Tensor | None,
    scaling_tensor: Tensor | None,
    scaling: float,
    dropout_p: float,
    slices: Slices,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Take dy ``[M, N]`` and what `setup_context` saved; give dx, dA and dB where they are needed.

    ds and dB are made slice by slice, then dx and dA of all of them at once. x may be ``None`` where dA is
    not needed, and s where dB is not.
    """
    if not (need_x or need_a or need_b):
        return None, None, None
    if dy.stride(1) != 1:
        dy = dy.contiguous()  # e.g. the expanded gradient of a sum: TMA wants dense rows
    factor = factor_on(scaling, scaling_tensor, dy.device)
    need_ds = need_x or need_a
    widths = [last - first for first, last in slices]
    parts: list[tuple[Any, Any]] = [
        lora_grad_b(dy[:, first:last], s_g, b_g, factor, dropout_p, need_ds=need_ds, need_db=need_b)
        for (first, last), s_g, b_g in zip(
            slices,
            [None] * len(widths) if s is None else s,
            torch.split(lora_B, widths),
            strict=True,
        )
    ]
    ds = torch.cat([part[0] for part in parts], 1) if need_ds else None
    db = torch.cat([part[1] for part in parts]) if need_b else None
    dx = lora_dx(dy, weight, ds, lora_A, mask) if need_x and ds is not None else None
    da = lora_grad_a(x, ds, mask, lora_A.dtype) if need_a and ds is not None else None
    return dx, da, db


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Keep what the needed gradients need: x, s ``[G, M, R]``, the parameters and the mask's bits."""
    x, weight, bias, lora_A, lora_B, _, scaling_tensor, scaling, dropout_p, slices = inputs
    _, s, mask = output
    need_x, need_w, _, need_a, need_b = ctx.needs_input_grad[:5]
    keep_mask = (need_x or need_a) and dropout_threshold(dropout_p) > 0
    ctx.mark_non_differentiable(s, *(() if mask is None else (mask,)))
    ctx.set_materialize_grads(False)  # no zeros for s and the mask
    ctx.save_for_backward(
        x if need_w or need_a else None, weight, lora_A, lora_B,
        s if need_b else None, mask if keep_mask else None, scaling_tensor,
    )  # fmt: skip
    ctx.scaling, ctx.dropout_p, ctx.slices = scaling, dropout_p, slices
    ctx.bias_dtype = None if bias is None else bias.dtype


def gradients(
    ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    """Take dy ``[M, N]``; give dx, dW, dbias, dA and dB where they are needed, each in its own dtype.

    ``backward`` is `fused_backward`, or a form of it that autograd or torch.compile sees as one op.
    """
    x, weight, lora_A, lora_B, s, mask, scaling_tensor = ctx.saved_tensors
    _, s, mask = as_made(None, s, mask)
    need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    dx, da, db = backward(
        dy, x, weight, lora_A, lora_B, s, mask, scaling_tensor, ctx.scaling, ctx.dropout_p, ctx.slices,
        need_x, need_a, need_b,
    )  # fmt: skip
    dw = weight_gradient(dy, x) if need_w else None
    dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need_bias else None
    return dx, dw, dbias, da, db


class _LoRAMergedLinearBackward(BackwardFunction):
    """Where a graph of the backward of the merged linear is recorded."""

    forward = staticmethod(fused_backward)


class LoRAMergedLinearFunction(KernelFunction):
    """``y = x W0^T + bias``, plus ``scaling * dropout(x) A_g^T B_g^T`` on slice g, s and mask beside it."""

    NUMBER = 7

    forward = staticmethod(fused_forward)
    setup_context = staticmethod(setup_context)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Take dy ``[M, N]``; give the gradients that are needed, each in its own dtype."""
        if dy is None:
            return (None,) * 10
        dy = waited_for(dy)
        return (*gradients(ctx, dy, _LoRAMergedLinearBackward.run), *[None] * 5)
