"""Several projections of the same x: the public function, its validation and its dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora import reference
from fastlora.dispatch import HAS_TRITON, Decision, decide_for, problem_for
from fastlora.functional import (
    autocast_linear,
    check_dropout,
    check_scaling,
    check_tensors,
    is_known_fused,
    lora_linear,
    mask_seed,
    reject_mixed_dtensors,
    remember_fused,
    signature_of,
)
from fastlora.kernels.config import MAX_RANK

if HAS_TRITON:
    from fastlora import ops_group
    from fastlora.autograd_group import LoRALinearGroupFunction


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    *,
    biases: Sequence[Tensor | None] | None = None,
    scaling: float | Tensor | Sequence[float | Tensor] = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``y_i = x W_i^T + bias_i + scaling_i * dropout(x) A_i^T B_i^T`` for projections that share x.

    q, k and v of an attention, or gate and up of an MLP: x is read once for all of their lora_A, its mask
    is drawn and kept once, and x's gradient is one tensor to which each projection's product is added.
    Parameters stay separate; ``N_i`` and ``R_i`` may differ. Gradients come for whatever needs one.

    All projections drop the same elements of x, where separate calls (and PEFT) draw a mask for each: of
    one projection the distribution is the same, but the branches of two are no longer independent.

    The kernels take ranks of 256 together. With more than that, or with one projection, each is a
    `fastlora.lora_linear` with the same mask; where the kernels cannot run,
    `fastlora.reference.lora_linear_group` does. `fastlora.explain_group` says which, and why.

    Args:
        x (Tensor): ``(..., K)``.
        weights (Sequence[Tensor]): ``[N_i, K]`` each, the frozen weights.
        lora_As (Sequence[Tensor]): ``[R_i, K]`` each, in the dtype of x or fp32.
        lora_Bs (Sequence[Tensor]): ``[N_i, R_i]`` each, likewise.
        biases (Sequence[Tensor | None] | None): ``[N_i]`` each, or ``None`` for one or all of them.
            Default: ``None``.
        scaling (float | Tensor | Sequence[float | Tensor]): as for `fastlora.lora_linear`, one for all
            projections or one for each. Default: 1.0.
        dropout_p (float): probability of dropping an element of x, from 0 to 1. Default: 0.0.
        training (bool): whether dropout is active. Default: ``True``.
        seed (Tensor | None): 0-dim int64 on x's device, the seed of the mask, instead of a drawn one.
            Default: ``None``.

    Returns:
        tuple[Tensor, ...]: ``(..., N_i)`` for each projection, in the dtype of x.

    Raises:
        TypeError: as `fastlora.lora_linear`, or an argument is no sequence.
        ValueError: as `fastlora.lora_linear`, or the sequences are empty or differ in length.

    Example:
        >>> import torch, fastlora
        >>> x, widths = torch.randn(2, 5, 64), (64, 16, 16)
        >>> weights = [torch.randn(n, 64) for n in widths]
        >>> lora_As, lora_Bs = [torch.randn(8, 64) for _ in widths], [torch.zeros(n, 8) for n in widths]
        >>> q, k, v = fastlora.lora_linear_group(x, weights, lora_As, lora_Bs, dropout_p=0.1)
        >>> q.shape, k.shape, v.shape
        (torch.Size([2, 5, 64]), torch.Size([2, 5, 16]), torch.Size([2, 5, 16]))
    """
    compiling = torch.compiler.is_compiling()
    signatures = None if compiling else _signatures(x, weights, lora_As, lora_Bs, biases)
    known = signatures is not None and all(map(is_known_fused, signatures))
    if known:
        biases = [None] * len(weights) if biases is None else biases
        scaling = _each_scaling(scaling, len(weights))
        for factor in scaling:
            check_scaling(factor, x.device)
    else:
        biases, scaling = _validate(x, weights, lora_As, lora_Bs, biases, scaling)
        x, weights, biases = _autocast(x, weights, biases)
    dropout_p = check_dropout(dropout_p)
    dropout_p = dropout_p if training else 0.0
    seed = mask_seed(seed, dropout_p, x.device)
    members = list(zip(weights, lora_As, lora_Bs, biases, scaling, strict=True))
    if not known and _problem(x, weights, lora_As, lora_Bs, biases):
        for weight, lora_A, lora_B, bias, _ in members:
            reject_mixed_dtensors(x, weight, lora_A, lora_B, bias, dropout_p)
        return reference.lora_linear_group(
            x, weights, lora_As, lora_Bs,
            biases=biases, scaling=scaling, dropout_p=dropout_p, seed=seed,
            compute=reference.in_place_of_kernels(x),
        )  # fmt: skip
    for signature in () if known else signatures or ():
        remember_fused(signature)
    if _separate(lora_As):
        return tuple(
            lora_linear(x, w, a, b, bias=bias, scaling=factor, dropout_p=dropout_p, seed=seed)
            for w, a, b, bias, factor in members
        )
    has_bias = [bias is not None for bias in biases]
    tensors = [*weights, *lora_As, *lora_Bs, *(b.contiguous() for b in biases if b is not None)]
    rows = x.reshape(-1, x.shape[-1])
    if compiling:  # numbers would be constants of the graph
        factors = torch.stack([_on_device(factor, x.device) for factor in scaling])
        made = ops_group.lora_linear_group(rows, seed, factors, dropout_p, has_bias, tensors)
    else:
        made = LoRALinearGroupFunction.apply(
            rows, seed, _factors(scaling, x.device), dropout_p, has_bias, *tensors
        )
    return tuple(reference.shaped(y, x.shape[:-1]) for y in made[: len(weights)])


