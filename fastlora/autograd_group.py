"""The fused linears of a group that reads the same x: the launches, what is saved, and the gradients.

Tensors of the projections come flat, as `torch.autograd.Function` wants them: all of one kind, then all of
the next. `fastlora.ops_group` registers the same functions with `torch.library` for torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.autograd import BackwardFunction, KernelFunction, as_made, waited_for, weight_gradient
from fastlora.kernels.common import empty_rows
from fastlora.kernels.config import dropout_threshold, keep_scale
from fastlora.kernels.lora_grad_a import lora_grad_a
from fastlora.kernels.lora_grad_ab import lora_grad_ab
from fastlora.kernels.lora_product import lora_dx, lora_y
from fastlora.kernels.lora_shrink import lora_shrink

FIRST_TENSOR = 5
"""Where in the arguments of `fused_forward` the tensors of the projections begin."""


def _of_ranks(
    scaling: Sequence[float] | Tensor, ranks: list[int], device: torch.device
) -> float | Tensor:
    """What `lora_shrink` takes for the stacked A: one float, or a factor for each rank.

    The factors are made at every call: a CUDA graph would go on reading ones that a cache had dropped.
    """
    if not isinstance(scaling, Tensor):
        if all(factor == scaling[0] for factor in scaling):
            return scaling[0]
        parts = [
            torch.full((r,), factor, dtype=torch.float32, device=device)
            for factor, r in zip(scaling, ranks, strict=True)
        ]
    else:
        parts = [factor.expand(r) for factor, r in zip(scaling.unbind(), ranks, strict=True)]
    return torch.cat(parts)


def fused_forward(
    x: Tensor,
    seed: Tensor | None,
    scaling: Sequence[float] | Tensor,
    dropout_p: float,
    has_bias: Sequence[bool],
    *tensors: Tensor,
) -> tuple[Tensor | None, ...]:
    """Take x ``[M, K]``, n factors (an fp32 ``[n]`` if a tensor), and of n projections the tensors.

    These are n weights ``[N_i, K]``, n lora_A ``[R_i, K]``, n lora_B ``[N_i, R_i]``, and the biases of the
    projections that have one. Give the n outputs ``[M, N_i]``, s ``[M, sum of R_i]``, and the mask.
    """
    n = len(has_bias)
    lora_As, lora_Bs, biases = tensors[n : 2 * n], tensors[2 * n : 3 * n], iter(tensors[3 * n :])
    ranks = [b.shape[1] for b in lora_Bs]
    factor = _of_ranks(scaling, ranks, x.device)
    first = tensors[0].shape[0]
    s, mask = lora_shrink(x, torch.cat(lora_As), factor, dropout_p, seed, product_columns=first)
    parts = torch.split(s, ranks, 1)
    ys = [
        lora_y(x, tensors[i], parts[i], lora_Bs[i], next(biases) if has_bias[i] else None)
        for i in range(n)
    ]
    return (*ys, s, mask)


def fused_backward(
    x: Tensor,
    mask: Tensor | None,
    s: Tensor,
    scaling: Sequence[float] | Tensor,
    dropout_p: float,
    starts: Sequence[int],
    need_x: bool,
    need_as: Sequence[bool],
    need_bs: Sequence[bool],
    *tensors: Tensor,
) -> tuple[Tensor | None, ...]:
    """Take n dy ``[M, N_i]``, weights, lora_A and lora_B, flat, and what `setup_context` saved.

    ``starts`` are the columns of s where those projections begin. Give dx, dA of all that `stacked` names,
    one below the other, and each dB; ``None`` where not needed. x may be ``None`` where no dA is needed,
    and s where no dB is.

    dx is the widest projection's product with the ranks of all, to which the other products are added one
    by one, each time rounded: n roundings, or n + 1 by cuBLAS alone, where n separate linears have 2 n - 1.
    """
    n = len(starts)
    weights, lora_As, lora_Bs = (tensors[k * n : (k + 1) * n] for k in (1, 2, 3))
    # The expanded gradient of a sum, for example, is not dense, as TMA wants rows to be.
    dys = [dy if dy.stride(1) == 1 else dy.contiguous() for dy in tensors[:n]]
    ranks = [b.shape[1] for b in lora_Bs]
    dx = da = None
    dbs: list[Tensor | None] = [None] * n
    members = stacked(need_x, need_as)
    widest = max(range(n), key=lambda i: dys[i].shape[1])
    if members:
        ds = empty_rows(
            dys[0].shape[0], sum(ranks[i] for i in members), dys[0].dtype, dys[0].device
        )
        for i, part in zip(members, torch.split(ds, [ranks[i] for i in members], 1), strict=True):
            lora_shrink(dys[i], lora_Bs[i].t(), scaling[i], factor=keep_scale(dropout_p), out=part)
        a_dtype = functools.reduce(torch.promote_types, (lora_As[i].dtype for i in members))
    beside = False
    if need_x:
        # Cast and stacked before the launch that dx runs beside, for it does not wait for what comes after.
        lora_A = torch.cat(lora_As).to(dys[0].dtype)
        beside = any(need_as) and need_bs[widest] and s is not None and s.shape[1] == ds.shape[1]
        if beside:  # one rank for both products: dB is a few columns of dy^T times all of s
            b_dtype = lora_Bs[widest].dtype
            da, wide = lora_grad_ab(x, ds, mask, dys[widest], s, a_dtype, b_dtype)
        dx = lora_dx(dys[widest], weights[widest], ds, lora_A, mask, beside=beside)
        for i in range(n):
            if i != widest:
                dx.addmm_(dys[i], weights[i])
    if any(need_as) and not beside:
        da = lora_grad_a(x, ds, mask, a_dtype)
    for i in range(n):
        columns = slice(starts[i], starts[i] + ranks[i])
        if beside and i == widest:
            dbs[i] = wide[:, columns].contiguous()
        elif need_bs[i]:
            dbs[i] = lora_grad_a(dys[i], s[:, columns], None, lora_Bs[i].dtype).t()
    return (dx, da, *dbs)


def stacked(need_x: bool, need_as: Sequence[bool]) -> list[int]:
    """Whose ds are made: every projection's for dx, otherwise those of the lora_A that need a gradient."""
    return [i for i, need_a in enumerate(need_as) if need_x or need_a]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor | None]) -> None:
    """Keep what the needed gradients need: x, s, the mask's bits, the scaling, and the parameters."""
    x, _, scaling, dropout_p, has_bias, *tensors = inputs
    *_, s, mask = output
    n = len(has_bias)
    needs = ctx.needs_input_grad  # flat here, in the op too
    need_w, need_a, need_b = (
        any(needs[FIRST_TENSOR + k * n : FIRST_TENSOR + (k + 1) * n]) for k in range(3)
    )
    keep_mask = (needs[0] or need_a) and dropout_threshold(dropout_p) > 0
    ctx.mark_non_differentiable(*(t for t in (s, mask) if t is not None))
    ctx.set_materialize_grads(False)  # no zeros for s, the mask, and outputs that nothing uses
    ctx.save_for_backward(
        x if need_w or need_a else None,
        mask if keep_mask else None,
        s if need_b else None,
        scaling if isinstance(scaling, Tensor) else None,
        *tensors[: 3 * n],
    )
    ctx.scaling = None if isinstance(scaling, Tensor) else scaling
    ctx.dropout_p, ctx.has_bias = dropout_p, has_bias
    ctx.bias_dtypes = [bias.dtype for bias in tensors[3 * n :]]


