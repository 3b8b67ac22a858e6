"""Merging adapters into the frozen weights, and giving the frozen weights back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from fastlora.functional import is_dtensor
from fastlora.merge_products import Product, write_all

KEEPS = ("device", "host")
Self = TypeVar("Self", bound="LoRALayer")


@dataclass
class Frozen:
    """The frozen weight of a merged layer: the Parameter itself, or its values in host memory."""

    values: Tensor
    merged: nn.Parameter | None = None
    """What stands in the Parameter's place."""
    on_host: bool = field(init=False)
    """Whether the weight was merged in place, its frozen values copied to the host."""

    def __post_init__(self) -> None:
        """Ask once: every switch of adapters wants to know."""
        self.on_host = not isinstance(self.values, nn.Parameter)


def parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    """``getattr(module, name)`` without the search of `nn.Module`, ten times as long.

    Args:
        module: The module.
        name: Of a Parameter, or of what took its place (a parametrization).

    Returns:
        nn.Parameter: What the attribute gives.
    """
    found = module._parameters.get(name)
    return cast(nn.Parameter, getattr(module, name)) if found is None else found


class LoRALayer(nn.Module):
    """What every LoRA layer of fastlora has: ``lora_A``, ``lora_B``, ``scaling``, and merging.

    ``peft_names`` is how PEFT's files name the two; empty where they have no place for the layer.
    A subclass says which module holds the frozen weight (`_weight_holder`) and what is added to
    which part of it (`_products`), and calls `_init_merging` once its parameters are there.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    r: int
    lora_alpha: float
    use_rslora: bool = False
    scaling: float
    merge_weights: bool = False
    peft_names: ClassVar[Mapping[str, str]] = {}
    _frozen: Frozen | None = None
    _merge_again: bool | None = None  # while a state dict is loaded: whether on the host

    def _init_merging(self, merge_weights: bool, training: bool) -> None:
        if not isinstance(merge_weights, bool):
            raise TypeError(f"merge_weights must be a bool, got {merge_weights!r}")
        self.merge_weights = merge_weights
        self._frozen = None
        # Not train(): a new adapter adds nothing, so there is nothing to merge yet.
        for module in self.modules():
            module.training = training
        self.register_state_dict_post_hook(_save_frozen_weight)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_merge_what_was_loaded)  # type: ignore[no-untyped-call]

    def _weight_holder(self) -> nn.Module:
        return self

    def _weight_name(self) -> str:
        """Return the name of the frozen weight relative to this layer."""
        return "weight"

    def _products(self, source: Tensor, target: Tensor) -> list[Product]:
        raise NotImplementedError(f"{type(self).__name__} does not say what it merges")

    @property
    def merged(self) -> bool:
        """Whether the weight holds the adapter now."""
        return self._frozen is not None

    def merge(self, safe: bool = False) -> None:
        """Put the adapter into the weight: ``weight + scaling * lora_B lora_A``.

        The sum is made in fp32 (fp64 for an fp64 weight) and rounded once, to the dtype of the
        weight. A merged layer runs the plain layer on it and nothing else. The merged values are
        a Parameter of this layer's own and the frozen Parameter is kept beside it, untouched: so
        `unmerge` is exact, other modules that share the frozen Parameter (tied weights) do not
        notice, and the cost is the memory of one more weight. `fastlora.merge` with
        ``keep="host"`` merges a whole model without that cost.

        On a merged layer this merges anew from the frozen weight, which takes in what happened to
        ``lora_A`` and ``lora_B`` since. Until then a merged layer does not follow them: an
        optimizer step while merged changes the adapter alone. `state_dict` gives the frozen
        weight, merged or not. Loading a state dict and `to` merge anew from what they give.

        Args:
            safe: Refuse a result that is not finite, and leave the layer as it was. It waits for
                the device and takes the memory of one more weight while it runs.

        Raises:
            ValueError: The weight is trainable, or with ``safe`` the result is not finite.
            TypeError: The weight is a tensor subclass (sharded, quantised), or ``safe`` no bool.

        Example:
            >>> import torch
            >>> from fastlora import LoRALinear
            >>> layer = LoRALinear(torch.nn.Linear(8, 8), r=2, lora_alpha=4).eval()
            >>> before = layer.weight.clone()
            >>> layer.merge()
            >>> layer.unmerge()
            >>> torch.equal(layer.weight, before)
            True
        """
        self._merge(safe, on_host=self._frozen is not None and self._frozen.on_host)

    # Not an inference tensor, whatever block the caller is in: it is written to and used later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _merge(self, safe: bool, on_host: bool) -> None:
        self._merge_here(safe, on_host)

    def _merge_here(self, safe: bool, on_host: bool) -> None:
        """`_merge` for a caller that is in these two modes already: to enter them takes its time."""
        frozen, weight = self._frozen, parameter_of(self._weight_holder(), "weight")
        if frozen is not None and not frozen.on_host and not safe:
            self._write_merged(frozen.values, weight)
            return
        # Else a new tensor, so that a failure half way leaves the weight as it is.
        target = self._merged_values(safe)
        if frozen is None and not on_host:
            self._take_merged(target)
            return
        if frozen is None:
            self._frozen = Frozen(_host_copy(weight.detach()))
        weight.copy_(target)

    def _take_merged(self, values: Tensor) -> None:
        """Put merged values beside the frozen weight, which stays as it is, and in its place."""
        holder, merged = self._weight_holder(), nn.Parameter(values, requires_grad=False)
        self._frozen = Frozen(parameter_of(holder, "weight"), merged)
        holder.weight = merged

    @torch.inference_mode(False)
    @torch.no_grad()
    def _merged_values(self, safe: bool) -> Tensor:
        """Return what merging gives as a new tensor; check that it may be done, and with what end."""
        if not isinstance(safe, bool):
            raise TypeError(f"safe must be a bool, got {safe!r}")
        source = self._source()
        target = torch.empty_like(source)
        self._write_merged(source, target)
        if safe and not target.is_meta and not bool(torch.isfinite(target).all()):
            bad = int((~torch.isfinite(target)).sum())
            raise ValueError(
                f"merging gives {bad} of {target.numel()} weights that are not finite; "
                "nothing was changed"
            )
        return target

    def _source(self) -> Tensor:
        """Return the frozen values, on the device of the weight; check that they may be merged."""
        weight = cast(nn.Parameter, self._weight_holder().weight)
        if type(weight) is not nn.Parameter:
            raise TypeError(
                f"weight must be a plain nn.Parameter to be merged, got {type(weight).__name__}"
            )
        if weight.requires_grad:
            raise ValueError("weight must be frozen to be merged, got requires_grad=True")
        source = weight.detach() if self._frozen is None else self._frozen.values.detach()
        return source.to(weight.device)  # a merged layer's may be on the host

    def _write_merged(self, source: Tensor, target: Tensor) -> None:
        write_all(self._products(source, target))

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the frozen weight back, bit for bit; the adapter stays. Nothing to do if not merged.

        Raises:
            RuntimeError: Another weight took the merged one's place: the layer was sharded meanwhile.
        """
        frozen, holder = self._frozen, self._weight_holder()
        if frozen is None:
            return
        if isinstance(frozen.values, nn.Parameter):
            if holder._parameters.get("weight") is not frozen.merged:
                raise RuntimeError(
                    f"the weight of this {type(self).__name__} was replaced while it was merged, as "
                    "fully_shard does, which goes on with the merged values; unmerge before that"
                )
            holder.weight = frozen.values
        else:
            cast(Tensor, holder.weight).copy_(frozen.values)
        self._frozen = None

    def train(self: Self, mode: bool = True) -> Self:
        """Set the mode; with ``merge_weights`` eval merges and train unmerges, as in loralib."""
        super().train(mode)
        if self.merge_weights and mode:
            self.unmerge()
        elif self.merge_weights and not self.merged:
            self.merge()
        return self

    def _refuse_training_while_merged(self) -> None:
        """Raise where a merged layer would silently give its adapter no gradient."""
        if torch.is_grad_enabled() and (self.lora_A.requires_grad or self.lora_B.requires_grad):
            raise RuntimeError(
                f"this {type(self).__name__} is merged and in training mode, where its adapter "
                "would get no gradient; call unmerge() to train, or eval()"
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The values are the frozen weight's; the hook that runs after this layer and its children
        # have them merges again.
        if self._frozen is not None:
            self._merge_again = self._frozen.on_host
            self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        # What to(), half() or cuda() do must be done to the frozen weight, and merged from there.
        frozen = self._frozen
        self.unmerge()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if frozen is not None:
            self._merge(False, frozen.on_host)
        return self


def _save_frozen_weight(
    layer: LoRALayer, state_dict: dict[str, Any], prefix: str, _: dict[str, Any]
) -> None:
    key = prefix + layer._weight_name()
    if layer._frozen is not None and key in state_dict:
        keep_vars = isinstance(state_dict[key], nn.Parameter)
        values = layer._frozen.values
        state_dict[key] = values if keep_vars else values.detach()


def _merge_what_was_loaded(layer: LoRALayer, _: object) -> None:
    on_host, layer._merge_again = layer._merge_again, None
    if on_host is not None:
        layer._merge(False, on_host)


def _host_copy(weight: Tensor) -> Tensor:
    """Copy to the host, pinned beside CUDA; it blocks, so that the host may read it at once."""
    pinned = weight.device.type == "cuda"
    return torch.empty_like(weight, device="cpu", pin_memory=pinned).copy_(weight)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return each LoRA layer of ``model`` once, by its first name.

    Args:
        model: The model.

    Returns:
        dict: The layers by qualified name.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: It has no LoRA layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}
    if not layers:
        raise ValueError("model has no LoRA layer; call fastlora.inject(model, ...) first")
    return layers


