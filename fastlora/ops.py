"""The fused LoRA linear as `torch.library` ops: what torch.compile sees in place of the kernels.

Only compiled code goes through them. Called eagerly they cost more host time than a small layer has GPU
time, and `fastlora.autograd.LoRALinearFunction` runs the same launches without it. Importing fastlora
registers them where Triton can be imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.autograd import (
    fused_backward,
    fused_forward,
    gradients,
    no_double_backward,
    setup_context,
)
from fastlora.kernels.common import empty_rows
from fastlora.kernels.config import cdiv, dropout_threshold


def or_empty(t: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output that is not there, as the empty tensor that an op must return for it."""
    return like.new_empty((0,), dtype=dtype) if t is None else t


def fake_mask(x: Tensor, dropout_p: float) -> Tensor:
    """The packed mask of x ``[M, K]`` as fake kernels give it, empty without dropout."""
    M, K = x.shape
    shape = (M, cdiv(K, 8)) if dropout_threshold(dropout_p) > 0 else (0,)
    return x.new_empty(shape, dtype=torch.uint8)


def fake_gradients(
    dy: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients dx ``[M, K]``, dA and dB as fake kernels give them, empty where not needed."""
    need_x, need_a, need_b = needs
    return (
        dy.new_empty((dy.shape[0], weight.shape[1]) if need_x else (0,)),
        lora_A.new_empty(lora_A.shape) if need_a else dy.new_empty((0,)),
        lora_B.new_empty(lora_B.shape) if need_b else dy.new_empty((0,)),
    )


def needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """What an op gave, with ``None`` again where a gradient is not needed."""
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


@torch.library.custom_op(
    "fastlora::lora_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, "
    "Tensor? scaling_tensor, float scaling, float dropout_p) -> (Tensor, Tensor, Tensor)",
)
def lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_forward`, with an empty mask where there is none."""
    y, s, mask = fused_forward(x, *args)
    return y, s, or_empty(mask, x, torch.uint8)


@lora_linear.register_fake
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
) -> tuple[Tensor, Tensor, Tensor]:
    M = x.shape[0]
    y = x.new_empty((M, weight.shape[0]))
    return y, empty_rows(M, lora_A.shape[0], x.dtype, x.device), fake_mask(x, dropout_p)


@torch.library.custom_op(
    "fastlora::lora_linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? s, "
    "Tensor? mask, Tensor? scaling_tensor, float scaling, float dropout_p, bool need_x, "
    "bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
)
def lora_linear_backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_backward`, with an empty tensor for a gradient that is not needed."""
    dx, da, db = fused_backward(dy, *args)
    db = None if db is None else db.contiguous()  # some launches give it transposed
    return or_empty(dx, dy), or_empty(da, dy), or_empty(db, dy)


@lora_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor | None,
    mask: Tensor | None,
    scaling_tensor: Tensor | None,
    scaling: float,
    dropout_p: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(dy, weight, lora_A, lora_B, (need_x, need_a, need_b))


def _backward_op(*args: Any) -> tuple[Tensor | None, ...]:
    return needed(lora_linear_backward(*args), args[-3:])


def _gradients(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return gradients(ctx, dy, _backward_op)


lora_linear.register_autograd(_gradients, setup_context=setup_context)
lora_linear_backward.register_autograd(no_double_backward)
