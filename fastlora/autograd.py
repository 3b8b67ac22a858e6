"""The fused LoRA linear for autograd: the launches, what is saved, and which gradients are made.

`LoRALinearFunction` is the eager form. `fastlora.ops` registers the same functions with `torch.library`
for torch.compile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from fastlora.kernels.common import for_tma
from fastlora.kernels.config import dropout_threshold, keep_scale
from fastlora.kernels.launch import recording
from fastlora.kernels.lora_decode import lora_decode
from fastlora.kernels.lora_grad_a import lora_grad_a
from fastlora.kernels.lora_grad_ab import lora_grad_ab
from fastlora.kernels.lora_grad_ab_tma import lora_grad_ab_ds, makes_ds
from fastlora.kernels.lora_grad_b import lora_grad_b
from fastlora.kernels.lora_one_pass import lora_one_pass
from fastlora.kernels.lora_product import (
    DECODE,
    ON_TOP,
    ONE_PASS,
    adds_frozen_product,
    forward_way,
    lora_dx,
    lora_y,
)
from fastlora.kernels.lora_shrink import lora_shrink
from fastlora.reference import draw_seed, rows_of, shaped
from fastlora.replay import replayed, saving_is_watched

_EAGERLY = "; run this part eagerly: `with fastlora.dispatch.force('eager'):` around its forward"


def factor_on(
    scaling: float, scaling_tensor: Tensor | None, device: torch.device
) -> float | Tensor:
    """The scaling that kernels on ``device`` take: the number, or the tensor in its place."""
    if scaling_tensor is None:
        return scaling
    # On a GPU the kernels read it. A scalar on the CPU beside them is read here, which syncs nothing.
    return scaling_tensor if scaling_tensor.device == device else float(scaling_tensor)


class _Unfinished(threading.local):
    """The product of y, left by a forward to whoever saves tensors before it.

    Activation checkpointing ends a recomputation as soon as its last tensor is saved. In the last layer of
    what it recomputes that is before y, if what backward needs is saved before y is made.
    """

    def __init__(self) -> None:
        self.left: list[Callable[[], object]] | None = None

    def leave(self, rest: Callable[[], object]) -> None:
        """Do the rest of a forward: when its tensors are saved, or now, where nobody waits for that."""
        if recording.tape is not None:
            recording.tape.saving_comes_here()
        elif self.left is not None:
            self.left.append(rest)
            return
        rest()

    def after(self, save: Callable[[], Any]) -> Any:
        """What ``save`` gives, which runs a forward and saves its tensors; then do the rest."""
        left: list[Callable[[], object]] = []
        self.left = left
        try:
            made = save()
        finally:
            self.left = None
        with torch.no_grad():
            for rest in left:
                rest()
        return made


unfinished = _Unfinished()


def fused_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling_tensor: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take x ``[M, K]``, weight ``[N, K]``, bias ``[N]``, lora_A ``[R, K]``, lora_B ``[N, R]``.

    Give y ``[M, N]``, s ``[M, R]``, and the mask ``[M, ceil(K / 8)]``, ``None`` without dropout.
    ``scaling_tensor``, 0-dim, takes the place of ``scaling`` where there is one.
    """
    factor = factor_on(scaling, scaling_tensor, x.device)
    way = forward_way(x, weight, lora_A.shape[0], dropout_p)
    if way is DECODE:
        return (*lora_decode(x, weight, lora_A, lora_B, factor, bias), None)
    y_later = saving_is_watched()
    if way is ONE_PASS and not y_later:
        return (*lora_one_pass(x, weight, lora_A, lora_B, factor, bias), None)
    if lora_B.dtype != x.dtype and way is not ON_TOP:
        # Before s is made: the product begins beside the kernel that makes it.
        lora_B = for_tma(lora_B, x.dtype)
    s, mask = lora_shrink(x, lora_A, factor, dropout_p, seed, product_columns=weight.shape[0])
    if not y_later:
        return lora_y(x, weight, s, lora_B, bias), s, mask
    y = x.new_empty((x.shape[0], weight.shape[0]))
    unfinished.leave(lambda: lora_y(x, weight, s, lora_B, bias, y))
    return y, s, mask


