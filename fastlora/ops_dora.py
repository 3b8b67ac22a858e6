"""The fused DoRA linear as `torch.library` ops, for compiled code alone: see `fastlora.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora.autograd import no_double_backward
from fastlora.autograd_dora import fused_backward, fused_forward, gradients, setup_context
from fastlora.kernels.common import empty_rows
from fastlora.ops import needed, or_empty

_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "fastlora::dora_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor magnitude, "
    "Tensor? scaling_tensor, float scaling, bool keep_z) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def dora_linear(x: Tensor, *args: Any) -> _Five:
    """`fused_forward`, with an empty z where there is none."""
    *made, z = fused_forward(x, *args)
    return (*made, or_empty(z, x))  # type: ignore[return-value]


@dora_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling_tensor: Tensor | None,
    scaling: float,
    keep_z: bool,
) -> _Five:
    M, N = x.shape[0], weight.shape[0]
    s = empty_rows(M, lora_A.shape[0], x.dtype, x.device)
    g, norm = (x.new_empty((N,), dtype=torch.float32) for _ in range(2))
    z = x.new_empty((M, N)) if keep_z else None
    return x.new_empty((M, N)), s, g, norm, or_empty(z, x)


@torch.library.custom_op(
    "fastlora::dora_linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, "
    "Tensor? s, Tensor g, Tensor norm, Tensor? z, Tensor? scaling_tensor, float scaling, "
    "bool need_x, bool need_w, bool need_a, bool need_b) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def dora_linear_backward(dy: Tensor, *args: Any) -> _Five:
    """`fused_backward`, with an empty tensor for a gradient that is not needed."""
    grads = fused_backward(dy, *args)
    # Some launches give dB transposed.
    return tuple(or_empty(None if g is None else g.contiguous(), dy) for g in grads)  # type: ignore[return-value]


@dora_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    s: Tensor | None,
    g: Tensor,
    norm: Tensor,
    z: Tensor | None,
    scaling_tensor: Tensor | None,
    scaling: float,
    need_x: bool,
    need_w: bool,
    need_a: bool,
    need_b: bool,
) -> _Five:
    (M, N), K = dy.shape, weight.shape[1]
    grads = (
        dy.new_empty((M, K)) if need_x else None,
        dy.new_empty((N, K)) if need_w else None,
        lora_A.new_empty(lora_A.shape) if need_a else None,
        lora_B.new_empty(lora_B.shape) if need_b else None,
        None if z is None else magnitude.new_empty((N,)),
    )
    return tuple(or_empty(grad, dy) for grad in grads)  # type: ignore[return-value]


def _backward_op(*args: Any) -> tuple[Tensor | None, ...]:
    return needed(dora_linear_backward(*args), (*args[-4:], args[9] is not None))


def _gradients(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return gradients(ctx, dy, _backward_op)


dora_linear.register_autograd(_gradients, setup_context=setup_context)
dora_linear_backward.register_autograd(no_double_backward)
