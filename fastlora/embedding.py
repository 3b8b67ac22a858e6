"""The embedding with LoRA as a function: documentation, validation, dispatch."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from fastlora import reference
from fastlora.dispatch import (
    HAS_TRITON,
    Decision,
    decide_embedding_for,
    embedding_problem_for,
    is_forced,
)
from fastlora.functional import check_scaling, is_known_fused, remember_fused

if HAS_TRITON:
    from torch._functorch.utils import unwrap_dead_wrappers

    from fastlora import ops_embedding
    from fastlora.autograd_embedding import (
        LoRAEmbeddingFunction,
        check_ids,
        fused_forward,
        is_transformed,
    )
    from fastlora.replay import replayed


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``y = weight[ids] + scaling * lora_A[:, ids]^T lora_B^T``, in one gather where kernels run.

    The options are those of `torch.nn.functional.embedding`, and as in loralib and PEFT they hold
    for both tables, weight and ``lora_A^T``: ``padding_idx`` gives no gradient to its column of
    lora_A; ``max_norm`` scales the rows of both that ids name, in place, before they are read;
    ``scale_grad_by_freq`` and ``sparse`` are about the gradient of lora_A (and of weight, where
    it needs one); a sparse one of lora_A is so in both dimensions. The gradient of lora_B comes
    from every id. Where the kernels cannot run, `fastlora.reference.lora_embedding` does, and
    `fastlora.explain_embedding` says why.

    Args:
        ids (Tensor): any shape, int32 or int64, from 0 to V - 1. A GPU stops on another id, as it
            does in torch.
        weight (Tensor): ``[V, N]``, the frozen table; bf16, fp16 or fp32 for the kernels.
        lora_A (Tensor): ``[R, V]``, in the dtype of weight or fp32; the product runs in the dtype
            of weight.
        lora_B (Tensor): ``[N, R]``, likewise.
        scaling (float | Tensor): ``lora_alpha / r``; a 0-dim tensor is read on the device, and gets
            no gradient. Default: 1.0.
        padding_idx (int | None): id without a gradient; negative ones count from V. Default: ``None``.
        max_norm (float | None): largest norm of a row. Default: ``None``.
        norm_type (float): the p of that norm. Default: 2.0.
        scale_grad_by_freq (bool): divide gradients by how often an id occurs. Default: ``False``.
        sparse (bool): make the gradient of lora_A a sparse tensor. Default: ``False``.

    Returns:
        Tensor: ``(*ids.shape, N)`` in the dtype of weight.

    Raises:
        TypeError: an argument is of another type than said.
        ValueError: shapes or devices do not fit, the rank is 0, or an option is out of range.
        IndexError: an id of a CPU tensor is outside the table.

    Example:
        >>> import torch, fastlora
        >>> ids, weight = torch.tensor([[3, 1], [0, 3]]), torch.randn(10, 16)
        >>> lora_A, lora_B = torch.randn(4, 10), torch.randn(16, 4)
        >>> fastlora.lora_embedding(ids, weight, lora_A, lora_B, scaling=0.5).shape
        torch.Size([2, 2, 16])
    """
    compiling = torch.compiler.is_compiling()
    if compiling:  # it would guard on the whole set
        signature, known = None, False
    else:
        signature = _signature(
            ids,
            weight,
            lora_A,
            lora_B,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
        )
        known = is_known_fused(signature)
    if known:
        check_scaling(scaling, weight.device)
        padding = None if padding_idx is None else padding_idx % weight.shape[0]
    else:
        _validate(ids, weight, lora_A, lora_B)
        check_scaling(scaling, weight.device)
        padding = _check_options(
            padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, weight.shape[0]
        )
        if embedding_problem_for(ids, weight, lora_A, lora_B):
            return reference.lora_embedding(
                ids, weight, lora_A, lora_B, scaling=scaling, padding_idx=padding,
                max_norm=max_norm, norm_type=norm_type, scale_grad_by_freq=scale_grad_by_freq,
                sparse=sparse,
            )  # fmt: skip
        remember_fused(signature)

    flat = (ids if ids.dim() == 1 else ids.reshape(-1)).contiguous()
    if not compiling:  # it reads them: compiled, the op does
        check_ids(flat, weight.shape[0])
    if max_norm is not None:
        reference.limit_norms(weight, flat, max_norm, norm_type)
        reference.limit_norms(lora_A.t(), flat, max_norm, norm_type)
    if compiling and not isinstance(scaling, Tensor):
        # As a number it would be a constant of the op, and every new value a recompilation.
        scaling = scaling * torch.ones((), dtype=torch.float32, device=weight.device)
    given = isinstance(scaling, Tensor)
    recorded = torch.is_grad_enabled()
    arguments = (
        flat, weight, lora_A, lora_B,
        scaling.detach() if isinstance(scaling, Tensor) else None,
        1.0 if given else float(scaling),
        recorded and lora_B.requires_grad,
        -1 if padding is None else padding, scale_grad_by_freq, sparse,
    )  # fmt: skip
    if compiling:
        y, _ = ops_embedding.lora_embedding(*arguments)
    elif recorded or is_transformed():
        y, _ = LoRAEmbeddingFunction.apply(*arguments)
    else:
        made = replayed(LoRAEmbeddingFunction, arguments)
        y, _ = made or fused_forward(*unwrap_dead_wrappers(arguments[:5]), *arguments[5:])
    return reference.shaped(y, ids.shape)


