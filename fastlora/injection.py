"""Put LoRA linears into an existing model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fastlora.merging import LoRALayer
from fastlora.modules import LoRALinear, base_problem, check_lora_options

_LISTED = 20


@dataclass(frozen=True)
class InjectionReport:
    """What ``inject`` did to a model; ``str()`` gives a readable summary.

    Attributes:
        replaced: Names of the modules that are LoRA linears now. A module that the model holds
            in several places appears under each of its names.
        skipped: ``(name, reason)`` of each module that a target named but that was left alone.
        unmatched: The targets that named no module at all.
        trainable_parameters: Number of trainable elements in the model now.
        total_parameters: Number of all elements, the new adapters included.
    """

    replaced: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    unmatched: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        """Summarise in a few lines."""
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        lines = [
            f"replaced {len(self.replaced)} linears: {_summarise(self.replaced)}",
            f"trainable parameters: {self.trainable_parameters:,} of "
            f"{self.total_parameters:,} ({share:.3g} %)",
        ]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped]
        if self.unmatched:
            lines.append(f"targets that named no module: {', '.join(self.unmatched)}")
        return "\n".join(lines)


def inject(
    model: nn.Module,
    target_modules: str | Iterable[str] = ("q_proj", "v_proj"),
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init_lora_weights: str = "kaiming",
    adapter_dtype: torch.dtype | None = None,
) -> InjectionReport:
    """Replace the matching linears of ``model`` by ``LoRALinear`` and freeze everything else.

    Matching is PEFT's: a target names a module whose qualified name equals it or ends with
    ``"." + target``; a string is a regular expression that must match the whole name. The base
    weights are shared, not copied. LoRA linears that the model already holds stay as they are,
    trainable included. A module found in several places gets one adapter that its matching
    places share. Every argument is checked, and every new layer made, before the model changes.

    Args:
        model: The model, changed in place.
        target_modules: Names, or one regular expression.
        r: The rank, 1 to 256.
        lora_alpha: ``scaling`` is ``lora_alpha / r``, with rsLoRA ``lora_alpha / sqrt(r)``.
        lora_dropout: Dropout probability of the LoRA branch, in [0, 1].
        use_rslora: Divide by ``sqrt(r)`` instead of ``r``.
        init_lora_weights: ``"kaiming"`` or ``"gaussian"``.
        adapter_dtype: dtype of the adapters; None means each linear's own.

    Returns:
        InjectionReport: The names replaced and skipped, and the parameter counts.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or nothing could be replaced; the message lists
            the linears that could have matched.

    Example:
        >>> import torch
        >>> from fastlora import inject
        >>> block = torch.nn.ModuleDict({n: torch.nn.Linear(32, 32) for n in ("q_proj", "k_proj")})
        >>> print(inject(block, ("q_proj",), r=4, lora_alpha=8))
        replaced 1 linears: q_proj
        trainable parameters: 256 of 2,368 (10.8 %)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_lora_options(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)
    targets = check_targets(target_modules)

    chosen: dict[str, nn.Linear] = {}
    skipped: list[tuple[str, str]] = []
    seen: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        hits = matching_targets(targets, name)
        if not hits:
            continue
        reason = _skip_reason(model, name, module)
        if reason is None and isinstance(module, nn.Linear):
            chosen[name] = module
        elif reason is not None:
            skipped.append((name, reason))
        else:
            continue
        seen |= hits
    if not chosen:
        raise ValueError(_nothing_replaced(model, target_modules, skipped))

    made: dict[int, LoRALinear] = {}
    trainable_before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for module in chosen.values():
            if id(module) not in made:
                made[id(module)] = LoRALinear(
                    module,
                    r,
                    lora_alpha,
                    lora_dropout,
                    use_rslora,
                    init_lora_weights,
                    adapter_dtype=adapter_dtype,
                )
    except BaseException:
        # The layers made so far froze their base; without them the model must be as it came.
        for parameter, flag in trainable_before:
            parameter.requires_grad_(flag)
        raise

    for name, module in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    _freeze_all_but_lora(model)
    new = {id(module) for module in made.values()}
    parameters = list(model.parameters())
    return InjectionReport(
        # Read back from the model: a shared parent shows its new child under other names too.
        replaced=tuple(n for n, m in model.named_modules(remove_duplicate=False) if id(m) in new),
        skipped=tuple(skipped),
        unmatched=() if isinstance(targets, re.Pattern) else tuple(_without(targets, seen)),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters),
    )


