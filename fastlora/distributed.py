"""Tensor parallel LoRA linears and data-parallel helpers, on ``torch.distributed``.

Imported by its own name, ``import fastlora.distributed``: ``import fastlora`` loads no part of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from fastlora.distributed_serving import place_in, shard_adapter, shard_linears
from fastlora.functional import lora_linear
from fastlora.modules import LoRALinear
from fastlora.reference import draw_seed

__all__ = ["ColwiseLoRA", "RowwiseLoRA", "average_gradients", "shard_adapter", "shard_linears"]

_MASK_64 = 0xFFFFFFFFFFFFFFFF


class _LoRAStyle(ParallelStyle):
    """What both styles share: the layouts, and the swap of one ``LoRALinear``'s class."""

    _layer_class: type[_ParallelLoRALinear]
    _sharded_size: str

    def __init__(
        self,
        *,
        input_layouts: Placement,
        output_layouts: Placement,
        use_local_output: bool,
    ) -> None:
        super().__init__()
        for name, layout in (("input_layouts", input_layouts), ("output_layouts", output_layouts)):
            if not isinstance(layout, Placement):
                raise TypeError(
                    f"{name} must be one Placement, such as Shard(1), got {type(layout).__name__}"
                )
            if layout.is_partial():
                raise ValueError(f"{name} must be Replicate() or Shard(dim), got {layout!r}")
        self.input_layouts = input_layouts
        self.output_layouts = output_layouts
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not LoRALinear:
            raise TypeError(
                f"{type(self).__name__} parallelizes a fastlora.LoRALinear, "
                f"got {type(module).__name__}"
            )
        if module.merged:
            raise ValueError(
                f"{type(self).__name__} needs a layer that is not merged; unmerge it first"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"{type(self).__name__} needs a 1-D device mesh, got {device_mesh.ndim} dimensions"
            )
        size = getattr(module, self._sharded_size)
        if size % device_mesh.size():
            raise ValueError(
                f"{self._sharded_size} must be divisible by the {device_mesh.size()} ranks of the "
                f"mesh, got {size}"
            )
        for name, placement in self._layer_class.placements.items():
            parameter = cast("nn.Parameter | None", getattr(module, name))
            if parameter is None:
                continue
            if isinstance(parameter, DTensor):
                raise TypeError(
                    f"{name} is a DTensor already; apply tensor parallelism before fully_shard"
                )
            # The first rank's values, as torch's own styles: adapters made with other seeds agree.
            sharded = distribute_tensor(parameter.detach(), device_mesh, (placement,))
            module.register_parameter(
                name, nn.Parameter(sharded, requires_grad=parameter.requires_grad)
            )
        module.__class__ = self._layer_class
        layer = cast(_ParallelLoRALinear, module)
        layer.input_layout = self.input_layouts
        layer.output_layout = self.output_layouts
        layer.use_local_output = self.use_local_output
        return layer

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, "
            f"output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )


class _ParallelLoRALinear(LoRALinear):
    """A LoRALinear whose parameters are DTensors on the tensor parallel mesh."""

    placements: ClassVar[dict[str, Placement]]
    input_layout: Placement
    output_layout: Placement
    use_local_output: bool

    def _mesh(self) -> DeviceMesh:
        return cast(DTensor, self.weight).device_mesh

    def _input(self, x: Tensor, layout: Placement) -> DTensor:
        """Take x as the caller lays it out; give it as the layer needs it."""
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self._mesh(), (self.input_layout,), run_check=False)
        return x.redistribute(placements=(layout,))

    def _output(self, y: Tensor, layout: Placement) -> Tensor:
        y = DTensor.from_local(y, self._mesh(), (layout,), run_check=False)
        return y.redistribute(placements=(self.output_layout,))

    def _finish(self, y: Tensor) -> Tensor:
        return cast(DTensor, y).to_local() if self.use_local_output else y

    def _seed(self, x: Tensor) -> Tensor | None:
        active = self.training and self.lora_dropout > 0
        return draw_seed(x.device) if active else None

    def _local(
        self, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, seed: Tensor | None
    ) -> Tensor:
        return lora_linear(
            # A collective that nobody has waited for comes as a tensor subclass: a copy waits.
            x if type(x) is Tensor else x.clone(),
            cast(DTensor, self.weight).to_local(),
            lora_A,
            lora_B,
            bias=bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
            seed=seed,
        )


