"""The eager twin of every op: specification, oracle of the tests, fallback and baseline.

Everything here is plain PyTorch and differentiable by autograd. Arithmetic is fp32 inside (fp64 for
fp64 inputs) and rounded once, to the dtype of ``x``; on a GPU that the kernels do not know, products of
linears but DoRA's are made in the dtype of ``x``, as eager LoRA does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.adapter_products import adapter_products
from fastlora.dropout_mask import draw_seed as draw_seed
from fastlora.dropout_mask import dropout_keep_mask as dropout_keep_mask
from fastlora.kernels.config import keep_scale

MERGE_BLOCK = 1 << 24  # elements that `lora_merge` holds in fp32 at a time


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def autocast_available(device_type: str) -> bool:
    """`torch.amp.is_autocast_available`, which torch.compile cannot trace before torch 2.9 or so."""
    return torch.amp.is_autocast_available(device_type)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A block without autocast, on a device that may not know it."""
    if not autocast_available(device_type):
        return contextlib.nullcontext()  # e.g. meta tensors
    return torch.autocast(device_type=device_type, enabled=False)


def _products_dtype(x: Tensor, compute: torch.dtype | None) -> torch.dtype:
    """What a twin computes in: as asked, else fp32, and of fp64 x fp64."""
    return compute or (torch.float64 if x.dtype == torch.float64 else torch.float32)


def in_place_of_kernels(x: Tensor) -> torch.dtype | None:
    """``compute`` of a twin that runs since kernels cannot: fp32 products take a GPU many times as long."""
    return None if x.device.type == "cpu" else x.dtype