def check_targets(target_modules: object) -> re.Pattern[str] | tuple[str, ...]:
    """Return ``target_modules`` as a pattern or names, after a check; raise as `inject` does."""
    if isinstance(target_modules, str):
        if not target_modules:
            raise ValueError("target_modules must not be empty, got ''")
        try:
            return re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                "target_modules as a string must be a regular expression, "
                f"got {target_modules!r}: {error}"
            ) from None
    if not isinstance(target_modules, Iterable):
        raise TypeError(
            "target_modules must be names or one regular expression, "
            f"got {type(target_modules).__name__}"
        )
    targets = tuple(target_modules)
    for target in targets:
        if not isinstance(target, str):
            raise TypeError(f"target_modules must hold strings, got {target!r}")
    if not targets or "" in targets:
        raise ValueError(f"target_modules must hold non-empty names, got {targets!r}")
    return targets


def matching_targets(targets: re.Pattern[str] | tuple[str, ...], name: str) -> set[str]:
    """Return those of the checked targets that name the module ``name``."""
    if not name:
        return set()
    if isinstance(targets, re.Pattern):
        return {targets.pattern} if targets.fullmatch(name) else set()
    return {t for t in targets if name == t or name.endswith(f".{t}")}


def _without(targets: tuple[str, ...], seen: set[str]) -> list[str]:
    return [target for target in dict.fromkeys(targets) if target not in seen]


def _skip_reason(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Say why a module that a target names stays; None for a linear to replace or a container."""
    kind = type(module).__name__
    if isinstance(module, LoRALinear):
        return "it is a LoRALinear already"
    if hasattr(module, "base_layer"):
        return f"it is wrapped already, by {type(module).__module__}.{kind}"
    if not isinstance(module, nn.Linear):
        holds_weights = any(p is not None for p in module._parameters.values())
        leaf = holds_weights and not any(True for _ in module.children())
        return f"it is a {kind}, and only torch.nn.Linear is supported" if leaf else None
    if type(module) is not nn.Linear:
        return f"it is a {kind}, a subclass of torch.nn.Linear that may compute something else"
    if hasattr(module, "_hf_hook") or any(
        getattr(module, hooks)
        for hooks in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    ):
        return "it carries hooks, which a replacement would lose"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return (
            "torch's TransformerEncoderLayer reads its weight directly in eval mode, "
            "which would pass by the adapter"
        )
    problem = base_problem(module)
    return None if problem is None else str(problem)


def _freeze_all_but_lora(model: nn.Module) -> None:
    adapters = {
        id(p)
        for module in model.modules()
        if isinstance(module, LoRALayer)
        for name, p in module.named_parameters()
        if any(part.startswith("lora_") for part in name.split("."))
    }
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)


def _summarise(names: Iterable[str]) -> str:
    """Count names by their last part; a list index says nothing alone, so it keeps the whole."""
    counts = Counter(n if n.rpartition(".")[2].isdigit() else n.rpartition(".")[2] for n in names)
    shown = [f"{key} ({n})" if n > 1 else key for key, n in counts.most_common(_LISTED)]
    if len(counts) > _LISTED:
        shown.append(f"and {len(counts) - _LISTED} more")
    return ", ".join(shown)


def _nothing_replaced(
    model: nn.Module, target_modules: object, skipped: list[tuple[str, str]]
) -> str:
    if skipped:
        shown = "; ".join(f"{name}: {reason}" for name, reason in skipped[:_LISTED])
        more = f"; and {len(skipped) - _LISTED} more" if len(skipped) > _LISTED else ""
        return (
            f"target_modules={target_modules!r} names no module that can be replaced: {shown}{more}"
        )
    if type(model) is nn.Linear:
        return "model is itself a torch.nn.Linear: wrap it with LoRALinear(model, ...) instead"
    linears = [
        name
        for name, module in model.named_modules()
        if name and type(module) is nn.Linear and _skip_reason(model, name, module) is None
    ]
    found = _summarise(linears) if linears else "none, the model has no torch.nn.Linear to replace"
    hint = (
        ". A string is a regular expression that must match the whole name; pass a tuple of names "
        "to match their ends"
        if isinstance(target_modules, str)
        else ""
    )
    return (
        f"target_modules={target_modules!r} matches no module of this model. "
        f"Linears that could match: {found}{hint}"
    )