def _signature(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    padding_idx: object,
    max_norm: object,
    norm_type: object,
    scale_grad_by_freq: object,
    sparse: object,
) -> tuple[object, ...] | None:
    """All that the checks and the choice of a path look at; ``None`` where there is more to it."""
    if (
        is_forced()
        or max_norm is not None
        or type(norm_type) is not float
        or not (padding_idx is None or type(padding_idx) is int)
        or type(scale_grad_by_freq) is not bool
        or type(sparse) is not bool
    ):
        return None  # 1 is no flag, but equal to one
    try:
        return (
            type(ids), ids.shape, ids.dtype, ids.device,
            type(weight), weight.shape, weight.dtype, weight.device,
            type(lora_A), lora_A.shape, lora_A.dtype, lora_A.device,
            type(lora_B), lora_B.shape, lora_B.dtype, lora_B.device,
            padding_idx, scale_grad_by_freq, sparse,
        )  # fmt: skip
    except AttributeError:  # no tensor: the checks say so
        return None


def explain_embedding(ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Decision:
    """Which path `lora_embedding` takes for these arguments, and why.

    Args:
        ids (Tensor): any shape.
        weight (Tensor): ``[V, N]``.
        lora_A (Tensor): ``[R, V]``.
        lora_B (Tensor): ``[N, R]``.

    Returns:
        Decision: ``path`` is ``"fused"`` or ``"eager"``, ``reason`` says why.

    Raises:
        TypeError: as `lora_embedding`.
        ValueError: as `lora_embedding`.

    Example:
        >>> import torch, fastlora
        >>> t = torch.randn
        >>> fastlora.explain_embedding(torch.tensor([1]), t(10, 16), t(4, 10), t(16, 4)).path
        'eager'
    """
    _validate(ids, weight, lora_A, lora_B)
    return decide_embedding_for(ids, weight, lora_A, lora_B)


def _validate(ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    named = {"ids": ids, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        if name == "ids":
            if t.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"ids must be int32 or int64, got {t.dtype}")
            continue
        if not t.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {t.dtype}")
        if t.device != ids.device:
            raise ValueError(f"{name} must be on the device of ids, {ids.device}, got {t.device}")
        if t.dim() != 2:
            raise ValueError(f"{name} must be 2-D, got shape {tuple(t.shape)}")
    (V, N), R = weight.shape, lora_A.shape[0]
    expected = {
        "lora_A": ("(r, num_embeddings)", (R, V)),
        "lora_B": ("(embedding_dim, r)", (N, R)),
    }
    for name, (words, shape) in expected.items():
        if tuple(named[name].shape) != shape:
            raise ValueError(f"{name} must be {words}={shape}, got {tuple(named[name].shape)}")
    if R == 0:
        raise ValueError("lora_A must have a rank of at least 1, got shape (0, num_embeddings)")


def _check_options(
    padding_idx: object,
    max_norm: object,
    norm_type: object,
    scale_grad_by_freq: object,
    sparse: object,
    vocabulary: int,
) -> int | None:
    """Raise for options out of range; return ``padding_idx`` counted from 0."""
    for name, flag in (("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {flag!r}")
    if scale_grad_by_freq and sparse:
        raise ValueError("sparse must be False with scale_grad_by_freq, as in torch, got True")
    for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
        if name == "max_norm" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if padding_idx is None:
        return None
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx must be an int or None, got {padding_idx!r}")
    if not -vocabulary <= padding_idx < vocabulary:
        raise ValueError(
            f"padding_idx must be from {-vocabulary} to {vocabulary - 1}, got {padding_idx}"
        )
    return padding_idx % vocabulary
