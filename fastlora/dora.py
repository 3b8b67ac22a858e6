"""DoRA (Liu et al., 2024, arXiv 2402.09353) in the fused linear."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora import reference
from fastlora.dispatch import HAS_TRITON, problem_for
from fastlora.functional import (
    autocast_linear,
    check_dropout,
    check_scaling,
    check_tensors,
    is_known_fused,
    lora_linear,
    remember_fused,
    signature_of,
)
from fastlora.kernels.config import keep_scale

if HAS_TRITON:
    from fastlora import ops_dora
    from fastlora.autograd_dora import DoRALinearFunction
    from fastlora.ops_shrink import shrink


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``y = x W0^T + bias + (g - 1) * xd W0^T + g * scaling * xd A^T B^T``, PEFT's DoRA linear.

    ``xd`` is ``dropout(x)`` and ``g = magnitude / norm``, where norm is that of the rows of
    ``W0 + scaling * B A`` and gets no gradient, as in PEFT. Without dropout y is ``g * z + bias`` with the z
    of `lora_linear`: one fused pass, g from one read of W0 before it. ``B A`` is never built in full. z is
    kept for the gradient of magnitude, where that needs one. With dropout the pass takes xd, and a second
    frozen product, of ``x - xd``, is added to it, as in PEFT; the mask is that of `lora_linear`.

    Args:
        x (Tensor): ``(..., K)``.
        weight (Tensor): ``[N, K]``, the frozen weight, in the dtype of x.
        lora_A (Tensor): ``[R, K]``, in the dtype of x or fp32.
        lora_B (Tensor): ``[N, R]``, likewise.
        magnitude (Tensor): ``[N]``, any float dtype; g is in fp32.
        bias (Tensor | None): ``[N]``. Default: ``None``.
        scaling (float | Tensor): as for `lora_linear`. Default: 1.0.
        dropout_p (float): as for `lora_linear`. Default: 0.0.
        training (bool): whether dropout is active. Default: ``True``.

    Returns:
        Tensor: ``(..., N)`` in the dtype of x.

    Raises:
        TypeError: as `lora_linear`, or magnitude is no float tensor.
        ValueError: as `lora_linear`, or magnitude does not fit.

    Example:
        >>> import torch, fastlora
        >>> x, weight = torch.randn(5, 32), torch.randn(16, 32)
        >>> lora_A, lora_B = torch.randn(4, 32), torch.zeros(16, 4)
        >>> y = fastlora.dora_linear(x, weight, lora_A, lora_B, weight.norm(dim=1))
        >>> torch.allclose(y, x @ weight.T, atol=1e-4)
        True
    """
    compiling = torch.compiler.is_compiling()
    signature = None if compiling else signature_of(x, weight, lora_A, lora_B, bias)
    known = not compiling and is_known_fused(signature)  # compiled, it would guard on the whole set
    if not known:
        check_tensors(x, weight, lora_A, lora_B, bias)
    check_scaling(scaling, x.device)
    p = check_dropout(dropout_p) if training else 0.0
    _check_magnitude(magnitude, weight.shape[0], x.device)
    run = _fused if type(magnitude) in (Tensor, torch.nn.Parameter) else _composed
    if not known:
        x, weight, bias = autocast_linear(x, weight, bias)
        if problem_for(x, weight, lora_A, lora_B, bias=bias):
            run = _composed
        else:
            remember_fused(signature)
    if compiling and not isinstance(scaling, Tensor):
        # As a number it would be a constant of the op, and every new value a recompilation.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        scaling = scaling * torch.ones((), dtype=dtype, device=x.device)
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if p == 0:
        y = run(rows, weight, lora_A, lora_B, magnitude, bias, scaling)
    else:
        keep = _keep_mask(rows, weight, lora_A, lora_B, p)
        dropped = torch.where(keep, rows * keep_scale(p), 0.0).to(x.dtype)
        y = run(dropped, weight, lora_A, lora_B, magnitude, bias, scaling)
        # x W0^T - xd W0^T as one product, added to y in its accumulator.
        y = y.addmm_(rows - dropped, weight.t())
    return reference.shaped(y, x.shape[:-1])