def merge(model: nn.Module, safe: bool = False, *, keep: str = "device") -> None:
    """Merge every LoRA layer of ``model`` (see `LoRALinear.merge`); all of them, or none.

    Layers that are merged already are merged anew, from their frozen weights, which stay where they are.

    Args:
        model: The whole model, so that weights shared between its modules are seen.
        safe: Refuse a result that is not finite, and leave the model as it was.
        keep: Where the frozen weights stay. ``"device"``: where they are, beside the merged ones,
            which doubles the memory of the adapted weights; switching and unmerging move nothing
            between host and device, and tied weights are handled. ``"host"``: the merged values
            take their place and they are copied to host memory, pinned beside CUDA; a weight that
            a second module shares is refused, for that module would change too.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or a weight is a tensor subclass.
        ValueError: It has no LoRA layer, ``keep`` is neither, a weight is shared (``"host"``),
            or the result is not finite (``safe``).

    Example:
        >>> import torch, fastlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> report = fastlora.inject(model, ("0",), r=2, lora_alpha=4)
        >>> fastlora.merge(model)
        >>> model[0].merged
        True
        >>> fastlora.unmerge(model)
    """
    if keep not in KEEPS:
        raise ValueError(f"keep must be 'device' or 'host', got {keep!r}")
    layers = lora_layers(model)
    if keep == "host":
        _refuse_shared_weights(model, layers)
    if not isinstance(safe, bool):
        raise TypeError(f"safe must be a bool, got {safe!r}")
    if safe:  # all are checked before the first changes, for a merged layer cannot go back
        check_finite(layers.values())
    fresh = [layer for layer in layers.values() if not layer.merged]
    try:
        _merge_all(layers.values(), keep == "host")
    except BaseException:
        for layer in fresh:
            layer.unmerge()
        raise


