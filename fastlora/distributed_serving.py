"""Mixed-adapter serving with tensor parallelism: a model's linears and adapters, cut over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastlora.adapter_config import PARTS
from fastlora.injection import matching_targets
from fastlora.modules import base_problem

_Model = TypeVar("_Model", bound=nn.Module)
_CUT = "_fastlora_cut"


def shard_linears(
    model: _Model,
    colwise: Iterable[str],
    rowwise: Iterable[str],
    group: dist.ProcessGroup | None = None,
) -> _Model:
    """Cut a model's frozen linears over the ranks, in place, to serve mixed adapters.

    The linears stay ``torch.nn.Linear`` with this rank's slice as a plain weight, which an
    `fastlora.AdapterBank` and `fastlora.serve` take as any other. A column-parallel one holds rows of
    the weight and of the bias, and gives its slice of out_features. A row-parallel one holds columns of
    the weight and takes the slice of in_features; one all-reduce after it sums the frozen part and the
    adapter's part over the ranks, and its bias is on the first rank alone. Call it on every rank, with
    equal weights, before the bank is made. What the model does with the slices, such as attention
    over its heads, must fit them: cut q, k and v where the ranks divide the key/value heads.

    Args:
        model (nn.Module): what `fastlora.serve` takes. The linears that are cut get frozen.
        colwise (Iterable[str]): names of column-parallel linears, as `fastlora.inject` takes them; may
            be empty.
        rowwise (Iterable[str]): names of row-parallel linears, likewise.
        group (dist.ProcessGroup | None): the tensor parallel ranks. Default: ``None``, all.

    Returns:
        nn.Module: ``model``.

    Raises:
        RuntimeError: later, in forward: a row-parallel output needs a gradient.
        TypeError: names are no strings, or a linear is no plain ``torch.nn.Linear``.
        ValueError: a name matches no linear, both kinds match one, or the ranks do not divide it. The
            model is then as it was.

    Example:
        >>> from fastlora.distributed import shard_adapter, shard_linears
        >>> def serve(model, adapters):  # on every rank; adapters: PEFT's tensors by name
        ...     names = (("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj"))
        ...     shard_linears(model, *names)
        ...     bank = fastlora.AdapterBank(model, slots=8, max_rank=16)
        ...     for name, tensors in adapters.items():
        ...         bank.add(name, shard_adapter(tensors, *names), config={"lora_alpha": 32})
        ...     return fastlora.serve(model, bank)
    """
    plan = _Plan(colwise, rowwise, group)
    slices: list[tuple[nn.Linear, bool, Tensor, Tensor | None]] = []
    found: set[str] = set()
    for name, module in model.named_modules():
        rows = plan.cuts_rows(name)
        if rows is None or not isinstance(module, nn.Linear):
            continue
        problem = base_problem(module)
        if type(module) is not nn.Linear or isinstance(module.weight, DTensor) or problem:
            reason = problem or f"got a {type(module).__name__} of {type(module.weight).__name__}"
            raise TypeError(f"{name} must be a plain torch.nn.Linear: {reason}")
        if getattr(module, _CUT, False):
            raise ValueError(f"{name} has been cut by shard_linears already")
        found |= matching_targets(plan.names, name)
        bias: Tensor | None = module.bias
        if bias is not None:
            # Of a row-parallel layer the all-reduce sums it: one rank adds it.
            bias = plan.cut(bias, 0, name) if rows else bias.detach() * (plan.rank == 0)
        slices.append((module, rows, plan.cut(module.weight, 0 if rows else 1, name), bias))
    missing = [name for name in plan.names if name not in found]
    if missing:
        raise ValueError(f"colwise and rowwise must name linears of the model, {missing} do not")
    for linear, rows, weight, bias in slices:
        setattr(linear, _CUT, True)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        linear.out_features, linear.in_features = weight.shape
        if not rows:
            linear.register_forward_hook(_all_reducer(group))
    return model


def shard_adapter(
    tensors: Mapping[str, Tensor],
    colwise: Iterable[str],
    rowwise: Iterable[str],
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """This rank's slices of an adapter, for the bank of a model that `shard_linears` has cut.

    ``lora_B`` of a column-parallel linear is cut along out_features, ``lora_A`` of a row-parallel one
    along in_features. Everything else is the same on every rank, and so are ranks and scalings.

    Args:
        tensors (Mapping[str, Tensor]): a whole adapter, named as `fastlora.AdapterBank.add` takes it,
            e.g. read from ``adapter_model.safetensors``.
        colwise (Iterable[str]): as given to `shard_linears`.
        rowwise (Iterable[str]): likewise.
        group (dist.ProcessGroup | None): likewise. Default: ``None``, all ranks.

    Returns:
        dict[str, Tensor]: tensors by the same names, contiguous.

    Raises:
        TypeError: names are no strings, or a value is no tensor.
        ValueError: a tensor is neither a ``lora_A`` nor a ``lora_B``, is no matrix, or the ranks do not
            divide it.

    Example:
        >>> import torch
        >>> from fastlora.distributed import shard_adapter
        >>> def mine():  # on one of two ranks
        ...     tensors = {"up.lora_A": torch.randn(4, 64), "up.lora_B": torch.randn(32, 4)}
        ...     return shard_adapter(tensors, ["up"], [])["up.lora_B"].shape  # (16, 4)
    """
    plan = _Plan(colwise, rowwise, group)
    local: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.removesuffix(".weight").rpartition(".")
        if not layer or part not in PARTS:
            raise ValueError(f"tensors must be lora_A and lora_B of linears, got {key!r}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{key} must be a Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2:
            raise ValueError(f"{key} must be a matrix, got {tuple(tensor.shape)}")
        rows = plan.cuts_rows(layer)
        cut = rows is not None and part == ("lora_B" if rows else "lora_A")
        local[key] = plan.cut(tensor, 0 if rows else 1, key) if cut else tensor.contiguous()
    return local


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank's number in the group, and how many ranks that has.

    Raises:
        ValueError: This rank is not in it.
    """
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group must have this rank as a member")
    return rank, dist.get_world_size(group)


