"""The fused LoRA linear of many adapters as `torch.library` ops, for compiled code alone: see `fastlora.ops`.

The tables of the routing come as tensors, made once in a graph for all of its layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora.adapters import Routing
from fastlora.autograd import no_double_backward
from fastlora.autograd_multi import fused_backward, fused_forward, gradients, keep
from fastlora.kernels.common import empty_rows
from fastlora.ops import fake_gradients, fake_mask, needed, or_empty
from fastlora.routing_ops import TABLES, tables_op, unflattened


def tables_of(routing: Routing) -> list[Tensor]:
    """What the ops take as ``tables``: the rows of a routing, and every table made from them."""
    tables = routing._complete or tables_op(routing.ids, routing.sorted_ids, routing.num_adapters)
    return [routing.ids, routing.order, routing.sorted_ids, *tables]


def _routing(tables: list[Tensor], num_adapters: int) -> Routing:
    ids, order, sorted_ids, *made = tables
    return Routing(ids, num_adapters, order, sorted_ids, _tables=unflattened(made, num_adapters))


@torch.library.custom_op(
    "fastlora::lora_linear_multi",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scaling, "
    "Tensor? ranks, Tensor? seed, float dropout_p, bool need_s, Tensor[] tables) "
    "-> (Tensor, Tensor, Tensor)",
)
def lora_linear_multi(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_forward`, with an empty tensor for s or a mask that is not there."""
    *shared, tables = args
    y, s, mask = fused_forward(x, *shared, _routing(tables, shared[2].shape[0]))  # type: ignore[call-arg]
    return y, or_empty(s, x), or_empty(mask, x, torch.uint8)


@lora_linear_multi.register_fake
def _(
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
    tables: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    M = x.shape[0]
    s = empty_rows(M, lora_A.shape[1], x.dtype, x.device) if need_s else None
    return x.new_empty((M, weight.shape[0])), or_empty(s, x), fake_mask(x, dropout_p)


@torch.library.custom_op(
    "fastlora::lora_linear_multi_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? s, "
    "Tensor? mask, Tensor scaling, Tensor? ranks, float dropout_p, bool need_x, bool need_a, "
    "bool need_b, Tensor[] tables) -> (Tensor, Tensor, Tensor)",
)
def lora_linear_multi_backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_backward`, with an empty tensor for a gradient that is not needed."""
    *shared, tables = args
    dx, da, db = fused_backward(dy, *shared, _routing(tables, shared[2].shape[0]))  # type: ignore[call-arg]
    db = None if db is None else db.contiguous()
    return or_empty(dx, dy), or_empty(da, dy), or_empty(db, dy)


@lora_linear_multi_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor | None,
    mask: Tensor | None,
    scaling: Tensor,
    ranks: Tensor | None,
    dropout_p: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    tables: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(dy, weight, lora_A, lora_B, (need_x, need_a, need_b))


def _backward_op(*args: Any) -> tuple[Tensor | None, ...]:
    return needed(lora_linear_multi_backward(*args), args[-4:-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *shared, tables = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for s and the mask
    keep(ctx, tuple(shared), output, tuple(tables))


def _gradients(ctx: Any, dy: Tensor, *_: None) -> tuple[Any, ...]:
    return (*gradients(ctx, dy, _backward_op), *[None] * 5, [None] * (3 + len(TABLES)))


lora_linear_multi.register_autograd(_gradients, setup_context=_setup_context)
lora_linear_multi_backward.register_autograd(no_double_backward)