def fused_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    mask: Tensor | None,
    scaling_tensor: Tensor | None,
    scaling: float,
    dropout_p: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Take dy ``[M, N]`` and what `setup_context` saved; give dx, dA and dB where they are needed.

    x may be ``None`` where dA is not needed, and s where dB is not.
    """
    if not (need_x or need_a or need_b):
        return None, None, None
    if dy.stride(1) != 1:
        dy = dy.contiguous()  # e.g. the expanded gradient of a sum: TMA wants dense rows
    factor = factor_on(scaling, scaling_tensor, dy.device)
    if need_x and need_a and need_b:  # dA and dB are made beside dx
        a_dtype, ready = lora_A.dtype, None
        if mask is None and not adds_frozen_product(dy, backward=True):
            # A copy for TMA must not come between the two kernels that run side by side.
            lora_A = for_tma(lora_A, dy.dtype)
        if makes_ds(x, dy, s.shape[1], dropout=mask is not None):
            made, made_a, made_b, ready = lora_grad_ab_ds(
                x, mask, dy, s, lora_B, a_dtype, factor, keep_scale(dropout_p)
            )
        else:
            made = lora_shrink(dy, lora_B.t(), factor, factor=keep_scale(dropout_p))[0]
            made_a, made_b = lora_grad_ab(x, made, mask, dy, s, a_dtype, lora_B.dtype)
        made_x = lora_dx(dy, weight, made, lora_A, mask, beside=True, ready=ready)
        return made_x, made_a, made_b
    ds, db = lora_grad_b(dy, s, lora_B, factor, dropout_p, need_ds=need_x or need_a, need_db=need_b)
    dx = lora_dx(dy, weight, ds, lora_A, mask) if need_x and ds is not None else None
    da = lora_grad_a(x, ds, mask, lora_A.dtype) if need_a and ds is not None else None
    return dx, da, db


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Keep what the needed gradients need: x, s ``[M, R]``, the parameters, and the mask's bits."""
    x, weight, bias, lora_A, lora_B, _, scaling_tensor, scaling, dropout_p = inputs
    _, s, mask = output
    need_x, need_w, _, need_a, need_b = ctx.needs_input_grad[:5]
    keep_mask = (need_x or need_a) and dropout_threshold(dropout_p) > 0
    ctx.mark_non_differentiable(s, *(() if mask is None else (mask,)))
    ctx.set_materialize_grads(False)  # no zeros for s and the mask
    ctx.save_for_backward(
        x if need_w or need_a else None,
        weight,
        lora_A,
        lora_B,
        s if need_b else None,
        mask if keep_mask else None,
        scaling_tensor,
    )
    ctx.scaling, ctx.dropout_p = scaling, dropout_p
    ctx.bias_dtype = None if bias is None else bias.dtype