def gradients(
    ctx: Any,
    needs: Sequence[bool],
    dys: Sequence[Tensor | None],
    backward: Callable[..., Sequence[Tensor | None]],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Take ``needs`` as `fused_forward` has arguments, and the gradients of the outputs that were used.

    Give dx and the gradients of the projections' tensors, each in its own dtype, where needed.
    ``backward`` is `fused_backward`, or a form of it that autograd or torch.compile sees as one op.
    """
    x, mask, s, scaling, *saved = ctx.saved_tensors
    s, mask = as_made(s, mask)
    scaling = ctx.scaling if scaling is None else scaling
    n = len(ctx.has_bias)
    weights, lora_As, lora_Bs = saved[:n], saved[n : 2 * n], saved[2 * n :]
    need_x, needed = needs[0], needs[FIRST_TENSOR:]
    found: list[Tensor | None] = [None] * len(needed)
    used = [i for i in range(n) if dys[i] is not None]
    need_as, need_bs = [needed[n + i] for i in used], [needed[2 * n + i] for i in used]
    dx = None
    if used and (need_x or any(need_as) or any(need_bs)):
        ranks = [b.shape[1] for b in lora_Bs]
        starts = [sum(ranks[:i]) for i in used]
        if len(used) < n:
            picked = [scaling[i] for i in used]
            scaling = torch.stack(picked) if isinstance(scaling, Tensor) else picked
        dx, da, *dbs = backward(
            x, mask, s, scaling, ctx.dropout_p, starts, need_x, need_as, need_bs,
            *(each[i] for each in (dys, weights, lora_As, lora_Bs) for i in used),
        )  # fmt: skip
        members = [used[k] for k in stacked(need_x, need_as)]
        if da is not None:
            for i, part in zip(members, torch.split(da, [ranks[i] for i in members]), strict=True):
                found[n + i] = part.to(lora_As[i].dtype) if needed[n + i] else None
        for i, db in zip(used, dbs, strict=True):
            found[2 * n + i] = db
    for i in used:
        if needed[i]:
            found[i] = weight_gradient(dys[i], x)  # type: ignore[arg-type]
    biased = [i for i in range(n) if ctx.has_bias[i]]
    for k, i in enumerate(biased):
        dy = dys[i]
        if dy is not None and needed[3 * n + k]:
            found[3 * n + k] = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtypes[k])
    return dx, found


class _GroupBackward(BackwardFunction):
    """Where a graph of the backward of a group is recorded."""

    forward = staticmethod(fused_backward)


class LoRALinearGroupFunction(KernelFunction):
    """The linears of a group on a 2-D x, with s and the mask beside their outputs."""

    NUMBER = -1

    forward = staticmethod(fused_forward)
    setup_context = staticmethod(setup_context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Take the gradients of the outputs; give those that are needed, each in its own dtype."""
        dys = [None if dy is None else waited_for(dy) for dy in grads[: len(ctx.has_bias)]]
        dx, found = gradients(ctx, ctx.needs_input_grad, dys, _GroupBackward.run)
        return (dx, *[None] * (FIRST_TENSOR - 1), *found)