@torch.inference_mode(False)
@torch.no_grad()
def check_finite(layers: Iterable[LoRALayer]) -> None:
    """Raise where a layer may not be merged, or would get weights that are not finite; change nothing.

    The device is waited for once, not once a layer.

    Args:
        layers: The layers.

    Raises:
        TypeError: A weight is a tensor subclass.
        ValueError: A weight is trainable, or a result is not finite.
    """
    checks: dict[torch.device, list[tuple[LoRALayer, Tensor]]] = {}
    for layer in layers:
        values = layer._merged_values(False)
        if not values.is_meta:
            checks.setdefault(values.device, []).append((layer, torch.isfinite(values).all()))
    for found in checks.values():
        flags = torch.stack([finite for _, finite in found]).tolist()
        for (layer, _), finite in zip(found, flags, strict=True):
            if not finite:
                layer._merged_values(True)  # which says how many


@torch.inference_mode(False)
@torch.no_grad()
def _merge_all(layers: Iterable[LoRALayer], on_host: bool) -> None:
    """Merge layers, those on the device by as few launches as it takes; ``on_host`` is for the unmerged."""
    products: list[Product] = []
    fresh: list[tuple[LoRALayer, Tensor]] = []

    def write() -> None:
        write_all(products)
        for layer, target in fresh:
            layer._take_merged(target)
        products.clear()
        fresh.clear()

    for layer in layers:
        frozen = layer._frozen
        if on_host if frozen is None else frozen.on_host:
            # Each by itself: all of them at once would take the memory of as many weights.
            write()
            layer._merge_here(False, True)
        elif type(layer)._write_merged is not LoRALayer._write_merged:  # in a way of its own
            write()
            layer._merge_here(False, False)
        elif frozen is None:
            source = layer._source()
            target = torch.empty_like(source)
            products += layer._products(source, target)
            fresh.append((layer, target))
        else:
            products += layer._products(
                frozen.values, parameter_of(layer._weight_holder(), "weight")
            )
    write()


