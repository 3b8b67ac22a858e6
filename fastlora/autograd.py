"""The `torch.autograd.Function` over the kernels: what is saved, and which gradients are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels.lora_forward import lora_forward
from fastlora.kernels.lora_grad_a import lora_grad_a
from fastlora.kernels.lora_grad_b import lora_grad_b
from fastlora.kernels.lora_grad_x import lora_grad_x
from fastlora.kernels.lora_shrink import lora_shrink


@dataclass(frozen=True)
class LoRASpec:
    """The non-tensor arguments of a call; a tensor scaling travels beside it."""

    scaling: float
    dropout_p: float


class LoRALinearFunction(torch.autograd.Function):
    """``y = x W0^T + bias + scaling * dropout(x) A^T B^T`` on 2-D tensors, fused.

    Saved for backward: x, s ``[M, R]``, the parameters, and the mask at one bit an element of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        seed: Tensor | None,
        scaling: Tensor | None,
        spec: LoRASpec,
    ) -> Tensor:
        """Take x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``; give y ``[M, N]``."""
        factor = spec.scaling if scaling is None else scaling
        s, mask = lora_shrink(x, lora_A, factor, spec.dropout_p, seed)
        y = lora_forward(x, weight, s, lora_B, bias)
        need_x, need_w, _, need_a, need_b = ctx.needs_input_grad[:5]
        keep_x = x if need_w or need_a else None
        keep_mask = mask if need_x or need_a else None
        keep_s = s if need_b else None
        ctx.save_for_backward(keep_x, weight, lora_A, lora_B, keep_s, keep_mask, scaling)
        ctx.spec = spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Take dy ``[M, N]``; give the gradients that are needed, each in its own dtype."""
        if torch.is_grad_enabled():  # create_graph=True: these gradients would be constants in it
            raise RuntimeError(
                "fastlora's kernels have no double backward (create_graph=True); run this part "
                "eagerly: `with fastlora.dispatch.force('eager'):` around its forward"
            )
        x, weight, lora_A, lora_B, s, mask, scaling = ctx.saved_tensors
        spec: LoRASpec = ctx.spec
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        if type(dy) is not Tensor:
            dy = (
                dy.clone()
            )  # a collective still in flight has no data to point to: a copy waits for it
        if dy.stride(1) != 1:
            dy = dy.contiguous()  # e.g. the expanded gradient of a sum: TMA wants dense rows
        factor = spec.scaling if scaling is None else scaling
        dx = dw = dbias = da = db = ds = None
        if need_x or need_a or need_b:
            ds, db = lora_grad_b(
                dy, s, lora_B, factor, spec.dropout_p, need_ds=need_x or need_a, need_db=need_b
            )
        if need_x and ds is not None:
            dx = lora_grad_x(dy, weight, ds, lora_A, mask)
        if need_a and ds is not None:
            da = lora_grad_a(x, ds, mask, lora_A.dtype)
        if need_w:
            dw = dy.t() @ x
        if need_bias:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, dbias, da, db, None, None, None
