"""Many adapters in one batch: the public function, its validation and its dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora import reference
from fastlora.adapters import AdapterStack, Routing, route
from fastlora.device_numbers import filled
from fastlora.dispatch import HAS_TRITON, problem_for
from fastlora.functional import autocast_linear, check_dropout, check_tensors, may_be_replayed

if HAS_TRITON:
    from fastlora import ops_multi
    from fastlora.autograd_multi import LoRALinearMultiForward, LoRALinearMultiFunction
    from fastlora.replay import replayed


def lora_linear_multi(
    x: Tensor,
    weight: Tensor,
    adapters: AdapterStack | tuple[Tensor, Tensor],
    adapter_ids: Tensor | Routing,
    *,
    bias: Tensor | None = None,
    scaling: Tensor | float | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``y[m] = x[m] W0^T + bias + scaling[l] * dropout(x[m]) A[l]^T B[l]^T`` with ``l = adapter_ids[m]``.

    Rows may come in any order; what a call costs follows from the rows and the adapters that they use, not
    from the number of slots. Gradients come for x, weight, bias and the stacks: of a stack, exact zeros
    for adapters that no row uses. Dropout draws the mask of `fastlora.lora_linear`. Where the kernels
    cannot run, `fastlora.reference.lora_linear_multi` does, which on a GPU syncs to read the ids.

    Args:
        x (Tensor): ``(..., K)``.
        weight (Tensor): ``[N, K]``, the frozen weight.
        adapters (AdapterStack | tuple[Tensor, Tensor]): the slots, or just ``lora_A [L, R, K]`` and
            ``lora_B [L, N, R]``.
        adapter_ids (Tensor | Routing): integer, one a row of x (``x.shape[:-1]``) or one a sequence
            (``[x.shape[0]]``); -1 is the frozen layer alone. A `fastlora.route` of the rows is shared by
            the layers of a step; ids as such are routed anew at every call.
        bias (Tensor | None): ``[N]``. Default: ``None``.
        scaling (Tensor | float | None): ``[L]`` or a number, in place of the stack's. Default: ``None``.
        dropout_p (float): probability of dropping an element of x, from 0 to 1. Default: 0.0.
        training (bool): whether dropout is active. Default: ``True``.

    Returns:
        Tensor: ``(..., N)`` in the dtype of x.

    Raises:
        TypeError: an argument has the wrong type, or a dtype that does not go with x's.
        ValueError: shapes or devices do not fit, an id (on the CPU) is out of range, or ``dropout_p`` is
            outside [0, 1].

    Example:
        >>> import torch, fastlora
        >>> x, weight = torch.randn(3, 5, 64), torch.randn(32, 64)
        >>> lora_A, lora_B = torch.randn(4, 8, 64), torch.randn(4, 32, 8)
        >>> ids = torch.tensor([2, -1, 0])  # a sequence each
        >>> fastlora.lora_linear_multi(x, weight, (lora_A, lora_B), ids, scaling=2.0).shape
        torch.Size([3, 5, 32])
    """
    stack = adapters if isinstance(adapters, AdapterStack) else _stack_of(adapters)
    lora_A, lora_B, ranks = stack.lora_A, stack.lora_B, stack.ranks
    scaling = stack.scaling if scaling is None else scaling
    drops = dropout_p if training else 0.0
    made = _replayed(
        x, weight, bias, lora_A, lora_B, scaling, ranks, None, drops, adapter_ids, learn=False
    )
    if made is not None:
        return made
    _check(x, weight, lora_A, lora_B, bias, scaling, ranks)
    dropout_p = check_dropout(dropout_p)
    dropout_p = dropout_p if training else 0.0
    x, weight, bias = autocast_linear(x, weight, bias)
    routing = _routing_of(adapter_ids, x, lora_A.shape[0])
    seed = reference.draw_seed(x.device) if dropout_p > 0 else None
    rows = x.reshape(-1, x.shape[-1])
    if problem_for(x, weight, lora_A, lora_B, bias=bias):
        y = reference.lora_linear_multi(
            rows, weight, lora_A, lora_B, routing.ids,
            scaling=scaling, ranks=ranks, bias=bias, dropout_p=dropout_p, seed=seed,
            compute=reference.in_place_of_kernels(x),
        )  # fmt: skip
        return reference.shaped(y, x.shape[:-1])

    L = lora_A.shape[0]
    compiling = torch.compiler.is_compiling()
    if isinstance(scaling, Tensor):
        scaling = scaling.detach().to(torch.float32).contiguous()
    elif compiling:  # as `lora_linear`: a number alone would be a constant of the graph
        scaling = scaling * torch.ones(L, dtype=torch.float32, device=x.device)
    else:
        scaling = filled(float(scaling), L, x.device)
    arguments = (
        rows, weight, None if bias is None else bias.contiguous(), lora_A, lora_B, scaling, ranks,
        seed, dropout_p, lora_B.requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip
    if compiling:
        y, _, _ = ops_multi.lora_linear_multi(*arguments, ops_multi.tables_of(routing))
    else:
        made = _replayed(x, weight, *arguments[2:-1], routing, learn=True)
        if made is not None:
            return made
        y = LoRALinearMultiFunction.apply(*arguments, routing)  # type: ignore[no-untyped-call]
    return reference.shaped(y, x.shape[:-1])


def _replayed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | float,
    ranks: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    adapter_ids: Tensor | Routing,
    *,
    learn: bool,
) -> Tensor | None:
    """What `fastlora.replay` makes of a call without gradients; ``learn`` where it has been checked."""
    if not HAS_TRITON or torch.compiler.is_compiling() or not may_be_replayed(x, weight, bias):
        return None
    if torch.is_grad_enabled() or not isinstance(adapter_ids, Routing):
        return None
    if dropout_p and seed is None:
        return None
    if type(scaling) is float:
        scaling = filled(scaling, len(lora_A), x.device)
    elif not isinstance(scaling, Tensor) or scaling.dtype != torch.float32:
        return None
    kinds, tables = adapter_ids.made()
    made = replayed(
        LoRALinearMultiForward,
        (
            x, weight, bias, lora_A, lora_B, scaling, ranks, seed, dropout_p,
            adapter_ids.num_adapters, kinds, *tables,
        ),
        learn,
    )  # fmt: skip
    return None if made is None else made[0]


