"""``fastlora.accelerate``: a PEFT model made fast in place, and the report of what was done."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from types import ModuleType

from torch import nn

OLDEST_PEFT = (0, 18)


@dataclass(frozen=True)
class AcceleratedModule:
    """One LoRA layer of a model.

    Attributes:
        name: Its qualified name.
        accelerated: Whether its class is ours.
        reason: Why not; empty where ``accelerated``.
        now: Where ``accelerated``, why PEFT's own forward would run in the present state all the
            same (adapters disabled or merged, hooks, no GPU, ...); empty where the fused one would.
    """

    name: str
    accelerated: bool
    reason: str = ""
    now: str = ""

    @property
    def forward(self) -> str:
        """Which forward a call would run now: ``"fused"`` or ``"PEFT"``."""
        return "fused" if self.accelerated and not self.now else "PEFT"


@dataclass(frozen=True)
class AccelerationReport:
    """What ``accelerate`` did to a model; ``str()`` gives a table.

    Attributes:
        modules: Every LoRA layer of PEFT in the model, in the model's order. A module that the model
            holds in several places appears under each of its names.
    """

    modules: tuple[AcceleratedModule, ...]

    @property
    def accelerated(self) -> tuple[str, ...]:
        """Names of the layers whose class is ours now."""
        return tuple(m.name for m in self.modules if m.accelerated)

    @property
    def left(self) -> tuple[tuple[str, str], ...]:
        """``(name, reason)`` of each layer that was left alone."""
        return tuple((m.name, m.reason) for m in self.modules if not m.accelerated)

    def __str__(self) -> str:
        """A summary, then one row for the layers that differ in their number alone."""
        lines = [f"accelerated {len(self.accelerated)} of {len(self.modules)} LoRA layers"]
        rows = Counter(
            (
                re.sub(r"(?<=\.)\d+(?=\.|$)", "*", m.name),
                "yes" if m.accelerated else "no",
                m.forward,
                m.reason or m.now,
            )
            for m in self.modules
        )
        table = [("module", "count", "accelerated", "forward now", "why")]
        table += [(name, str(n), done, now, why) for (name, done, now, why), n in rows.items()]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        for row in table:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[4]]).rstrip())
        return "\n".join(lines)


def accelerate(model: nn.Module) -> AccelerationReport:
    """Run the LoRA layers of a PEFT model as fused passes; change nothing else about the model.

    Each eligible ``Linear`` and ``Embedding`` of ``peft.tuners.lora.layer`` gets a subclass as its class.
    Parameters, state dict, saved files and every method of PEFT stay what they are, and each call reads
    the layer's adapters, scaling and flags anew. A call that is not exactly ``base(x) + scaling *
    B(A(dropout(x)))``, or that of an embedding ``base(ids) + scaling * B A[:, ids]``, runs PEFT's own
    forward: the report says which layers, and why. Calling it again does no harm: it takes in layers
    that came since, and reports the present state. `restore` undoes it.

    Args:
        model: A ``PeftModel``, or any module that holds LoRA layers of PEFT. Changed in place.

    Returns:
        AccelerationReport: Each LoRA layer, accelerated or not, and why.

    Raises:
        ImportError: PEFT is not installed, or older than 0.18.
        TypeError: ``model`` is no module.
        ValueError: ``model`` holds no LoRA layer of PEFT.

    Example:
        >>> import torch, fastlora
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> model = get_peft_model(model, LoraConfig(r=8, target_modules=["0"]))
        >>> fastlora.accelerate(model).accelerated
        ('base_model.model.0',)
    """
    layers = _lora_layers(model)
    kinds, model_file = _our_files()
    modules = []
    for name, module in layers:
        kind = kinds.kind_of(module)
        if isinstance(kind, str):
            modules.append(AcceleratedModule(name, False, kind))
            continue
        if type(module) is kind.theirs:
            module.__class__ = kind.ours
        found = kind.operands(module)
        modules.append(AcceleratedModule(name, True, now=found if isinstance(found, str) else ""))
    for module in model.modules():
        if type(module) is model_file.PeftLoraModel:
            module.__class__ = model_file.AcceleratedLoraModel
    return AccelerationReport(tuple(modules))


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo `accelerate`: every layer gets PEFT's own class back, unless FSDP2 has wrapped it since.

    Args:
        model: The model, changed in place.

    Returns:
        tuple[str, ...]: Names of the layers that had been accelerated.

    Raises:
        ImportError: PEFT is not installed, or older than 0.18.
        TypeError: ``model`` is no module.
        ValueError: ``model`` holds no LoRA layer of PEFT.

    Example:
        >>> import torch, fastlora
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> model = get_peft_model(model, LoraConfig(r=8, target_modules=["0"]))
        >>> report = fastlora.accelerate(model)
        >>> fastlora.restore(model)
        ('base_model.model.0',)
    """
    layers = _lora_layers(model)
    kinds, model_file = _our_files()
    theirs = {kind.ours: kind.theirs for kind in kinds.KINDS}
    names = tuple(name for name, module in layers if type(module) in theirs)
    for module in model.modules():
        if type(module) in theirs:
            module.__class__ = theirs[type(module)]
        elif type(module) is model_file.AcceleratedLoraModel:
            module.__class__ = model_file.PeftLoraModel
    return names


def _lora_layers(model: object) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _our_files()
    from peft.tuners.lora import LoraLayer

    layers = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoraLayer)
    ]
    if not layers:
        raise ValueError(
            f"model must hold LoRA layers of PEFT, and this {type(model).__name__} has none: "
            "make it with peft.get_peft_model(model, peft.LoraConfig(...)) first"
        )
    return layers


def _our_files() -> tuple[ModuleType, ModuleType]:
    """`peft_kinds` and `peft_model`, which cannot be imported without PEFT."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"this needs PEFT, pip install peft: {error}") from error
    if tuple(int(part) for part in peft.__version__.split(".")[:2]) < OLDEST_PEFT:
        raise ImportError(f"this needs PEFT 0.18 or newer, got {peft.__version__}")
    from fastlora.integrations import peft_kinds, peft_model

    return peft_kinds, peft_model
