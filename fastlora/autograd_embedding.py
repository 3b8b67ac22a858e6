"""The fused embedding for autograd: the launches, what is saved, and which gradients are made.

`LoRAEmbeddingFunction` is the eager form; `fastlora.ops_embedding` registers the same functions with
`torch.library`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlora.autograd import BackwardFunction, KernelFunction, as_made, factor_on, waited_for
from fastlora.kernels.lora_embedding import lora_embedding, lora_embedding_grad_a
from fastlora.kernels.lora_grad_b import lora_grad_b
from fastlora.reference import sparse_columns


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise for ids of a CPU tensor outside the table: the interpreter would read what lies there."""
    if ids.device.type != "cpu":
        return  # the kernel asserts it
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise IndexError(f"ids must be from 0 to {vocabulary - 1}, got {low if low < 0 else high}")


def fused_forward(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling_tensor: Tensor | None,
    scaling: float,
    need_s: bool,
    *_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Take ids ``[M]``, weight ``[V, N]``, lora_A ``[R, V]``, lora_B ``[N, R]``; give y ``[M, N]`` and s.

    s is ``[M, R]``, ``None`` unless ``need_s``: the gradient of lora_B is what needs it. The options of the
    gradients follow: ``padding_idx``, -1 for none, ``scale_grad_by_freq`` and ``sparse``.
    """
    factor = factor_on(scaling, scaling_tensor, weight.device)
    return lora_embedding(ids, weight, lora_A, lora_B, factor, need_s=need_s)


def fused_backward(
    dy: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling_tensor: Tensor | None,
    scaling: float,
    need_ds: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Take dy ``[M, N]`` and s ``[M, R]``; give ds ``[M, R]`` and dB where they are needed.

    s may be ``None`` where dB is not.
    """
    factor = factor_on(scaling, scaling_tensor, dy.device)
    return lora_grad_b(dy, s, lora_B, factor, need_ds=need_ds, need_db=need_db)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation look at what is called, without grad mode too."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def keep(ctx: Any, inputs: tuple[Any, ...], s: Tensor | None) -> None:
    """Keep ids, lora_B, and s ``[M, R]``; ``inputs`` are those of `fused_forward`."""
    ids, weight, lora_A, lora_B, scaling_tensor, scaling, need_s, *options = inputs
    kept = s if ctx.needs_input_grad[3] and need_s else None
    ctx.save_for_backward(ids, lora_B, kept, scaling_tensor)
    ctx.scaling, ctx.options = scaling, (weight.shape[0], *options)
    ctx.a_dtype = lora_A.dtype


def gradients(
    ctx: Any,
    dy: Tensor,
    backward: Callable[..., tuple[Tensor | None, ...]],
    scatter: Callable[..., Tensor],
) -> tuple[Tensor | None, ...]:
    """Take dy ``[M, N]``; give dW, dA and dB where they are needed, each in its own dtype.

    ``backward`` takes the arguments of `fused_backward`, ``scatter`` those of `lora_embedding_grad_a`. Where
    torch's own `embedding_backward` takes its place, that sorts the ids too: sums go in a fixed order.
    """
    ids, lora_B, s, scaling_tensor = ctx.saved_tensors
    s, ids = as_made(s, ids)
    _, need_w, need_a, need_b = ctx.needs_input_grad[:4]
    if need_b and s is None:
        raise ValueError("need_s must be True where lora_B requires a gradient, got False")
    vocabulary, padding_idx, by_freq, sparse = ctx.options
    dw = da = db = ds = None
    if need_a or need_b:
        ds, db = backward(dy, s, lora_B, scaling_tensor, ctx.scaling, need_a, need_b)
    if need_a and ds is not None:
        if sparse:
            da = sparse_columns(ds.to(ctx.a_dtype), ids, vocabulary, padding_idx)
        elif by_freq:
            da = _torchs_scatter(ds.float(), ids, *ctx.options).to(ctx.a_dtype).t()
        else:
            da = scatter(ids, ds, vocabulary, padding_idx, ctx.a_dtype)
    if need_w:
        dw = _torchs_scatter(dy, ids, *ctx.options)
    return dw, da, db


def traced_grad_a(
    ids: Tensor, ds: Tensor, vocabulary: int, padding_idx: int, dtype: torch.dtype
) -> Tensor:
    """`lora_embedding_grad_a` of torch's ops alone, for a graph: summed in fp32 and rounded once."""
    return _torchs_scatter(ds.float(), ids, vocabulary, padding_idx, False, False).to(dtype).t()


def _torchs_scatter(
    grad: Tensor, ids: Tensor, vocabulary: int, padding_idx: int, by_freq: bool, sparse: bool
) -> Tensor:
    """``out[v] = sum of grad[m] over ids[m] == v``, ``[V, ...]``; nothing for padding_idx."""
    out: Tensor = torch.ops.aten.embedding_backward(
        grad, ids, vocabulary, padding_idx, by_freq, sparse
    )
    return out


class _LoRAEmbeddingBackward(BackwardFunction):
    """Where a graph of ds and dB is recorded."""

    forward = staticmethod(fused_backward)


class _LoRAEmbeddingScatter(BackwardFunction):
    """Where a graph of dA is recorded."""

    forward = staticmethod(lora_embedding_grad_a)


class LoRAEmbeddingFunction(KernelFunction):
    """``y = weight[ids] + scaling * A[:, ids]^T B^T`` for 1-D ids, fused, with s beside it."""

    NUMBER = 5

    forward = staticmethod(fused_forward)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]
    ) -> None:
        """Keep what the needed gradients need."""
        s = output[1]
        ctx.mark_non_differentiable(*(() if s is None else (s,)))
        ctx.set_materialize_grads(False)  # no zeros for s
        keep(ctx, inputs, s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Take dy ``[M, N]``; give the gradients that are needed, each in its own dtype."""
        if dy is None:
            return (None,) * 10
        return (
            None,
            *gradients(ctx, waited_for(dy), _LoRAEmbeddingBackward.run, _LoRAEmbeddingScatter.run),
            *[None] * 6,
        )
