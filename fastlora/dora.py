"""DoRA (Liu et al., 2024, arXiv 2402.09353) on top of the fused linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import reference
from fastlora.dispatch import HAS_TRITON, problem_for
from fastlora.functional import (
    autocast_linear,
    check_dropout,
    check_scaling,
    check_tensors,
    lora_linear,
)
from fastlora.kernels.config import keep_scale

if HAS_TRITON:
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
    ``W0 + scaling * B A`` and gets no gradient, as in PEFT. The norm is made from ``W0 A^T`` and
    ``A A^T``; ``B A`` is never built. Without dropout y is ``g * z + bias`` with ``z`` from
    `lora_linear`; with dropout the frozen product is made twice, as in PEFT. The factor g is applied
    by PyTorch after the fused product, not yet inside it.

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
    check_tensors(x, weight, lora_A, lora_B, bias)
    check_scaling(scaling, x.device)
    p = check_dropout(dropout_p) if training else 0.0
    if not isinstance(magnitude, Tensor) or not magnitude.is_floating_point():
        kind = magnitude.dtype if isinstance(magnitude, Tensor) else type(magnitude).__name__
        raise TypeError(f"magnitude must be a float Tensor, got {kind}")
    if tuple(magnitude.shape) != (weight.shape[0],) or magnitude.device != x.device:
        raise ValueError(
            f"magnitude must be (out_features,)=({weight.shape[0]},) on {x.device}, "
            f"got {tuple(magnitude.shape)} on {magnitude.device}"
        )
    x, weight, bias = autocast_linear(x, weight, bias)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    g = magnitude.to(compute) / dora_norm(weight, lora_A, lora_B, scaling)
    if p == 0:
        y = lora_linear(x, weight, lora_A, lora_B, scaling=scaling) * g
        return (y if bias is None else y + bias).to(x.dtype)
    keep = _keep_mask(x, weight, lora_A, lora_B, p)
    dropped = torch.where(keep, x * keep_scale(p), 0.0).to(x.dtype)
    z = lora_linear(dropped, weight, lora_A, lora_B, scaling=scaling)
    # x W0^T - xd W0^T as one product.
    return (F.linear(x - dropped, weight, bias) + z * g).to(x.dtype)


@torch.no_grad()
def dora_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor = 1.0
) -> Tensor:
    """The norms of the rows of ``W0 + scaling * B A``, from products of rank R alone.

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
        if not problem_for(weight, weight, lora_A, lora_B):
            w_a = shrink(weight, lora_A)[0].to(compute)
        else:
            rows = max(1, reference.MERGE_BLOCK // max(1, weight.shape[1]))
            blocks = [weight[i : i + rows] for i in range(0, max(1, weight.shape[0]), rows)]
            w_a = torch.cat([block.to(compute) @ a.t() for block in blocks])
        square = torch.linalg.vector_norm(weight, dim=1, dtype=compute).square()
        update = 2 * scaling * (w_a * b).sum(1) + scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
        norm: Tensor = (square + update).clamp_min(0).sqrt()
    return norm


def _keep_mask(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, p: float) -> Tensor:
    """The boolean keep mask of x, by the kernel that makes it where it runs."""
    rows, K = x.numel() // x.shape[-1] if x.shape[-1] else 0, x.shape[-1]
    seed = reference.draw_seed(x.device)
    if rows == 0 or problem_for(x, weight, lora_A, lora_B):
        return reference.dropout_keep_mask(seed, rows, K, p, x.device).view(x.shape)
    packed = shrink(x.detach().reshape(rows, K), lora_A.detach(), p, seed)[1]
    if packed is None:  # p rounds to none
        return torch.ones_like(x, dtype=torch.bool)
    bits = torch.arange(8, device=x.device, dtype=torch.uint8)
    keep = (packed[:, :, None] >> bits) & 1
    return keep.view(rows, -1)[:, :K].bool().reshape(x.shape)