def explain_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    *,
    biases: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
) -> Decision:
    """Which path `lora_linear_group` takes for these arguments, and why.

    Args:
        x (Tensor): ``(..., K)``.
        weights (Sequence[Tensor]): ``[N_i, K]`` each.
        lora_As (Sequence[Tensor]): ``[R_i, K]`` each.
        lora_Bs (Sequence[Tensor]): ``[N_i, R_i]`` each.
        biases (Sequence[Tensor | None] | None): ``[N_i]`` each. Default: ``None``.
        dropout_p (float): from 0 to 1. Default: 0.0.

    Returns:
        Decision: ``path`` is ``"fused"`` or ``"eager"``; ``reason`` says why, and whether the projections
        are fused with one another or each by itself.

    Raises:
        TypeError: as `lora_linear_group`.
        ValueError: as `lora_linear_group`.

    Example:
        >>> import torch, fastlora
        >>> t = torch.randn
        >>> fastlora.explain_group(t(4, 64), [t(32, 64)], [t(8, 64)], [t(32, 8)]).path
        'eager'
    """
    biases, _ = _validate(x, weights, lora_As, lora_Bs, biases, 1.0)
    check_dropout(dropout_p)
    x, weights, biases = _autocast(x, weights, biases)
    problem = _problem(x, weights, lora_As, lora_Bs, biases)
    if problem:
        return Decision("eager", problem)
    apart = _separate(lora_As)
    rank = None if apart else sum(a.shape[0] for a in lora_As)
    decision = decide_for(x, weights[0], lora_As[0], lora_Bs[0], rank=rank)
    words = apart or f" in one pass over x: {_sum_of_ranks(lora_As)}"
    return Decision("fused", f"{decision.reason}{words}")


