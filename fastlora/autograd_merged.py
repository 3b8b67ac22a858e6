"""The `torch.autograd.Function` of a linear of which some slices of outputs are adapted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora.autograd import refuse_graph_of_backward, waited_for
from fastlora.kernels.lora_forward_sliced import Slices, lora_forward_sliced
from fastlora.kernels.lora_grad_a import lora_grad_a
from fastlora.kernels.lora_grad_b import lora_grad_b
from fastlora.kernels.lora_grad_x import lora_grad_x
from fastlora.kernels.lora_shrink import lora_shrink


@dataclass(frozen=True)
class MergedSpec:
    """The non-tensor arguments of a call; a tensor scaling travels beside it."""

    scaling: float
    dropout_p: float
    slices: Slices


class LoRAMergedLinearFunction(torch.autograd.Function):
    """``y = x W0^T + bias``, plus ``scaling * dropout(x) A_g^T B_g^T`` on slice g, fused.

    Two launches forward, a small copy between them; backward makes ds and dB slice by slice, then dx
    and dA of all of them at once. Saved are x, s ``[slices, M, R]``, the parameters and the mask.
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
        spec: MergedSpec,
    ) -> Tensor:
        """Take x ``[M, K]``, weight ``[N, K]``, lora_A ``[G R, K]``, lora_B ``[rows, R]``; give y."""
        factor = spec.scaling if scaling is None else scaling
        stacked, mask = lora_shrink(x, lora_A, factor, spec.dropout_p, seed)  # [M, G R]
        groups, R = len(spec.slices), lora_B.shape[1]
        s = stacked.view(-1, groups, R).transpose(0, 1).contiguous()
        y = lora_forward_sliced(x, weight, s, lora_B, spec.slices, bias)
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
        refuse_graph_of_backward()
        x, weight, lora_A, lora_B, s, mask, scaling = ctx.saved_tensors
        spec: MergedSpec = ctx.spec
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dy = waited_for(dy)
        if dy.stride(1) != 1:
            dy = dy.contiguous()  # e.g. the expanded gradient of a sum: TMA wants dense rows
        factor = spec.scaling if scaling is None else scaling
        dx = dw = dbias = da = db = ds = None
        need_ds = need_x or need_a
        if need_ds or need_b:
            widths = [last - first for first, last in spec.slices]
            parts: list[tuple[Any, Any]] = [
                lora_grad_b(
                    dy[:, first:last], s_g, b_g, factor, spec.dropout_p,
                    need_ds=need_ds, need_db=need_b,
                )
                for (first, last), s_g, b_g in zip(
                    spec.slices,
                    [None] * len(widths) if s is None else s,
                    torch.split(lora_B, widths),
                    strict=True,
                )
            ]  # fmt: skip
            ds = torch.cat([part[0] for part in parts], 1) if need_ds else None
            db = torch.cat([part[1] for part in parts]) if need_b else None
        if need_x and ds is not None:
            dx = lora_grad_x(dy, weight, ds, lora_A, mask)
        if need_a and ds is not None:
            da = lora_grad_a(x, ds, mask, lora_A.dtype)
        if need_w:
            dw = dy.t() @ x
        if need_bias:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, dbias, da, db, None, None, None