def _stack_of(adapters: object) -> AdapterStack:
    if not isinstance(adapters, tuple) or len(adapters) != 2:
        raise TypeError(
            "adapters must be an AdapterStack or a pair (lora_A, lora_B), "
            f"got {type(adapters).__name__}"
        )
    return AdapterStack(*adapters)


def _routing_of(adapter_ids: Tensor | Routing, x: Tensor, num_adapters: int) -> Routing:
    """The routing of the rows of x, checked against them."""
    rows = x.shape[:-1].numel()
    if isinstance(adapter_ids, Routing):
        routed = adapter_ids.ids.shape[0]
        if routed != rows:
            raise ValueError(f"adapter_ids routes {routed} rows, x has {rows}")
        if adapter_ids.num_adapters != num_adapters:
            raise ValueError(
                f"adapter_ids was routed for {adapter_ids.num_adapters} adapters, "
                f"the stack has {num_adapters}"
            )
        if adapter_ids.ids.device != x.device:
            raise ValueError(
                f"adapter_ids must be on the device of x, {x.device}, got {adapter_ids.ids.device}"
            )
        return adapter_ids
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(
            f"adapter_ids must be a Tensor or a Routing, got {type(adapter_ids).__name__}"
        )
    if adapter_ids.device != x.device:
        raise ValueError(
            f"adapter_ids must be on the device of x, {x.device}, got {adapter_ids.device}"
        )
    shape = x.shape[:-1]
    if adapter_ids.shape != shape:
        if x.dim() < 2 or adapter_ids.shape != shape[:1]:
            raise ValueError(
                f"adapter_ids must be one a row, {tuple(shape)}, or one a sequence, "
                f"{tuple(shape[:1])}, got {tuple(adapter_ids.shape)}"
            )
        adapter_ids = adapter_ids.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    return route(adapter_ids.reshape(-1), num_adapters)


def _check(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: Tensor | float,
    ranks: Tensor | None,
) -> None:
    """Raise for arguments that do not fit together."""
    check_tensors(x, weight, lora_A, lora_B, bias, stacked=True)
    L = lora_A.shape[0]
    if L == 0:
        raise ValueError("lora_A must hold at least one adapter, got none")
    if isinstance(scaling, Tensor):
        if tuple(scaling.shape) != (L,) or not scaling.is_floating_point():
            raise ValueError(
                f"scaling must be a number or a float tensor ({L},), "
                f"got {scaling.dtype} of shape {tuple(scaling.shape)}"
            )
        if scaling.device != x.device:
            raise ValueError(f"scaling must be on {x.device}, got {scaling.device}")
        if scaling.requires_grad:
            raise ValueError("scaling must not require a gradient: it gets none")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a number or a Tensor, got {type(scaling).__name__}")
    if ranks is not None:
        if not isinstance(ranks, Tensor) or ranks.dtype != torch.int32:
            raise TypeError(f"ranks must be an int32 Tensor, got {getattr(ranks, 'dtype', ranks)}")
        if tuple(ranks.shape) != (L,) or ranks.device != x.device:
            raise ValueError(
                f"ranks must be ({L},) on {x.device}, got {tuple(ranks.shape)} on {ranks.device}"
            )
