"""The fused DoRA linear for autograd: the launches, what is saved, and which gradients are made.

`DoRALinearFunction` is the eager form; `fastlora.ops_dora` registers the same functions with `torch.library`.
There is no dropout here: with it, `fastlora.dora_linear` adds a frozen product of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora import autograd
from fastlora.autograd import BackwardFunction, KernelFunction, as_made, factor_on, waited_for
from fastlora.kernels.common import for_tma
from fastlora.kernels.dora_grad import dora_grad
from fastlora.kernels.dora_norm import dora_norm
from fastlora.kernels.lora_forward import lora_forward
from fastlora.kernels.lora_shrink import lora_shrink


def fused_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling_tensor: Tensor | None,
    scaling: float,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Take x ``[M, K]``, weight ``[N, K]``, lora_A ``[R, K]``, lora_B ``[N, R]``, bias and magnitude ``[N]``.

    Give ``y = g * z + bias`` ``[M, N]``, s ``[M, R]``, g and norm ``[N]``, and ``z = x W0^T + s B^T``, or
    ``None`` unless ``keep_z``: the gradient of the magnitude is what needs it. z and not y is kept: where
    g is 0 or small beside the bias, y does not tell z, and y may be changed in place. PEFT's forward keeps
    two such tensors. ``scaling_tensor``, 0-dim, takes the place of ``scaling`` where there is one.
    """
    factor = factor_on(scaling, scaling_tensor, x.device)
    M, N = x.shape[0], weight.shape[0]
    # In this order: the product may begin beside the launch before it, which has to be `lora_shrink`'s.
    # That is an ordinary launch, so g is complete before it begins.
    g, norm = dora_norm(weight, lora_A, lora_B, magnitude, factor)
    if lora_B.dtype != x.dtype:
        lora_B = for_tma(lora_B, x.dtype)
    s, _ = lora_shrink(x, lora_A, factor, product_columns=N)
    z = x.new_empty((M, N)) if keep_z else None
    return lora_forward(x, weight, s, lora_B, bias, g, z), s, g, norm, z


def fused_backward(
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
) -> tuple[Tensor | None, ...]:
    """Take dy ``[M, N]`` and what `setup_context` saved; give dx, dW, dA, dB and dmagnitude where needed.

    They are those of the LoRA linear for ``dz = g * dy``, for the norm gets no gradient; dmagnitude is
    ``sum_m dy z / norm``, not needed where z is ``None``. x may be ``None`` where neither dW nor dA is
    needed, and s where dB is not.
    """
    need_dz = need_x or need_w or need_a or need_b
    dz, dmagnitude = dora_grad(dy, z, g, norm, magnitude.dtype, need_dz)
    if dz is None:
        return None, None, None, None, dmagnitude
    # dx may begin beside the launch before it: one of these, and dz is complete before they begin.
    dx, da, db = autograd.fused_backward(
        dz, x, weight, lora_A, lora_B, s, None, scaling_tensor, scaling, 0.0, need_x, need_a, need_b  # type: ignore[arg-type]
    )  # fmt: skip
    dw = autograd.weight_gradient(dz, x) if need_w and x is not None else None
    return dx, dw, da, db, dmagnitude


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Keep what the needed gradients need: x, s ``[M, R]``, the parameters, g, norm, and z ``[M, N]``."""
    x, weight, bias, lora_A, lora_B, magnitude, scaling_tensor, scaling, keep_z = inputs
    _, s, g, norm, z = output
    _, need_w, _, need_a, need_b, need_m = ctx.needs_input_grad[:6]
    ctx.mark_non_differentiable(*(t for t in (s, g, norm, z) if t is not None))
    ctx.set_materialize_grads(False)  # no zeros for what stands beside y
    ctx.save_for_backward(
        x if need_w or need_a else None,
        weight,
        lora_A,
        lora_B,
        magnitude,
        s if need_b else None,
        g,
        norm,
        z if need_m and keep_z else None,
        scaling_tensor,
    )
    ctx.scaling = scaling
    ctx.bias_dtype = None if bias is None else bias.dtype


def gradients(
    ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    """Take dy ``[M, N]``; give the gradients that are needed, each in its own dtype.

    ``backward`` is `fused_backward`, or a form of it that autograd or torch.compile sees as one op.
    """
    x, weight, lora_A, lora_B, magnitude, s, g, norm, z, scaling_tensor = ctx.saved_tensors
    s, g, norm, z = as_made(s, g, norm, z)
    saved = (x, weight, lora_A, lora_B, magnitude, s, g, norm)
    need_x, need_w, need_bias, need_a, need_b, need_m = ctx.needs_input_grad[:6]
    if need_m and z is None:
        raise ValueError("keep_z must be True where magnitude requires a gradient, got False")
    dx = dw = da = db = dmagnitude = None
    if need_x or need_w or need_a or need_b or need_m:
        dx, dw, da, db, dmagnitude = backward(
            dy, *saved, z, scaling_tensor, ctx.scaling, need_x, need_w, need_a, need_b
        )  # fmt: skip
    dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need_bias else None
    return dx, dw, dbias, da, db, dmagnitude, None, None, None


class _DoRALinearBackward(BackwardFunction):
    """Where a graph of the backward of the DoRA linear is recorded."""

    forward = staticmethod(fused_backward)


class DoRALinearFunction(KernelFunction):
    """``y = g * (x W0^T + scaling * x A^T B^T) + bias`` on 2-D tensors, with s, g, norm and z beside it."""

    NUMBER = 7

    forward = staticmethod(fused_forward)
    setup_context = staticmethod(setup_context)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Take dy ``[M, N]``; give the gradients that are needed, each in its own dtype."""
        if dy is None:
            return (None,) * 9
        dy = waited_for(dy)
        return gradients(ctx, dy, _DoRALinearBackward.run)
