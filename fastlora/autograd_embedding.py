"""The `torch.autograd.Function` over the embedding kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora.autograd import refuse_graph_of_backward, waited_for
from fastlora.kernels.lora_embedding import lora_embedding
from fastlora.kernels.lora_grad_b import lora_grad_b
from fastlora.reference import sparse_columns


@dataclass(frozen=True)
class EmbeddingSpec:
    """The non-tensor arguments of a call; a tensor scaling travels beside it."""

    scaling: float
    padding_idx: int
    scale_grad_by_freq: bool
    sparse: bool


class LoRAEmbeddingFunction(torch.autograd.Function):
    """``y = weight[ids] + scaling * A[:, ids]^T B^T`` for 1-D ids, fused.

    Saved for backward: ids, lora_B, and s ``[M, R]``. The scatter to A is torch's own
    `embedding_backward` on ``[M, R]``: it sorts the ids, so its sums go in a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: Tensor | None,
        spec: EmbeddingSpec,
    ) -> Tensor:
        """Take ids ``[M]``, weight ``[V, N]``, lora_A ``[R, V]``, lora_B ``[N, R]``; give ``[M, N]``."""
        factor = spec.scaling if scaling is None else scaling
        y, s = lora_embedding(
            ids, weight, lora_A, lora_B, factor, need_s=bool(ctx.needs_input_grad[3])
        )
        ctx.save_for_backward(ids, lora_B, s, scaling)
        ctx.spec = spec
        ctx.vocabulary = weight.shape[0]
        ctx.a_dtype = lora_A.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Take dy ``[M, N]``; give the gradients that are needed, each in its own dtype."""
        refuse_graph_of_backward()
        ids, lora_B, s, scaling = ctx.saved_tensors
        spec: EmbeddingSpec = ctx.spec
        _, need_w, need_a, need_b = ctx.needs_input_grad[:4]
        dy = waited_for(dy)
        dw = da = db = ds = None
        if need_a or need_b:
            factor = spec.scaling if scaling is None else scaling
            ds, db = lora_grad_b(dy, s, lora_B, factor, need_ds=need_a, need_db=need_b)
        if need_a and ds is not None:
            if spec.sparse:
                da = sparse_columns(ds.to(ctx.a_dtype), ids, ctx.vocabulary, spec.padding_idx)
            else:  # summed in fp32, as all of fastlora's sums are, and rounded once
                da = _scatter(ds.float(), ids, ctx.vocabulary, spec).to(ctx.a_dtype).t()
        if need_w:
            dw = _scatter(dy, ids, ctx.vocabulary, spec)
        return None, dw, da, db, None, None


def _scatter(grad: Tensor, ids: Tensor, vocabulary: int, spec: EmbeddingSpec) -> Tensor:
    """``out[v] = sum of grad[m] over ids[m] == v``, ``[V, ...]``; nothing for padding_idx."""
    out: Tensor = torch.ops.aten.embedding_backward(
        grad, ids, vocabulary, spec.padding_idx, spec.scale_grad_by_freq, spec.sparse
    )
    return out
