"""The fused linear of adapted slices as `torch.library` ops, for compiled code alone: see `fastlora.ops`.

A schema has no pairs: the slices go through the ops as one list of their first and last columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.autograd import no_double_backward
from fastlora.autograd_merged import fused_backward, fused_forward, gradients, setup_context
from fastlora.ops import fake_gradients, fake_mask, needed, or_empty


def _pairs(bounds: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(bounds[::2], bounds[1::2], strict=True))


@torch.library.custom_op(
    "fastlora::lora_merged_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, "
    "Tensor? scaling_tensor, float scaling, float dropout_p, int[] bounds) "
    "-> (Tensor, Tensor, Tensor)",
)
def lora_merged_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_forward`, with an empty mask where there is none."""
    *shared, bounds = args
    y, s, mask = fused_forward(x, *shared, _pairs(bounds))  # type: ignore[call-arg]
    return y, s, or_empty(mask, x, torch.uint8)


@lora_merged_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling_tensor: Tensor | None,
    scaling: float,
    dropout_p: float,
    bounds: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    M = x.shape[0]
    s = x.new_empty((len(bounds) // 2, M, lora_B.shape[1]))
    return x.new_empty((M, weight.shape[0])), s, fake_mask(x, dropout_p)


@torch.library.custom_op(
    "fastlora::lora_merged_linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? s, "
    "Tensor? mask, Tensor? scaling_tensor, float scaling, float dropout_p, int[] bounds, "
    "bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
)
def lora_merged_linear_backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_backward`, with an empty tensor for a gradient that is not needed."""
    (*shared, bounds), needs = args[:-3], args[-3:]
    dx, da, db = fused_backward(dy, *shared, _pairs(bounds), *needs)  # type: ignore[call-arg]
    db = None if db is None else db.contiguous()  # some launches give it transposed
    return or_empty(dx, dy), or_empty(da, dy), or_empty(db, dy)


@lora_merged_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor | None, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(dy, weight, lora_A, lora_B, args[-3:])


def _backward_op(*args: Any) -> tuple[Tensor | None, ...]:
    return needed(lora_merged_linear_backward(*args), args[-3:])


def _gradients(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return (*gradients(ctx, dy, _backward_op), *[None] * 5)


lora_merged_linear.register_autograd(_gradients, setup_context=setup_context)
lora_merged_linear_backward.register_autograd(no_double_backward)
