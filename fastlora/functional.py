"""The public functions: documentation, validation, dispatch; nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora import reference
from fastlora.dispatch import HAS_TRITON, Decision, decide_for, is_forced, problem_for

if HAS_TRITON:
    from fastlora import ops
    from fastlora.autograd import LoRALinearFunction
    from fastlora.kernels import native
    from fastlora.kernels.lora_product import forward_way
    from fastlora.replay import replayed


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x W0^T + bias + scaling * dropout(x) A^T B^T``, in one fused pass where kernels run.

    Follows LoRA (Hu et al., 2021, arXiv 2106.09685) and the forward of PEFT's ``lora.Linear``: dropout is
    on the LoRA branch alone. Gradients come for whatever needs one, in each tensor's own dtype. Dropout
    draws its seed from torch's generator of x's device, so ``torch.manual_seed`` and activation
    checkpointing replay it; ``dropout_p`` is rounded to a multiple of 2**-14. Where the kernels cannot
    run, `fastlora.reference.lora_linear` does, with the same mask; `fastlora.explain` says why.

    Args:
        x (Tensor): ``(..., K)``, bf16, fp16 or fp32 for the kernels; any float dtype eagerly.
        weight (Tensor): ``[N, K]``, the frozen weight, in the dtype of x (or cast to it by autocast).
        lora_A (Tensor): ``[R, K]``, in the dtype of x or fp32; products run in the dtype of x.
        lora_B (Tensor): ``[N, R]``, likewise.
        bias (Tensor | None): ``[N]``. Default: ``None``.
        scaling (float | Tensor): ``lora_alpha / r``; a 0-dim tensor is read on the device, without a
            sync, and gets no gradient. Default: 1.0.
        dropout_p (float): probability of dropping an element of x, from 0 to 1. Default: 0.0.
        training (bool): whether dropout is active. Default: ``True``.
        seed (Tensor | None): 0-dim int64 on x's device, the seed of the mask, instead of a drawn one.
            Default: ``None``.

    Returns:
        Tensor: ``(..., N)`` in the dtype of x.

    Raises:
        TypeError: an argument is not a float tensor (or number), or its dtype does not go with x's.
        ValueError: shapes or devices do not fit, the rank is 0, or ``dropout_p`` is outside [0, 1].

    Example:
        >>> import torch, fastlora
        >>> x, weight = torch.randn(2, 5, 64), torch.randn(32, 64)
        >>> lora_A, lora_B = torch.randn(8, 64), torch.randn(32, 8)
        >>> fastlora.lora_linear(x, weight, lora_A, lora_B, scaling=2.0, dropout_p=0.1).shape
        torch.Size([2, 5, 32])
    """
    compiling = torch.compiler.is_compiling()
    if HAS_TRITON and not compiling:
        made = _replayed(
            x, weight, bias, lora_A, lora_B, seed, scaling, dropout_p if training else 0.0
        )
        if made is not None:
            return made
    if compiling:  # it would guard on the whole set
        signature, known = None, False
    else:
        signature = signature_of(x, weight, lora_A, lora_B, bias)
        known = is_known_fused(signature)
    if known:
        check_scaling(scaling, x.device)
        dropout_p = check_dropout(dropout_p)
    else:
        dropout_p = _validate(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
        x, weight, bias = autocast_linear(x, weight, bias)
    dropout_p = dropout_p if training else 0.0
    if not known and problem_for(x, weight, lora_A, lora_B, bias=bias):
        reject_mixed_dtensors(x, weight, lora_A, lora_B, bias, dropout_p)
        return reference.lora_linear(
            x, weight, lora_A, lora_B,
            bias=bias, scaling=scaling, dropout_p=dropout_p,
            seed=mask_seed(seed, dropout_p, x.device), compute=reference.in_place_of_kernels(x),
        )  # fmt: skip
    if not known:
        remember_fused(signature)
    if compiling or seed is not None:  # otherwise the Function draws it
        seed = mask_seed(seed, dropout_p, x.device)
    if compiling and not isinstance(scaling, Tensor):
        # As a number it would be a constant of the op, and every new value a recompilation.
        scaling = scaling * torch.ones((), dtype=torch.float32, device=x.device)
    scaling_tensor = scaling if isinstance(scaling, Tensor) else None
    run = ops.lora_linear if compiling else LoRALinearFunction.apply
    rows = reference.rows_of(x) if compiling else x
    y: Tensor
    y, _, _ = run(
        rows,
        weight,
        None if bias is None else bias.contiguous(),
        lora_A,
        lora_B,
        seed,
        scaling_tensor,
        1.0 if isinstance(scaling, Tensor) else float(scaling),
        dropout_p,
    )
    return y if rows is x else reference.shaped(y, x.shape[:-1])


def _replayed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
) -> Tensor | None:
    """What `fastlora.replay` makes of a call like one that was checked and recorded before."""
    if not may_be_replayed(x, weight, bias):
        return None
    by_tensor = isinstance(scaling, Tensor)
    made = replayed(
        LoRALinearFunction,
        (
            x, weight, bias, lora_A, lora_B, seed if dropout_p else None,
            scaling if by_tensor else None, 1.0 if by_tensor else scaling, dropout_p,
        ),
        learn=False,
    )  # fmt: skip
    return None if made is None else made[0]