class ColwiseLoRALinear(_ParallelLoRALinear):
    """A LoRA linear that holds ``out_features / ranks`` rows of the weight; see ``ColwiseLoRA``."""

    placements: ClassVar[dict[str, Placement]] = {
        "weight": Shard(0),
        "bias": Shard(0),
        "lora_A": Replicate(),
        "lora_B": Shard(0),
    }

    def forward(self, x: Tensor) -> Tensor:
        """Compute this rank's out_features."""
        # dx is a sum over ranks: its reduction is the one collective of the layer's backward.
        x = self._input(x, Replicate()).to_local(grad_placements=(Partial(),))
        bias = None if self.bias is None else cast(DTensor, self.bias).to_local()
        y = self._local(
            x, _summed(self.lora_A), cast(DTensor, self.lora_B).to_local(), bias, self._seed(x)
        )
        if self.use_local_output and self.output_layout in (Shard(-1), Shard(y.dim() - 1)):
            return y
        return self._finish(self._output(y, Shard(-1)))


class RowwiseLoRALinear(_ParallelLoRALinear):
    """A LoRA linear that holds ``in_features / ranks`` columns of the weight; see ``RowwiseLoRA``."""

    placements: ClassVar[dict[str, Placement]] = {
        "weight": Shard(1),
        "bias": Replicate(),
        "lora_A": Shard(1),
        "lora_B": Replicate(),
    }

    def forward(self, x: Tensor) -> Tensor:
        """Compute this rank's part of the sum over in_features, and reduce it."""
        x = self._input(x, Shard(-1)).to_local()
        seed = self._seed(x)
        if seed is not None:
            seed = seed ^ _rank_salt(self._mesh().get_local_rank())
        a = cast(DTensor, self.lora_A).to_local()
        y = self._output(self._local(x, a, _summed(self.lora_B), None, seed), Partial())
        if self.bias is not None:
            # After the reduction, so that it is added once.
            bias = cast(DTensor, self.bias).redistribute(placements=(Replicate(),))
            y = y + bias.to(y.dtype)  # under autocast y is not in the bias's dtype
        return self._finish(y)


class ColwiseLoRA(_LoRAStyle):
    """Column-parallel ``LoRALinear``, in a plan of ``torch.distributed.tensor.parallel``.

    Rank i computes its slice of out_features, ``y_i = x W_i^T + b_i + scaling * dropout(x) A^T B_i^T``,
    through ``fastlora.lora_linear`` on its local tensors. ``weight``, ``bias`` and ``lora_B`` are
    sharded on dimension 0, ``lora_A`` is replicated. Backward sums dx and ``lora_A``'s gradient over
    the ranks; nothing is communicated in forward. Values come from the first rank of the mesh.

    Dropout: each rank draws its seed from its own generator of x's device. Ranks seeded alike drop
    the same elements of x, as one process would; otherwise each slice of out_features has a mask
    of its own. Gradients are those of what was computed either way.

    Args:
        input_layouts: How x comes: ``Replicate()``, or e.g. ``Shard(1)`` for a sharded sequence.
        output_layouts: How y leaves. Default: sharded on the last dimension.
        use_local_output: Give a plain tensor, the local part of y, and no DTensor.

    Raises:
        TypeError: A layout is no Placement, or the module is not exactly a ``LoRALinear``.
        ValueError: A layout is partial, the mesh is not 1-D, or its size does not divide
            ``out_features``.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from fastlora.distributed import ColwiseLoRA, RowwiseLoRA
        >>> def parallelize(model):  # on every rank, after fastlora.inject
        ...     mesh = init_device_mesh("cuda", (2,))
        ...     plan = {"mlp.up_proj": ColwiseLoRA(), "mlp.down_proj": RowwiseLoRA()}
        ...     return parallelize_module(model, mesh, plan)
    """

    _layer_class = ColwiseLoRALinear
    _sharded_size = "out_features"

    def __init__(
        self,
        *,
        input_layouts: Placement = Replicate(),  # noqa: B008  # immutable
        output_layouts: Placement = Shard(-1),  # noqa: B008
        use_local_output: bool = True,
    ) -> None:
        super().__init__(
            input_layouts=input_layouts,
            output_layouts=output_layouts,
            use_local_output=use_local_output,
        )