def _problem(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> str:
    """Why the kernels cannot take these tensors; empty when they can."""
    for i, (*tensors, bias) in enumerate(zip(weights, lora_As, lora_Bs, biases, strict=True)):
        problem = problem_for(x, *tensors, bias=bias)
        if problem:
            return f"projection {i}: {problem}"
    return ""


def _signatures(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
) -> list[tuple[object, ...] | None] | None:
    """What the checks look at, of each projection's `lora_linear`; ``None`` where there is more to it."""
    try:
        n = len(weights)
        given = (weights, lora_As, lora_Bs, [None] * n if biases is None else biases)
        if n == 0 or any(type(each) not in (list, tuple) or len(each) != n for each in given):
            return None
        return [signature_of(x, *members) for members in zip(*given, strict=True)]
    except TypeError:  # no sequence: the checks say so
        return None


def _each_scaling(
    scaling: float | Tensor | Sequence[float | Tensor], n: int
) -> list[float | Tensor]:
    """A factor for each projection; an error unless it is one for all or one for each."""
    if not isinstance(scaling, (list, tuple)):
        return [scaling] * n  # type: ignore[list-item]
    if len(scaling) != n:
        raise ValueError(f"scaling must have one entry for each of {n} weights, got {len(scaling)}")
    return list(scaling)


def _sum_of_ranks(lora_As: Sequence[Tensor]) -> str:
    return " + ".join(str(a.shape[0]) for a in lora_As)


def _separate(lora_As: Sequence[Tensor]) -> str:
    """Why each projection is a call of its own; empty when they are fused with one another."""
    if len(lora_As) == 1:
        return ", one projection"
    if sum(a.shape[0] for a in lora_As) > MAX_RANK:
        ranks = _sum_of_ranks(lora_As)
        return f", each projection by itself: {ranks} are above {MAX_RANK} together"
    return ""


def _factors(scaling: Sequence[float | Tensor], device: torch.device) -> tuple[float, ...] | Tensor:
    """The factors as floats, or as an fp32 tensor where one of them is on the device."""
    # A scalar on the CPU beside a GPU is read here, which syncs nothing.
    known = [f if isinstance(f, Tensor) and f.device == device else float(f) for f in scaling]
    if any(isinstance(factor, Tensor) for factor in known):
        return torch.stack([_on_device(factor, device) for factor in known])
    return tuple(known)  # type: ignore[arg-type]


def _on_device(factor: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(factor, Tensor):
        return factor.detach().to(device, torch.float32)
    return factor * torch.ones((), dtype=torch.float32, device=device)


def _autocast(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Cast x, weights and biases as autocast casts the arguments of a linear."""
    cast_weights, cast_biases = [], []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        try:
            x, weight, bias = autocast_linear(x, weight, bias)
        except TypeError as error:
            raise TypeError(f"projection {i}: {error}") from None
        cast_weights.append(weight)
        cast_biases.append(bias)
    return x, cast_weights, cast_biases


def _validate(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    scaling: float | Tensor | Sequence[float | Tensor],
) -> tuple[list[Tensor | None], list[float | Tensor]]:
    """Raise for arguments that do not fit together; return a bias and a factor for each projection."""
    named: dict[str, Any] = {
        "weights": weights,
        "lora_As": lora_As,
        "lora_Bs": lora_Bs,
        "biases": biases,
    }
    for name, given in named.items():
        if not isinstance(given, (list, tuple)) and not (name == "biases" and given is None):
            raise TypeError(
                f"{name} must be a list or tuple of tensors, got {type(given).__name__}"
            )
    n = len(weights)
    if n == 0:
        raise ValueError("weights must hold at least one tensor, got none")
    for name, given in named.items():
        if given is not None and len(given) != n:
            raise ValueError(
                f"{name} must have one entry for each of {n} weights, got {len(given)}"
            )
    each_bias: list[Tensor | None] = [None] * n if biases is None else list(biases)
    each_scaling = _each_scaling(scaling, n)
    for i, factor in enumerate(each_scaling):
        try:
            check_tensors(x, weights[i], lora_As[i], lora_Bs[i], each_bias[i])
            check_scaling(factor, x.device)
        except (TypeError, ValueError) as error:
            raise type(error)(f"projection {i}: {error}") from None
    return each_bias, each_scaling
