"""``y`` and ``dx`` by the way that is fastest: one fused GEMM, or cuBLAS on top of LoRA's share."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import tf32_allowed
from .config import adds_to_rank_product, decodes, dropout_threshold
from .lora_expand import lora_expand
from .lora_forward import lora_forward
from .lora_grad_x import lora_grad_x
from .lora_one_pass import fits_one_pass
from .ready import Ready

DECODE = "forward in one launch (lora_decode)"
ONE_PASS = "forward in one launch (lora_one_pass)"
ON_TOP = "cuBLAS adds the frozen product to LoRA's share (lora_shrink, lora_expand)"
FUSED = "forward in two launches (lora_shrink, lora_forward)"


def forward_way(x: Tensor, weight: Tensor, R: int, dropout_p: float) -> str:
    """How s and y are made: one of `DECODE`, `ONE_PASS`, `ON_TOP` and `FUSED`, which say it in words.

    Args:
        x (Tensor): ``[M, K]``.
        weight (Tensor): ``[N, K]`` in the dtype of x.
        R (int): the rank.
        dropout_p (float): probability of dropping an element of x.
    """
    has_dropout = dropout_threshold(dropout_p) > 0  # a tiny p rounds to none
    if decodes(x.shape[0], R, x.element_size(), has_dropout):
        return DECODE
    if not has_dropout and fits_one_pass(x, weight, R):
        return ONE_PASS
    return ON_TOP if adds_frozen_product(x) else FUSED


def adds_frozen_product(x: Tensor, *, backward: bool = False) -> bool:
    """Whether cuBLAS adds the frozen product of x, or in ``backward`` of dy, to LoRA's share.

    Never where PyTorch may only run what is deterministic: it then refuses cuBLAS without a setting of its
    workspace, which the fused GEMM does not need.
    """
    fused_fp32 = not backward and x.dtype == torch.float32 and tf32_allowed()
    return (
        adds_to_rank_product(x.shape[0], x.element_size(), x.device.type, fused_fp32)
        and not torch.are_deterministic_algorithms_enabled()
    )


def lora_y(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``y = x W0^T + s B^T + bias`` in the dtype of x, contiguous; arguments are those of `lora_forward`.

    Where `adds_frozen_product` says so, ``s B^T + bias`` is written first and cuBLAS adds ``x W0^T`` to it,
    so that y is rounded twice, as eager PyTorch's is.
    """
    if adds_frozen_product(x):
        return lora_expand(s, lora_B, None, bias, out).addmm_(x, weight.t())
    return lora_forward(x, weight, s, lora_B, bias, out=out)


def lora_dx(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor,
    lora_A: Tensor,
    mask: Tensor | None = None,
    *,
    beside: bool = False,
    ready: Ready | None = None,
) -> Tensor:
    """``dx = mask * (ds A) + dy W0`` in the dtype of dy; arguments are those of `lora_grad_x`.

    Rounded once or twice, as y is by `lora_y`.
    """
    if adds_frozen_product(dy, backward=True):
        return lora_expand(ds, lora_A.t(), mask).addmm_(dy, weight)
    return lora_grad_x(dy, weight, ds, lora_A, mask, beside=beside, ready=ready)
