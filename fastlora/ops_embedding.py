"""The fused embedding as `torch.library` ops, for compiled code alone: see `fastlora.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora.autograd import no_double_backward
from fastlora.autograd_embedding import (
    check_ids,
    fused_backward,
    fused_forward,
    gradients,
    keep,
    traced_grad_a,
)
from fastlora.kernels.common import empty_rows
from fastlora.ops import needed, or_empty


@torch.library.custom_op(
    "fastlora::lora_embedding",
    mutates_args=(),
    schema="(Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? scaling_tensor, "
    "float scaling, bool need_s, int padding_idx, bool scale_grad_by_freq, bool sparse) "
    "-> (Tensor, Tensor)",
)
def lora_embedding(ids: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """`fused_forward`, with an empty s where there is none; wrong ids on the CPU are an error."""
    check_ids(ids, weight.shape[0])
    y, s = fused_forward(ids, weight, *args)
    return y, or_empty(s, weight)


@lora_embedding.register_fake
def _(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling_tensor: Tensor | None,
    scaling: float,
    need_s: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    M = ids.shape[0]
    s = empty_rows(M, lora_A.shape[0], weight.dtype, weight.device) if need_s else None
    return weight.new_empty((M, weight.shape[1])), or_empty(s, weight)


@torch.library.custom_op(
    "fastlora::lora_embedding_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? s, Tensor lora_B, Tensor? scaling_tensor, float scaling, "
    "bool need_ds, bool need_db) -> (Tensor, Tensor)",
)
def lora_embedding_backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """`fused_backward`, with an empty tensor for what is not needed."""
    ds, db = fused_backward(dy, *args)
    db = None if db is None else db.contiguous()  # some launches give it transposed
    return or_empty(ds, dy), or_empty(db, dy)


@lora_embedding_backward.register_fake
def _(
    dy: Tensor,
    s: Tensor | None,
    lora_B: Tensor,
    scaling_tensor: Tensor | None,
    scaling: float,
    need_ds: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor]:
    ds = empty_rows(dy.shape[0], lora_B.shape[1], dy.dtype, dy.device) if need_ds else None
    db = lora_B.new_empty(lora_B.shape) if need_db else None
    return or_empty(ds, dy), or_empty(db, dy)


def _backward_op(*args: Any) -> tuple[Tensor | None, ...]:
    return needed(lora_embedding_backward(*args), args[-2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for s
    keep(ctx, inputs, output[1])


def _gradients(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return (None, *gradients(ctx, dy, _backward_op, traced_grad_a), *[None] * 6)


lora_embedding.register_autograd(_gradients, setup_context=_setup_context)
lora_embedding_backward.register_autograd(no_double_backward)