def rows_of(x: Tensor) -> Tensor:
    """``(..., K)`` as ``[M, K]``."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def shaped(y: Tensor, leading: Sequence[int]) -> Tensor:
    """Rows ``[M, N]`` as ``(*leading, N)``; no view to autograd, for it may be changed in place."""
    if len(leading) == 1:
        return y
    made: Tensor = torch.ops.aten._unsafe_view.default(y, [*leading, y.shape[1]])
    return made


def _drop(x: Tensor, p: float, seed: Tensor | int | None) -> Tensor:
    """``dropout(x)`` of a 2-D x, with the kernels' mask."""
    if p <= 0:
        return x
    seed = draw_seed(x.device) if seed is None else seed
    keep = dropout_keep_mask(seed, x.shape[0], x.shape[1], p, x.device)
    # where, not a product: a NaN or Inf that is dropped must not come back as NaN.
    return torch.where(keep, x * keep_scale(p), 0.0)


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
    seed: Tensor | int | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``y = x W0^T + bias + scaling * dropout(x) A^T B^T``, eagerly: the twin of `fastlora.lora_linear`.

    Args:
        x (Tensor): ``(..., K)``.
        weight (Tensor): ``[N, K]``.
        lora_A (Tensor): ``[R, K]``.
        lora_B (Tensor): ``[N, R]``.
        bias (Tensor | None): ``[N]``. Default: ``None``.
        scaling (float | Tensor): factor of the LoRA branch. Default: 1.0.
        dropout_p (float): dropout on x, LoRA branch only. Default: 0.0.
        training (bool): whether dropout is active. Default: ``True``.
        seed (Tensor | int | None): seed of the mask; drawn from torch's generator when ``None``.
        compute (torch.dtype | None): what its products are made in. Default: ``None``, fp32, or fp64 as x.

    Returns:
        Tensor: ``(..., N)`` in the dtype of ``x``.
    """
    K = weight.shape[1]
    compute = _products_dtype(x, compute)
    with no_autocast(x.device.type):
        x_c = x.reshape(x.shape[:-1].numel(), K).to(compute)
        dropped = _drop(x_c, dropout_p if training else 0.0, seed)
        s = scaling * (dropped @ lora_A.to(compute).t())
        y = x_c @ weight.to(compute).t() + s @ lora_B.to(compute).t()
        if bias is not None:
            y = y + bias.to(compute)
    return shaped(y.to(x.dtype), x.shape[:-1])


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
    seed: Tensor | int | None = None,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """``y_i = x W_i^T + bias_i + scaling_i * dropout(x) A_i^T B_i^T``: `fastlora.lora_linear_group`.

    Args:
        x (Tensor): ``(..., K)``.
        weights (Sequence[Tensor]): ``[N_i, K]`` each.
        lora_As (Sequence[Tensor]): ``[R_i, K]`` each.
        lora_Bs (Sequence[Tensor]): ``[N_i, R_i]`` each.
        biases (Sequence[Tensor | None] | None): ``[N_i]`` each. Default: ``None``.
        scaling (float | Tensor | Sequence[float | Tensor]): one for all or one for each. Default: 1.0.
        dropout_p (float): dropout on x, LoRA branches only, one mask for all. Default: 0.0.
        training (bool): whether dropout is active. Default: ``True``.
        seed (Tensor | int | None): seed of the mask; drawn from torch's generator when ``None``.
        compute (torch.dtype | None): as `lora_linear`. Default: ``None``.

    Returns:
        tuple[Tensor, ...]: ``(..., N_i)`` for each, in the dtype of x.
    """
    if dropout_p > 0 and training and seed is None:
        seed = draw_seed(x.device)
    n = len(weights)
    scalings = scaling if isinstance(scaling, (list, tuple)) else [scaling] * n
    options: dict[str, Any] = {
        "dropout_p": dropout_p, "training": training, "seed": seed, "compute": compute
    }  # fmt: skip
    return tuple(
        lora_linear(x, w, a, b, bias=bias, scaling=factor, **options)
        for w, a, b, bias, factor in zip(
            weights, lora_As, lora_Bs, biases or [None] * n, scalings, strict=True
        )
    )


def lora_linear_multi(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    *,
    scaling: Tensor | float = 1.0,
    ranks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``y[m] = x[m] W0^T + bias + scaling[l] * dropout(x[m]) A[l]^T B[l]^T``, ``l = adapter_ids[m]``.

    The twin of `fastlora.lora_linear_multi` on flat rows. It goes through the adapters that occur one by
    one, for which it reads the ids back: on a GPU that is a sync.

    Args:
        x (Tensor): ``[M, K]``.
        weight (Tensor): ``[N, K]``.
        lora_A (Tensor): ``[L, R, K]``.
        lora_B (Tensor): ``[L, N, R]``.
        adapter_ids (Tensor): integer ``[M]``, -1 for the frozen layer alone.
        scaling (Tensor | float): ``[L]`` or one number. Default: 1.0.
        ranks (Tensor | None): integer ``[L]``; what lies past a rank is ignored. Default: ``None``, all R.
        bias (Tensor | None): ``[N]``. Default: ``None``.
        dropout_p (float): dropout on x, LoRA branch only. Default: 0.0.
        training (bool): whether dropout is active. Default: ``True``.
        seed (Tensor | int | None): seed of the mask; drawn from torch's generator when ``None``.
        compute (torch.dtype | None): what its products are made in. Default: ``None``, fp32, or fp64 as x.

    Returns:
        Tensor: ``[M, N]`` in the dtype of ``x``.
    """
    compute = _products_dtype(x, compute)
    with no_autocast(x.device.type):
        x_c = x.to(compute)
        dropped = _drop(x_c, dropout_p if training else 0.0, seed)
        y = x_c @ weight.to(compute).t()
        y = y + adapter_products(dropped, lora_A, lora_B, adapter_ids, scaling, ranks)
        if bias is not None:
            y = y + bias.to(compute)
    return y.to(x.dtype)


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
    seed: Tensor | int | None = None,
) -> Tensor:
    """``y = x W0^T + bias + (g - 1) * xd W0^T + g * scaling * xd A^T B^T``: `fastlora.dora_linear`.

    ``xd = dropout(x)`` and ``g = magnitude / |W0 + scaling * B A|``, rows' norms without a gradient.

    Args:
        x (Tensor): ``(..., K)``.
        weight (Tensor): ``[N, K]``.
        lora_A (Tensor): ``[R, K]``.
        lora_B (Tensor): ``[N, R]``.
        magnitude (Tensor): ``[N]``.
        bias (Tensor | None): ``[N]``. Default: ``None``.
        scaling (float | Tensor): factor of the LoRA branch. Default: 1.0.
        dropout_p (float): dropout on x. Default: 0.0.
        training (bool): whether dropout is active. Default: ``True``.
        seed (Tensor | int | None): seed of the mask; drawn from torch's generator when ``None``.

    Returns:
        Tensor: ``(..., N)`` in the dtype of ``x``.
    """
    K = weight.shape[1]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    with no_autocast(x.device.type):
        x_c = x.reshape(x.shape[:-1].numel(), K).to(compute)
        dropped = _drop(x_c, dropout_p if training else 0.0, seed)
        w, a, b = weight.to(compute), lora_A.to(compute), lora_B.to(compute)
        g = magnitude.to(compute) / torch.linalg.norm(w + scaling * b @ a, dim=1).detach()
        y: Tensor = x_c @ w.t() + (g - 1) * (dropped @ w.t())
        y = y + g * (scaling * (dropped @ a.t()) @ b.t())
        if bias is not None:
            y = y + bias.to(compute)
    return shaped(y.to(x.dtype), x.shape[:-1])


