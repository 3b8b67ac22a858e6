"""The device memory of an `fastlora.AdapterBank`: slots of every layer, and what is ordered after what."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastlora.adapter_source import HostAdapter
from fastlora.adapters import AdapterStack
from fastlora.injection import check_targets, matching_targets
from fastlora.modules import base_problem

_ALIGNED = 4  # elements: rows of the tables keep an alignment of 16 bytes, as the kernels like it


def frozen_weight(model: nn.Module, name: str) -> Tensor | str:
    """The weight ``[N, K]`` of a linear that a bank can serve, or why it cannot.

    Args:
        model: The model.
        name: Of one of its modules; ``torch.nn.Linear`` itself or transformers' ``Conv1D`` can be served, a
            subclass not.

    Returns:
        Tensor | str: The weight, or a transposed view of it; or the reason.
    """
    module = model.get_submodule(name)
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
        return "torch.nn.TransformerEncoderLayer reads its weight past its forward"
    if isinstance(module, nn.Linear):
        problem = base_problem(module)
        if problem is not None:
            return str(problem)
        if type(module) is not nn.Linear:
            return f"it is a {type(module).__name__}, a subclass of Linear"
        return module.weight
    weight = getattr(module, "weight", None) if _is_conv1d(module) else None
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return (
            "it must be a torch.nn.Linear or Conv1D of transformers with float weights, "
            f"got {type(module).__name__}"
        )
    return (
        "its forward was replaced, by hooks or serve" if "forward" in vars(module) else weight.t()
    )


def _is_conv1d(module: nn.Module) -> bool:
    """Without an import of transformers."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def servable_layers(
    model: nn.Module, target_modules: str | Iterable[str] | None
) -> dict[str, Tensor]:
    """The frozen weights ``[N, K]`` of the linears that the targets name.

    Args:
        model: The model.
        target_modules: As `fastlora.inject` takes them; None is every linear but the output embedding.

    Returns:
        dict: Weights by the module's name.

    Raises:
        TypeError: ``target_modules`` is neither names nor a regular expression.
        ValueError: No linear is named, or one that is named cannot be served.
    """
    targets = None if target_modules is None else check_targets(target_modules)
    output_embeddings = getattr(model, "get_output_embeddings", None)
    head = output_embeddings() if callable(output_embeddings) else None
    layers: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if targets is None:
            wanted = name != "" and module is not head
        else:
            wanted = bool(matching_targets(targets, name))
        if not wanted:
            continue
        weight = frozen_weight(model, name)
        if isinstance(weight, Tensor):
            layers[name] = weight
        elif targets is not None and (isinstance(module, nn.Linear) or _is_conv1d(module)):
            raise ValueError(f"{name} cannot be served: {weight}")
    if not layers:
        raise ValueError(f"target_modules={target_modules!r} names no linear of the model")
    return layers


class LoadCancelled(RuntimeError):
    """A load was cancelled; the slot is empty and the bank consistent."""


class Pool:
    """Slots of every layer at fixed addresses, written on a side stream where there is one.

    Args:
        layers: ``(out_features, in_features)`` by name.
        slots: Number of slots.
        max_rank: Rank that a slot has room for.
        dtype: dtype of the matrices.
        device: Where they lie.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[int, int]],
        slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.device = device
        self.stacks: dict[str, AdapterStack] = {}
        padded = -(-slots // _ALIGNED) * _ALIGNED
        with torch.inference_mode(False):  # an inference tensor takes no later in-place write
            table = torch.zeros(len(layers), padded, device=device)
            self._scaling = table[:, :slots]
            self._ranks = torch.zeros_like(table, dtype=torch.int32)[:, :slots]
            for i, (name, (N, K)) in enumerate(layers.items()):
                self.stacks[name] = AdapterStack(
                    torch.zeros(slots, max_rank, K, dtype=dtype, device=device),
                    torch.zeros(slots, N, max_rank, dtype=dtype, device=device),
                    self._scaling[i],
                    self._ranks[i],
                )
        self._by_index = list(self.stacks.values())
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))  # for the zeros

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(
            t.numel() * t.element_size()
            for stack in self._by_index
            for t in (stack.lora_A, stack.lora_B)
        )

    def write(
        self,
        slot: int,
        adapter: HostAdapter,
        factor: float,
        after: Iterable[torch.cuda.Event],
        cancelled: Callable[[], bool],
    ) -> torch.cuda.Event | None:
        """Copy an adapter into a slot; its ranks come last, so that half an adapter is an empty one.

        Args:
            slot: Which slot; nobody else may use it meanwhile.
            adapter: What to copy.
            factor: Multiplies its scaling.
            after: Events to wait for on the device: the last uses of the slot.
            cancelled: Asked before each layer.

        Returns:
            torch.cuda.Event | None: When the slot may be used; None on the CPU, where it is at once.

        Raises:
            LoadCancelled: ``cancelled`` said so; the slot is empty.
        """
        with self._writing(after):
            self._ranks[:, slot] = 0
            staged = adapter.buffer.to(self.device, non_blocking=True)
            for piece in adapter.slices:
                if cancelled():
                    raise LoadCancelled("the load was cancelled")
                lora_a, lora_b = piece.views(staged)
                stack = self._by_index[piece.index]
                stack.lora_A[slot, : piece.r].copy_(lora_a)
                stack.lora_B[slot, :, : piece.r].copy_(lora_b)
            self._scale(slot, adapter.scaling, factor)
            self._ranks[:, slot] = adapter.ranks.to(self.device, non_blocking=True)
            return self._mark()

    def rescale(self, slot: int, scaling: Tensor, factor: float) -> torch.cuda.Event | None:
        """Set a slot's scaling to ``factor * scaling``, for all that the caller's stream does from now on."""
        before = self.mark()
        with self._writing(() if before is None else (before,)):
            self._scale(slot, scaling, factor)
            done = self._mark()
        self.wait(done)
        return done

    def clear(self, slot: int, after: Iterable[torch.cuda.Event]) -> torch.cuda.Event | None:
        """Make a slot empty: its ranks 0."""
        with self._writing(after):
            self._ranks[:, slot] = 0
            return self._mark()

    def mark(self) -> torch.cuda.Event | None:
        """An event after all that the caller's stream was given so far; None on the CPU."""
        if self._stream is None:
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def stream_key(self) -> int:
        """Which stream the caller is on; 0 on the CPU."""
        return 0 if self._stream is None else torch.cuda.current_stream(self.device).cuda_stream

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the caller's stream wait for an event, on the device."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def ids(self, slots: Sequence[int]) -> Tensor:
        """The slots as an int32 tensor on the device, without a sync."""
        host = torch.tensor(
            slots, dtype=torch.int32, device="cpu", pin_memory=self._stream is not None
        )
        return host.to(self.device, non_blocking=True)

    def _scale(self, slot: int, scaling: Tensor, factor: float) -> None:
        self._scaling[:, slot] = scaling.to(self.device, non_blocking=True) * factor

    def _mark(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()

    @contextlib.contextmanager
    def _writing(self, after: Iterable[torch.cuda.Event]) -> Iterator[None]:
        with torch.no_grad():
            if self._stream is None:
                yield
                return
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                for event in after:
                    self._stream.wait_event(event)
                yield