def merge_anew(layers: Iterable[LoRALayer]) -> None:
    """Merge those of ``layers`` that are merged anew, from their frozen weights.

    Args:
        layers: The layers; the others stay as they are.
    """
    _merge_all([layer for layer in layers if layer._frozen is not None], False)


def unmerge(model: nn.Module) -> None:
    """Give every LoRA layer of ``model`` its frozen weight back, bit for bit.

    Args:
        model: The model; layers that are not merged stay as they are.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: It has no LoRA layer.
    """
    for layer in lora_layers(model).values():
        layer.unmerge()


@contextlib.contextmanager
def merged(model: nn.Module, safe: bool = False, *, keep: str = "device") -> Iterator[None]:
    """Merge ``model`` inside a ``with`` block; layers that were merged before stay merged after it.

    Args:
        model: The model.
        safe: As for `merge`.
        keep: As for `merge`.

    Raises:
        TypeError: As `merge`.
        ValueError: As `merge`.

    Example:
        >>> import torch, fastlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> report = fastlora.inject(model, ("0",), r=2, lora_alpha=4)
        >>> with fastlora.merged(model):
        ...     y = model(torch.randn(3, 8))
        >>> model[0].merged
        False
    """
    fresh = [layer for layer in lora_layers(model).values() if not layer.merged]
    merge(model, safe, keep=keep)
    try:
        yield
    finally:
        for layer in fresh:
            layer.unmerge()


def _refuse_shared_weights(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        for label, tensor in own:
            if tensor is None or is_dtensor(tensor):  # a DTensor has no storage to compare
                continue
            if not tensor.is_meta and tensor.numel():
                storage = tensor.untyped_storage().data_ptr()
                names.setdefault(storage, []).append(f"{name}.{label}" if name else label)
    for name, layer in layers.items():
        weight = cast(Tensor, layer._weight_holder().weight)
        if is_dtensor(weight):
            continue  # refused where it is merged
        storage = weight.untyped_storage().data_ptr()
        if len(names.get(storage, ())) > 1:
            raise ValueError(
                f"keep='host' merges in place, and the weight of {name or 'model'} shares its "
                f"memory: {', '.join(names[storage])}; use keep='device'"
            )