def lora_merged_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    slices: Sequence[tuple[int, int]],
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``x W0^T + bias``, plus ``scaling * dropout(x) A_g^T B_g^T`` on the columns of slice g, eagerly.

    Args:
        x (Tensor): ``(..., K)``.
        weight (Tensor): ``[N, K]``.
        lora_A (Tensor): ``[G R, K]``, the A of each of the G slices, one below the other.
        lora_B (Tensor): ``[sum of their widths, R]``, likewise.
        slices (Sequence[tuple[int, int]]): first and last column of each slice, in order; ``last`` is
            not in it.
        bias (Tensor | None): ``[N]``. Default: ``None``.
        scaling (float | Tensor): factor of the LoRA branches. Default: 1.0.
        dropout_p (float): dropout on x, LoRA branches only, one mask for all. Default: 0.0.
        training (bool): whether dropout is active. Default: ``True``.
        seed (Tensor | int | None): seed of the mask; drawn from torch's generator when ``None``.
        compute (torch.dtype | None): what its products are made in. Default: ``None``, fp32, or fp64 as x.

    Returns:
        Tensor: ``(..., N)`` in the dtype of ``x``.
    """
    K = weight.shape[1]
    compute = _products_dtype(x, compute)
    with no_autocast(x.device.type):
        x_c = x.reshape(x.shape[:-1].numel(), K).to(compute)
        dropped = _drop(x_c, dropout_p if training else 0.0, seed)
        s = scaling * (dropped @ lora_A.to(compute).t())
        y = x_c @ weight.to(compute).t()
        parts, end = [], 0
        rows = torch.split(lora_B.to(compute), [last - first for first, last in slices])
        for s_g, b_g, (first, last) in zip(
            torch.split(s, lora_B.shape[1], 1), rows, slices, strict=True
        ):
            parts += [y[:, end:first], y[:, first:last] + s_g @ b_g.t()]
            end = last
        y = torch.cat([*parts, y[:, end:]], 1)
        if bias is not None:
            y = y + bias.to(compute)
    return shaped(y.to(x.dtype), x.shape[:-1])


def lora_merge(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, out: Tensor
) -> Tensor:
    """``out = weight + scaling * lora_B lora_A``, eagerly: the twin of the kernel `lora_merge`.

    It goes down the rows in blocks, so that no fp32 copy of a whole weight is made.

    Args:
        weight (Tensor): ``[N, K]``.
        lora_A (Tensor): ``[R, K]``.
        lora_B (Tensor): ``[N, R]``.
        scaling (float): factor of the product.
        out (Tensor): ``[N, K]`` in the dtype of weight; it may be weight itself.

    Returns:
        Tensor: ``out``.
    """
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = max(1, MERGE_BLOCK // max(1, weight.shape[1]))
    with no_autocast(weight.device.type):
        a, b = lora_A.to(compute), lora_B.to(compute)
        for start in range(0, weight.shape[0], rows):
            block = slice(start, start + rows)
            out[block] = weight[block].to(compute) + scaling * (b[block] @ a)
    return out


def limit_norms(table: Tensor, ids: Tensor, max_norm: float, norm_type: float) -> None:
    """Scale the rows of ``table`` that ``ids`` name down to ``max_norm``, in place, as F.embedding does.

    Args:
        table (Tensor): ``[V, N]``, any strides.
        ids (Tensor): any shape.
        max_norm (float): largest norm of a row.
        norm_type (float): the p of that norm.
    """
    with torch.no_grad():
        torch.embedding_renorm_(table.detach(), ids.contiguous(), max_norm, norm_type)


def sparse_columns(grad: Tensor, ids: Tensor, V: int, padding_idx: int | None) -> Tensor:
    """The gradient of a table ``[R, V]`` of which the columns ``ids`` were read, as a sparse tensor.

    Both dimensions are sparse: COO keeps its sparse dimensions first, so that a dense R would have to
    come second. (torch cannot transpose what ``F.embedding(ids, lora_A.t(), sparse=True)`` gives, and
    so in loralib and PEFT it has no backward.)

    Args:
        grad (Tensor): ``[M, R]``.
        ids (Tensor): ``[M]``.
        V (int): columns of the table.
        padding_idx (int | None): id whose values are zero.

    Returns:
        Tensor: COO ``[R, V]`` with M R values, not coalesced.
    """
    M, R = grad.shape
    if padding_idx is not None:
        grad = torch.where((ids == padding_idx)[:, None], 0, grad)
    rows = torch.arange(R, device=ids.device).repeat(M)
    columns = ids.long().repeat_interleave(R, output_size=M * R)
    return torch.sparse_coo_tensor(
        torch.stack((rows, columns)), grad.reshape(-1), (R, V), check_invariants=False
    )


class _SparseColumns(torch.autograd.Function):
    """``table[:, ids]^T``, whose gradient is sparse."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.V, ctx.padding_idx = table.shape[1], padding_idx
        return F.embedding(ids, table.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return (
            sparse_columns(
                grad.reshape(-1, grad.shape[-1]), ids.reshape(-1), ctx.V, ctx.padding_idx
            ),
            None,
            None,
        )


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
    """``weight[ids] + scaling * lora_A[:, ids]^T lora_B^T``, eagerly: twin of `fastlora.lora_embedding`.

    Args:
        ids (Tensor): any shape, int32 or int64.
        weight (Tensor): ``[V, N]``.
        lora_A (Tensor): ``[R, V]``.
        lora_B (Tensor): ``[N, R]``.
        scaling (float | Tensor): factor of the LoRA branch. Default: 1.0.
        padding_idx (int | None): id without a gradient. Default: ``None``.
        max_norm (float | None): largest norm of the rows of weight and ``lora_A^T``. Default: ``None``.
        norm_type (float): the p of that norm. Default: 2.0.
        scale_grad_by_freq (bool): divide gradients by how often an id occurs. Default: ``False``.
        sparse (bool): sparse gradients of lora_A and weight. Default: ``False``.

    Returns:
        Tensor: ``(*ids.shape, N)`` in the dtype of weight.
    """
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if max_norm is not None:
        limit_norms(weight, ids, max_norm, norm_type)
        limit_norms(lora_A.t(), ids, max_norm, norm_type)

    options = {"scale_grad_by_freq": scale_grad_by_freq}
    with no_autocast(weight.device.type):
        if sparse:
            columns = _SparseColumns.apply(  # type: ignore[no-untyped-call]
                lora_A, ids, padding_idx
            ).to(compute)
        else:  # cast before it is gathered, so that the gradient of lora_A is summed in fp32
            columns = F.embedding(ids, lora_A.to(compute).t(), padding_idx, **options)
        rows = F.embedding(ids, weight, padding_idx, sparse=sparse, **options).to(compute)
        y: Tensor = rows + scaling * columns @ lora_B.to(compute).t()
    return y.to(weight.dtype)


def lora_conv_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
) -> Tensor:
    """``weight + scaling * lora_B lora_A``, the product viewed as a convolution's kernel.

    Args:
        weight (Tensor): ``[out, in / groups, *kernel]``.
        lora_A (Tensor): ``[r k, columns]``.
        lora_B (Tensor): ``[rows, r k]``; rows times columns is the size of weight.
        scaling (float | Tensor): factor of the product.

    Returns:
        Tensor: shape and dtype of weight.
    """
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with no_autocast(weight.device.type):
        product = lora_B.to(compute) @ lora_A.to(compute)
        updated = weight.to(compute) + scaling * product.view(weight.shape)
    return updated.to(weight.dtype)
