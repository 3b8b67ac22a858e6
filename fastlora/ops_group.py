"""The fused linears of a group as `torch.library` ops, for compiled code alone: see `fastlora.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora.autograd import no_double_backward
from fastlora.autograd_group import (
    FIRST_TENSOR,
    fused_backward,
    fused_forward,
    gradients,
    setup_context,
    stacked,
)
from fastlora.kernels.common import empty_rows
from fastlora.ops import fake_mask, needed, or_empty


@torch.library.custom_op(
    "fastlora::lora_linear_group",
    mutates_args=(),
    schema="(Tensor x, Tensor? seed, Tensor scaling, float dropout_p, bool[] has_bias, "
    "Tensor[] tensors) -> Tensor[]",
)
def lora_linear_group(
    x: Tensor,
    seed: Tensor | None,
    scaling: Tensor,
    dropout_p: float,
    has_bias: list[bool],
    tensors: list[Tensor],
) -> list[Tensor]:
    """`fused_forward`, with an empty mask where there is none."""
    *made, mask = fused_forward(x, seed, scaling, dropout_p, has_bias, *tensors)
    return [*made, or_empty(mask, x, torch.uint8)]  # type: ignore[list-item]


@lora_linear_group.register_fake
def _(
    x: Tensor,
    seed: Tensor | None,
    scaling: Tensor,
    dropout_p: float,
    has_bias: list[bool],
    tensors: list[Tensor],
) -> list[Tensor]:
    M, n = x.shape[0], len(has_bias)
    ys = [x.new_empty((M, weight.shape[0])) for weight in tensors[:n]]
    s = empty_rows(M, sum(b.shape[1] for b in tensors[2 * n : 3 * n]), x.dtype, x.device)
    return [*ys, s, fake_mask(x, dropout_p)]


@torch.library.custom_op(
    "fastlora::lora_linear_group_backward",
    mutates_args=(),
    schema="(Tensor? x, Tensor? mask, Tensor? s, Tensor scaling, float dropout_p, SymInt[] starts, "
    "bool need_x, bool[] need_as, bool[] need_bs, Tensor[] tensors) -> Tensor[]",
)
def lora_linear_group_backward(x: Any, *args: Any) -> list[Tensor]:
    """`fused_backward`, with an empty tensor for a gradient that is not needed."""
    *shared, tensors = args
    grads = fused_backward(x, *shared, *tensors)
    # dB comes transposed.
    return [or_empty(None if g is None else g.contiguous(), tensors[0]) for g in grads]


@lora_linear_group_backward.register_fake
def _(
    x: Tensor | None,
    mask: Tensor | None,
    s: Tensor | None,
    scaling: Tensor,
    dropout_p: float,
    starts: list[int],
    need_x: bool,
    need_as: list[bool],
    need_bs: list[bool],
    tensors: list[Tensor],
) -> list[Tensor]:
    n, dy = len(starts), tensors[0]
    weights, lora_As, lora_Bs = (tensors[k * n : (k + 1) * n] for k in (1, 2, 3))
    dx = dy.new_empty((dy.shape[0], weights[0].shape[1])) if need_x else None
    da = None
    if any(need_as):
        # As in `fused_backward`: the rows and the dtype of the stacked lora_A.
        da = torch.cat([lora_As[i] for i in stacked(need_x, need_as)])
    dbs = [
        b.new_empty(b.shape) if need_b else None for b, need_b in zip(lora_Bs, need_bs, strict=True)
    ]
    return [or_empty(grad, dy) for grad in (dx, da, *dbs)]


def _backward_op(*args: Any) -> tuple[Tensor | None, ...]:
    *shared, need_x, need_as, need_bs = args[:9]
    grads = lora_linear_group_backward(*shared, need_x, need_as, need_bs, list(args[9:]))
    return needed(grads, (need_x, any(need_as), *need_bs))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *shared, tensors = inputs
    setup_context(ctx, (*shared, *tensors), output)


def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    *shared, tensors = ctx.needs_input_grad
    dx, found = gradients(ctx, [*shared, *tensors], grads[: len(ctx.has_bias)], _backward_op)
    return (dx, *[None] * (FIRST_TENSOR - 1), found)


lora_linear_group.register_autograd(_gradients, setup_context=_setup_context)
lora_linear_group_backward.register_autograd(no_double_backward)