class RowwiseLoRA(_LoRAStyle):
    """Row-parallel ``LoRALinear``, in a plan of ``torch.distributed.tensor.parallel``.

    Rank i holds a slice of in_features and computes ``x_i W_i^T + scaling * dropout(x_i) A_i^T B^T``
    through ``fastlora.lora_linear``; one all-reduce sums base and adapter together, and the bias is
    added after it. ``weight`` and ``lora_A`` are sharded on dimension 1, ``lora_B`` and ``bias`` are
    replicated. Backward sums ``lora_B``'s gradient over the ranks.

    Dropout: rank i mixes its number into the seed, so that slices of in_features have independent
    masks even where the ranks are seeded alike. The masks are distributed as in one process, but
    are not the same masks.

    Args:
        input_layouts: How x comes. Default: sharded on the last dimension, as ``ColwiseLoRA``
            leaves it.
        output_layouts: How y leaves: ``Replicate()``, or e.g. ``Shard(1)`` for a sharded sequence,
            which turns the all-reduce into a reduce-scatter.
        use_local_output: Give a plain tensor, the local part of y, and no DTensor.

    Raises:
        TypeError: A layout is no Placement, or the module is not exactly a ``LoRALinear``.
        ValueError: A layout is partial, the mesh is not 1-D, or its size does not divide
            ``in_features``.
    """

    _layer_class = RowwiseLoRALinear
    _sharded_size = "in_features"

    def __init__(
        self,
        *,
        input_layouts: Placement = Shard(-1),  # noqa: B008  # immutable
        output_layouts: Placement = Replicate(),  # noqa: B008
        use_local_output: bool = True,
    ) -> None:
        super().__init__(
            input_layouts=input_layouts,
            output_layouts=output_layouts,
            use_local_output=use_local_output,
        )


def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Average plain gradients over the ranks, in one all-reduce for each dtype.

    For adapters that ``fully_shard(..., ignored_params=...)`` leaves replicated: FSDP2 does not
    reduce their gradients. Call it on every rank between backward and the optimizer's step. A
    parameter that got no gradient here counts as zero, since it may have one on another rank.

    Args:
        parameters: The parameters, in the same order on every rank; those that do not require
            grad are passed over.
        group: The data-parallel ranks. Default: all.

    Raises:
        TypeError: A parameter is a DTensor, whose gradient its owner reduces, or its gradient is sparse.
        ValueError: This rank is not in the group.
    """
    _, ranks = place_in(group)
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor):
            raise TypeError(
                "parameters must be plain tensors; a DTensor's gradient is reduced by FSDP2 or by "
                "the tensor parallel style"
            )
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad.layout is not torch.strided:
            raise TypeError(f"gradients must be dense to be averaged, got {parameter.grad.layout}")
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter.grad)
    for grads in kinds.values():
        flat = torch.cat([grad.reshape(-1) for grad in grads]).div_(ranks)
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat, [grad.numel() for grad in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))


def full_value(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, gathered from its mesh; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_sharded(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, which every rank holds whole, laid out as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _summed(parameter: Tensor) -> Tensor:
    """A replicated parameter's local tensor, each rank of which gets a part of the gradient.

    The redistribution is none in forward. In backward it turns the partial gradient into the
    replicated sum, so that optimizers meet a gradient laid out as the parameter.
    """
    whole = cast(DTensor, parameter).redistribute(placements=(Replicate(),))
    return whole.to_local(grad_placements=(Partial(),))


def _rank_salt(rank: int) -> int:
    """A 64-bit constant for each rank (SplitMix64), as a signed int; rank 0 has 0."""
    z = rank * 0x9E3779B97F4A7C15 & _MASK_64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK_64
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z
