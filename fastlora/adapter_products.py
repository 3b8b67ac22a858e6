"""The LoRA branch of many adapters, eagerly: a loop over those that occur, and the op that stands for it.

The loop reads the ids back, which a compiler cannot trace, so compiled code goes through the op. Inside an op
autograd records nothing: its gradients are written down here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor


def _adapters(
    ids: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | float, ranks: Tensor | None,
    compute: torch.dtype,
) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor, Tensor | float]]:  # fmt: skip
    """Slot, rank, rows, A ``[r, K]``, B ``[N, r]`` and scaling of each adapter that occurs."""
    for slot in torch.unique(ids).tolist():
        if slot < 0:
            continue
        r = lora_A.shape[1] if ranks is None else int(ranks[slot])
        rows = (ids == slot).nonzero().squeeze(1)
        factor = scaling[slot].to(compute) if isinstance(scaling, Tensor) else scaling
        yield slot, r, rows, lora_A[slot, :r].to(compute), lora_B[slot, :, :r].to(compute), factor


def adapter_products(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    ids: Tensor,
    scaling: Tensor | float,
    ranks: Tensor | None,
) -> Tensor:
    """``out[m] = scaling[l] * x[m] A[l]^T B[l]^T`` with ``l = ids[m]``; zeros for an id of -1.

    Args:
        x (Tensor): ``[M, K]``, after dropout, in the dtype to compute in.
        lora_A (Tensor): ``[L, R, K]``.
        lora_B (Tensor): ``[L, N, R]``.
        ids (Tensor): integer ``[M]``.
        scaling (Tensor | float): ``[L]`` or one number.
        ranks (Tensor | None): integer ``[L]``, or ``None`` for R everywhere.

    Returns:
        Tensor: ``[M, N]`` in the dtype of x.
    """
    if torch.compiler.is_compiling():
        if not isinstance(scaling, Tensor):
            scaling = scaling * torch.ones(lora_A.shape[0], dtype=x.dtype, device=x.device)
        y: Tensor = products_op(x, lora_A, lora_B, ids, scaling, ranks)
        return y
    return _products(x, lora_A, lora_B, ids, scaling, ranks)


def _products(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    ids: Tensor,
    scaling: Tensor | float,
    ranks: Tensor | None,
) -> Tensor:
    # The empty slices put both stacks into the graph: zeros for adapters that do not occur.
    zero = (lora_A[:0].sum() + lora_B[:0].sum()).to(x.dtype)
    out = x.new_zeros((x.shape[0], lora_B.shape[1])) + zero
    for _, _, rows, a, b, factor in _adapters(ids, lora_A, lora_B, scaling, ranks, x.dtype):
        out = out.index_add(0, rows, factor * (x[rows] @ a.t()) @ b.t())
    return out


products_op = torch.library.custom_op(
    "fastlora::adapter_products",
    _products,
    mutates_args=(),
    schema="(Tensor x, Tensor lora_A, Tensor lora_B, Tensor ids, Tensor scaling, Tensor? ranks) "
    "-> Tensor",
)


@products_op.register_fake
def _(x: Tensor, lora_A: Tensor, lora_B: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], lora_B.shape[1]))


@torch.library.custom_op(
    "fastlora::adapter_products_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor lora_A, Tensor lora_B, Tensor ids, Tensor scaling, "
    "Tensor? ranks) -> (Tensor, Tensor, Tensor)",
)
def products_backward_op(
    dy: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    ids: Tensor,
    scaling: Tensor,
    ranks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx[m] = ds[m] A[l]``, ``dA[l] = ds^T x`` and ``dB[l] = dy^T s``, ``ds = scaling[l] * dy B[l]``."""
    dx, da, db = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (x, lora_A, lora_B))
    for slot, r, rows, a, b, factor in _adapters(ids, lora_A, lora_B, scaling, ranks, x.dtype):
        x_l, dy_l = x[rows], dy[rows]
        ds = factor * (dy_l @ b)
        dx.index_copy_(0, rows, ds @ a)
        da[slot, :r] = ds.t() @ x_l
        db[slot, :, :r] = dy_l.t() @ (factor * (x_l @ a.t()))
    return dx, da, db


@products_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, da, db = products_backward_op(dy, *ctx.saved_tensors)
    return dx, da, db, None, None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError("the compiled eager twin of many adapters has no double backward")


products_op.register_autograd(_gradients, setup_context=_setup_context)
products_backward_op.register_autograd(_no_double_backward)
