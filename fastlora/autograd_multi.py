"""The `torch.autograd.Function` of many adapters: what is routed, what is saved, which gradients are made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora.adapters import Routing
from fastlora.autograd import waited_for
from fastlora.kernels.common import device_properties
from fastlora.kernels.config import MULTI_BLOCK_M, keep_scale, multi_shrink_parts
from fastlora.kernels.multi_gemm import lora_multi_gemm, multi_gemm_tiles
from fastlora.kernels.multi_grad import lora_multi_grad
from fastlora.kernels.multi_shrink import lora_multi_shrink


class LoRALinearMultiFunction(torch.autograd.Function):
    """``y[m] = x[m] W0^T + bias + scaling[l] * dropout(x[m]) A[l]^T B[l]^T``, ``l = ids[m]``, fused.

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
        scaling: Tensor,
        ranks: Tensor | None,
        seed: Tensor | None,
        routing: Routing,
        dropout_p: float,
    ) -> Tensor:
        """Take x ``[M, K]``, lora_A ``[L, R, K]``, lora_B ``[L, N, R]``; give y ``[M, N]``."""
        need_x, need_w, _, need_a, need_b = ctx.needs_input_grad[:5]
        tiles = multi_gemm_tiles(x, weight)
        decoding = tiles[0] == "decode" and not need_b  # backward wants s as one tensor
        num_sms = device_properties(x.device)[1]
        s, mask = lora_multi_shrink(
            x, lora_A, scaling, ranks,
            (routing.order, routing.sorted_ids, routing.block_starts(MULTI_BLOCK_M)), MULTI_BLOCK_M,
            dropout_p, seed, parts=multi_shrink_parts(x.shape[0], x.shape[1], num_sms) if decoding else 1,
        )  # fmt: skip
        slots = (routing.ids, routing.tile_slots(tiles[1].BLOCK_M))
        y = lora_multi_gemm(x, weight, s, lora_B, ranks, slots, tiles, bias)
        ctx.save_for_backward(
            x if need_w or need_a else None, weight, lora_A, lora_B,
            s if need_b else None, mask if need_x or need_a else None, scaling, ranks,
        )  # fmt: skip
        # The tables of this step: an in-place update for the next one must not reach this backward.
        ctx.routing, ctx.routing_version = routing, routing.version
        ctx.dropout_p = dropout_p
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
        routing: Routing = ctx.routing
        if routing.version != ctx.routing_version:
            raise RuntimeError(
                "the routing of this forward was changed by update_ before its backward"
            )
        x, weight, lora_A, lora_B, s, mask, scaling, ranks = ctx.saved_tensors
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dy = waited_for(dy)
        if dy.stride(1) != 1:
            dy = dy.contiguous()  # e.g. the expanded gradient of a sum: TMA wants dense rows
        rows = (routing.order, routing.sorted_ids)
        dx = dw = dbias = da = db = ds = None
        if need_x or need_a:
            ds, _ = lora_multi_shrink(
                dy, lora_B.transpose(1, 2), scaling, ranks,
                (*rows, routing.block_starts(MULTI_BLOCK_M)), MULTI_BLOCK_M,
                factor=keep_scale(ctx.dropout_p),
            )  # fmt: skip
        if need_x and ds is not None:
            turned = weight.t()
            tiles = multi_gemm_tiles(dy, turned, None if mask is None else lora_A.shape[1])
            slots = (routing.ids, routing.tile_slots(tiles[1].BLOCK_M))
            right = lora_A.transpose(1, 2)
            dx = lora_multi_gemm(dy, turned, ds, right, ranks, slots, tiles, mask=mask)
        if need_a and ds is not None:
            da = lora_multi_grad(
                x, ds[0], mask, ranks, (*rows, routing.segment_starts()),
                len(lora_A), lora_A.dtype,
            )  # fmt: skip
        if need_b:
            db = lora_multi_grad(
                dy, s[0], None, ranks, (*rows, routing.segment_starts()),
                len(lora_B), lora_B.dtype,
            ).transpose(1, 2)  # fmt: skip
        if need_w:
            dw = dy.t() @ x
        if need_bias:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, dbias, da, db, None, None, None, None, None