def gradients(
    ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    """Take dy ``[M, N]``; give the gradients that are needed, each in its own dtype.

    ``backward`` is `fused_backward`, or a form of it that autograd or torch.compile sees as one op.
    """
    x, weight, lora_A, lora_B, s, mask, scaling_tensor = ctx.saved_tensors
    x = None if x is None else rows_of(x)
    s, mask = as_made(s, mask)
    need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    dx, da, db = backward(
        dy, x, weight, lora_A, lora_B, s, mask, scaling_tensor, ctx.scaling, ctx.dropout_p,
        need_x, need_a, need_b,
    )  # fmt: skip
    dw = weight_gradient(dy, x) if need_w and x is not None else None
    dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need_bias else None
    return dx, dw, dbias, da, db, None, None, None, None


def as_made(s: Tensor | None, *others: Tensor | None) -> list[Any]:
    """Dense rows of s, and others contiguous, as they were made: hooks of saved tensors may change that."""
    dense = s if s is None or s.stride(-1) == 1 else s.contiguous()
    return [dense, *(None if t is None else t.contiguous() for t in others)]


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """``dW = dy^T x`` of rows dy ``[M, N]`` and x ``[M, K]``."""
    # torch's bf16 product on a CPU reads what lies between the columns of a strided dy as well.
    return (dy if dy.is_cuda else dy.contiguous()).t() @ x


def waited_for(dy: Tensor) -> Tensor:
    """A plain tensor: a collective still in flight has no data to point to, a copy waits for it."""
    if torch._C._functorch.is_legacy_batchedtensor(dy):  # autograd.grad(is_grads_batched=True)
        raise RuntimeError(f"fastlora's kernels have no vmap rule{_EAGERLY}")
    return dy if type(dy) is Tensor else dy.clone()


def no_double_backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    """Stand where the derivative of `fused_backward` would."""
    raise RuntimeError(f"fastlora's kernels have no double backward{_EAGERLY}")


# torch.func lowers a Function through its levels to `apply` with plain tensors, and sets this meanwhile: it
# saves every output then, and a replay gives those that have no gradient as None.
_below_a_transform = torch._C._functorch.get_single_level_autograd_function_allowed


class KernelFunction(torch.autograd.Function):
    """A Function that `torch.func` can transform, without what that costs everybody else."""

    NUMBER: int | None = None
    """Where `fastlora.replay` makes calls: the position of the number that each call has anew, or -1."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Call it. torch's own `apply` binds the arguments to a signature first: longer than a launch."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        if cls.NUMBER is not None and not _below_a_transform():
            found = replayed(cls, args)
            if found is not None:
                return found
        # The rest of torch's: what a transform that is over left around a tensor comes off.
        args = unwrap_dead_wrappers(args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        """Refuse forward-mode differentiation."""
        raise RuntimeError(f"fastlora's kernels have no forward-mode derivative{_EAGERLY}")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        """Refuse a batch dimension that the kernels do not know."""
        raise RuntimeError(f"fastlora's kernels have no vmap rule{_EAGERLY}")


class BackwardFunction(KernelFunction):
    """A `fused_backward`, its ``forward``: an error if it is differentiated in turn."""

    backward = staticmethod(no_double_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Keep nothing."""

    @classmethod
    def run(cls, *args: Any) -> Any:
        """Call it: a node of its own under create_graph=True and in a transform of torch.func."""
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        return cls.forward(*unwrap_dead_wrappers(args))  # of the function that torch.func.vjp gives


class _LoRALinearBackward(BackwardFunction):
    """Where a graph of the backward of the LoRA linear is recorded."""

    forward = staticmethod(fused_backward)


class LoRALinearFunction(KernelFunction):
    """``y = x W0^T + bias + scaling * dropout(x) A^T B^T``, x ``(..., K)``, with s and the mask beside it."""

    NUMBER = 7

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Call it; where saving is watched, save what backward needs before y is made."""
        if not saving_is_watched() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return unfinished.after(lambda: super(LoRALinearFunction, cls).apply(*args))

    @staticmethod
    def forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """`fused_forward` of the rows of x, with a seed drawn where one is needed and there is none."""
        weight, bias, lora_A, lora_B, seed, *factors = args
        if seed is None and factors[-1] > 0:  # dropout_p
            seed = draw_seed(x.device)
        y, s, mask = fused_forward(rows_of(x), weight, bias, lora_A, lora_B, seed, *factors)
        return shaped(y, x.shape[:-1]), s, mask

    setup_context = staticmethod(setup_context)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Take dy ``[M, N]``; give the gradients that are needed, each in its own dtype."""
        if dy is None:
            return (None,) * 9
        dy = waited_for(dy)
        dx, *others = gradients(ctx, rows_of(dy), _LoRALinearBackward.run)
        return None if dx is None else shaped(dx, dy.shape[:-1]), *others