def may_be_replayed(x: object, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `fastlora.replay` may be asked for a call before its arguments are checked."""
    return (
        native.module is not None
        and isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and (bias is None or isinstance(bias, Tensor))
        and not is_forced()
        and not is_cast(x, weight, bias)
    )


def is_cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autocast casts an argument of a linear."""
    kind = x.device.type
    if kind not in ("cuda", "cpu") or not torch.is_autocast_enabled(kind):
        return False
    dtype = torch.get_autocast_dtype(kind)
    return x.dtype != dtype or weight.dtype != dtype or (bias is not None and bias.dtype != dtype)


_known_fused: set[tuple[object, ...] | None] = set()
"""Signatures of calls that passed every check and run the kernels: checking takes as long as a launch."""
_MAX_KNOWN = 4096


def is_known_fused(signature: tuple[object, ...] | None) -> bool:
    """Whether a call of this signature has passed every check and runs the kernels."""
    return signature in _known_fused


def remember_fused(signature: tuple[object, ...] | None) -> None:
    """Let `is_known_fused` know the signature of a call that did; ``None`` is nothing to remember."""
    if signature is not None:
        if len(_known_fused) >= _MAX_KNOWN:
            _known_fused.clear()
        _known_fused.add(signature)


def signature_of(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
) -> tuple[object, ...] | None:
    """All that the checks and the choice of a path look at; ``None`` where there is more to it."""
    try:
        if is_forced():
            return None
        if is_cast(x, weight, bias):
            return None
        return (
            type(x), x.shape, x.dtype, x.device,
            type(weight), weight.shape, weight.dtype, weight.device,
            type(lora_A), lora_A.shape, lora_A.dtype, lora_A.device,
            type(lora_B), lora_B.shape, lora_B.dtype, lora_B.device,
            None if bias is None else (type(bias), bias.shape, bias.dtype, bias.device),
        )  # fmt: skip
    except (
        AttributeError,
        RuntimeError,
    ):  # no tensor, or of a device without autocast: the checks say so
        return None


def explain(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Decision:
    """Which path `lora_linear` takes for these arguments, and why.

    Args:
        x (Tensor): ``(..., K)``.
        weight (Tensor): ``[N, K]``.
        lora_A (Tensor): ``[R, K]``.
        lora_B (Tensor): ``[N, R]``.
        bias (Tensor | None): ``[N]``. Default: ``None``.
        dropout_p (float): from 0 to 1. Default: 0.0.

    Returns:
        Decision: ``path`` is ``"fused"`` or ``"eager"``, ``reason`` says why, and by which kernels forward
        is made.

    Raises:
        TypeError: as `lora_linear`.
        ValueError: as `lora_linear`.

    Example:
        >>> import torch, fastlora
        >>> t = torch.randn
        >>> fastlora.explain(t(4, 64), t(32, 64), t(8, 64), t(32, 8)).path
        'eager'
    """
    _validate(x, weight, lora_A, lora_B, bias, 1.0, dropout_p)
    x, weight, bias = autocast_linear(x, weight, bias)
    decision = decide_for(x, weight, lora_A, lora_B, bias=bias)
    if not decision.fused:
        return decision
    way = forward_way(reference.rows_of(x), weight, lora_A.shape[0], dropout_p)
    return Decision(decision.path, f"{decision.reason}; {way}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a linear of x to compute in; None where it leaves x alone."""
    device = x.device.type
    if (
        reference.autocast_available(device)
        and torch.is_autocast_enabled(device)
        and x.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(device)
    return None


def autocast_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast x, weight and bias as autocast casts the arguments of a linear; adapters stay as they are."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = _cast(x, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    return x, weight, bias


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    # Behind a cast that does nothing torch 2.11's compiler took the eager twin in place of the op.
    return t if t.dtype == dtype else t.to(dtype)


def _validate(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
) -> float:
    """Raise for arguments that do not fit together; return ``dropout_p`` as a float."""
    check_tensors(x, weight, lora_A, lora_B, bias)
    check_scaling(scaling, x.device)
    return check_dropout(dropout_p)


def check_tensors(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    stacked: bool = False,
) -> None:
    """Raise for tensors that do not fit together; ``stacked`` adapters have a dimension of slots first."""
    named = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    if bias is not None:
        named["bias"] = bias
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
    if x.dim() == 0:
        raise ValueError("x must be (..., in_features), got a 0-dim tensor")
    for name, dims in (("weight", 2), ("lora_A", 2 + stacked), ("lora_B", 2 + stacked)):
        if named[name].dim() != dims:
            raise ValueError(f"{name} must be {dims}-D, got shape {tuple(named[name].shape)}")
    K, (N, R) = x.shape[-1], (weight.shape[0], lora_A.shape[-2])
    slots, word = (tuple(lora_A.shape[:1]), "adapters, ") if stacked else ((), "")
    expected = {
        "weight": ("(out_features, in_features)", (N, K)),
        "lora_A": (f"({word}r, in_features)", (*slots, R, K)),
        "lora_B": (f"({word}out_features, r)", (*slots, N, R)),
        "bias": ("(out_features,)", (N,)),
    }
    for name, (words, shape) in expected.items():
        if name in named and tuple(named[name].shape) != shape:
            got = tuple(named[name].shape)
            raise ValueError(f"{name} must be {words}={shape}, got {got}")
    if R == 0:
        raise ValueError("lora_A must have a rank of at least 1, got shape (0, in_features)")


def check_dropout(dropout_p: float) -> float:
    """Raise for what is no probability; return it as a float."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= 1:  # NaN too
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    return float(dropout_p)


def check_scaling(scaling: object, device: torch.device) -> None:
    """Raise unless ``scaling`` is a number, or a 0-dim float tensor on ``device`` or the CPU.

    Args:
        scaling (object): what the caller gave.
        device (torch.device): where the other tensors are.

    Raises:
        TypeError: it is neither.
        ValueError: the tensor is of another shape, dtype or device, or requires grad.
    """
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0 or not scaling.is_floating_point():
            raise ValueError(
                "scaling must be a float or a 0-dim float tensor, got "
                f"{scaling.dtype} of shape {tuple(scaling.shape)}"
            )
        if scaling.requires_grad:
            raise ValueError("scaling must not require grad: it gets no gradient")
        if scaling.device not in (device, torch.device("cpu")):
            raise ValueError(f"scaling must be on {device} or the CPU, got {scaling.device}")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a float or a Tensor, got {type(scaling).__name__}")


def is_dtensor(t: Tensor) -> bool:
    """Whether t is a DTensor, without loading that part of torch where no tensor can be one."""
    if type(t) in (Tensor, torch.nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def mask_seed(seed: Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed of a call's mask: the one given, or a drawn one; ``None`` where nothing is dropped."""
    if dropout_p == 0:
        return None
    if seed is None:
        return reference.draw_seed(device)
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed must be a Tensor, got {type(seed).__name__}")
    if seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"seed must be a 0-dim int64 tensor on {device}, got {seed.dtype} of shape "
            f"{tuple(seed.shape)} on {seed.device}"
        )
    return seed


def reject_mixed_dtensors(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout_p: float,
) -> None:
    """Raise where the eager path cannot do what a DTensor among the arguments asks for."""
    named = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "bias": bias}
    present = {name: t for name, t in named.items() if t is not None}
    sharded = [name for name, t in present.items() if is_dtensor(t)]
    if not sharded:
        return
    plain = [name for name in present if name not in sharded]
    ways = (
        "call the layer through the module that fully_shard wrapped, or parallelize it with "
        "fastlora.distributed.ColwiseLoRA or RowwiseLoRA"
    )
    if plain:
        raise TypeError(
            f"DTensors and plain tensors cannot be mixed: DTensors are {', '.join(sharded)}, plain "
            f"are {', '.join(plain)}; {ways}"
        )
    if dropout_p > 0:
        raise ValueError(
            f"dropout_p must be 0 where the tensors are DTensors, got {dropout_p}; {ways}"
        )