def _check_magnitude(magnitude: object, out_features: int, device: torch.device) -> None:
    """Raise unless ``magnitude`` is a float tensor ``(out_features,)`` on ``device``."""
    if not isinstance(magnitude, Tensor) or not magnitude.is_floating_point():
        kind = magnitude.dtype if isinstance(magnitude, Tensor) else type(magnitude).__name__
        raise TypeError(f"magnitude must be a float Tensor, got {kind}")
    if tuple(magnitude.shape) != (out_features,) or magnitude.device != device:
        raise ValueError(
            f"magnitude must be (out_features,)=({out_features},) on {device}, "
            f"got {tuple(magnitude.shape)} on {magnitude.device}"
        )


def _fused(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
) -> Tensor:
    """``g * z + bias`` for a 2-D x, by the kernels."""
    run = ops_dora.dora_linear if torch.compiler.is_compiling() else DoRALinearFunction.apply
    y: Tensor = run(
        x,
        weight,
        None if bias is None else bias.contiguous(),
        lora_A,
        lora_B,
        magnitude.contiguous(),
        scaling if isinstance(scaling, Tensor) else None,
        1.0 if isinstance(scaling, Tensor) else float(scaling),
        torch.is_grad_enabled() and magnitude.requires_grad,
    )[0]
    return y


def _composed(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
) -> Tensor:
    """``g * z + bias`` for a 2-D x, with z from `lora_linear`, where the kernels cannot run."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    g = magnitude.to(compute) / dora_norm(weight, lora_A, lora_B, scaling)
    y = lora_linear(x, weight, lora_A, lora_B, scaling=scaling) * g
    return (y if bias is None else y + bias).to(x.dtype)


@torch.no_grad()
def dora_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor = 1.0
) -> Tensor:
    """The norms of the rows of ``W0 + scaling * B A``, from products of rank R alone, by PyTorch.

    ``|w + s b A|^2 = |w|^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T`` for a row w of W0 and b of B.

    Args:
        weight (Tensor): ``[N, K]``.
        lora_A (Tensor): ``[R, K]``.
        lora_B (Tensor): ``[N, R]``.
        scaling (float | Tensor): factor of the product. Default: 1.0.

    Returns:
        Tensor: ``[N]`` in fp32 (fp64 for an fp64 weight), without a graph.
    """
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with reference.no_autocast(weight.device.type):
        a, b = lora_A.to(compute), lora_B.to(compute)
        rows = max(1, reference.MERGE_BLOCK // max(1, weight.shape[1]))
        blocks = [weight[i : i + rows] for i in range(0, max(1, weight.shape[0]), rows)]
        w_a = torch.cat([block.to(compute) @ a.t() for block in blocks])
        square = torch.linalg.vector_norm(weight, dim=1, dtype=compute).square()
        update = 2 * scaling * (w_a * b).sum(1) + scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
        norm: Tensor = (square + update).clamp_min(0).sqrt()
    return norm


def _keep_mask(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, p: float) -> Tensor:
    """The boolean keep mask of a 2-D x, by the kernel that makes it where it runs."""
    (rows, K), seed = x.shape, reference.draw_seed(x.device)
    if problem_for(x, weight, lora_A, lora_B):
        return reference.dropout_keep_mask(seed, rows, K, p, x.device)
    packed = shrink(x.detach(), lora_A.detach(), p, seed)[1]
    if packed is None:  # p rounds to none
        return torch.ones_like(x, dtype=torch.bool)
    bits = torch.arange(8, device=x.device, dtype=torch.uint8)
    keep = (packed[:, :, None] >> bits) & 1
    return keep.view(rows, -1)[:, :K].bool()