class _Plan:
    """Which linears are cut which way, and this rank's place among the ranks."""

    def __init__(
        self, colwise: Iterable[str], rowwise: Iterable[str], group: dist.ProcessGroup | None
    ) -> None:
        self.colwise = _checked_names("colwise", colwise)
        self.rowwise = _checked_names("rowwise", rowwise)
        self.names = self.colwise + self.rowwise
        self.rank, self.ranks = place_in(group)

    def cuts_rows(self, name: str) -> bool | None:
        """True for a column-parallel linear, whose weight is cut by rows; None for one that stays whole."""
        colwise = bool(matching_targets(self.colwise, name))
        rowwise = bool(matching_targets(self.rowwise, name))
        if colwise and rowwise:
            raise ValueError(f"colwise and rowwise must not share a linear, both name {name}")
        return colwise if colwise or rowwise else None

    def cut(self, tensor: Tensor, dim: int, name: str) -> Tensor:
        """This rank's slice, in memory of its own."""
        size = tensor.shape[dim]
        if size % self.ranks:
            raise ValueError(
                f"dimension {dim} of {name} must be divisible by the {self.ranks} ranks, got {size}"
            )
        size //= self.ranks
        return (
            tensor.detach()
            .narrow(dim, self.rank * size, size)
            .clone(memory_format=torch.contiguous_format)
        )


def _checked_names(argument: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{argument} must be an iterable of names, got {names!r}")
    names = tuple(names)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{argument} must hold non-empty names, got {name!r}")
    return names


def _all_reducer(group: dist.ProcessGroup | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook that sums the output of a row-parallel linear over the ranks, in place."""

    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        if y.requires_grad:
            raise RuntimeError(
                "a linear cut by shard_linears serves only: use torch.no_grad(), or RowwiseLoRA to train"
            )
        dist.all_reduce(y, group=group)
        return y

    return hook
