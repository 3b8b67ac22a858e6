"""What a provider is, and the registry of those that are measured; a user's own file adds to it."""

from __future__ import annotations

import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

import fastlora
from fastlora.bench.cases import Case, ModelCase
from fastlora.bench.llama import Llama
from fastlora.bench.problems import ServeProblem, ServeSet, TrainProblem

FLOOR = "floor"
"""The name of what everything is compared with: the frozen layer or model alone."""


@dataclass(frozen=True)
class Layer:
    """A LoRA linear that is ready to be called: its function of x, and its own A and B."""

    forward: Callable[[Tensor], Tensor]
    lora_A: Tensor
    lora_B: Tensor


@dataclass(frozen=True)
class LoraModel:
    """A model with LoRA: what a training step calls, and the adapters by the linear's name."""

    model: nn.Module
    adapters: dict[str, tuple[Tensor, Tensor]]
    context: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)


class Provider(ABC):
    """One way to compute LoRA."""

    suite: ClassVar[str]
    """``"train"``, ``"serve"`` or ``"model"``."""
    name: ClassVar[str]
    label: ClassVar[str]
    graphable: ClassVar[bool] = True
    """Whether its calls can be captured in a CUDA graph."""
    slow: ClassVar[bool] = False
    """Whether preparing it takes so long that it is measured only when asked for."""
    kinds: ClassVar[tuple[str, ...]] = ()
    """For models: the kinds of case that it can do."""

    def unavailable(self) -> str:
        """Why it cannot run on this machine, or an empty string."""
        return ""

    def handles(self, case: Case) -> bool:
        """Whether this case is one for it."""
        return not isinstance(case, ModelCase) or case.kind in self.kinds


class TrainProvider(Provider):
    """A LoRA linear with gradients."""

    suite = "train"
    same_mask: ClassVar[bool] = False
    """Whether its dropout mask is that of `fastlora.reference`; if not, it is checked without dropout."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Of the cases that it takes part in; empty: all."""

    @abstractmethod
    def make(self, problem: TrainProblem, p: float) -> Layer:
        """The layer on the problem's weight, lora_A and lora_B, with dropout ``p``, in training mode."""

    def handles(self, case: Case) -> bool:
        """Whether the case has one of its tags."""
        return not self.tags or case.tag in self.tags


class ServeProvider(Provider):
    """A linear whose rows use different adapters."""

    suite = "serve"
    trains: ClassVar[bool] = True
    """Whether gradients come for x and for the stacks."""
    same_mask: ClassVar[bool] = False
    """Whether its dropout mask is that of `fastlora.reference`; if not, it is checked without dropout."""

    @abstractmethod
    def make(self, problem: ServeProblem) -> Callable[[ServeSet], Tensor]:
        """A function from one set of the problem to y ``[M, N]``."""

    def handles(self, case: Case) -> bool:
        """Whether it trains, where the case does."""
        return self.trains or not getattr(case, "train", False)


class ModelProvider(Provider):
    """A whole model."""

    suite = "model"

    @abstractmethod
    def make(self, llama: Llama, p: float) -> Any:
        """For training a `LoraModel`, for generation a function from prompts to tokens or logits."""


P = TypeVar("P", bound=type[Provider])

_PROVIDERS: dict[tuple[str, str], Provider] = {}


def register(kind: P) -> P:
    """Add a class of providers to the registry; to be used as a decorator.

    Args:
        kind (type[Provider]): with ``name`` and ``label``, and a constructor without arguments.

    Raises:
        TypeError: it is no subclass of `TrainProvider`, `ServeProvider` or `ModelProvider`.
        ValueError: its name is missing or taken.

    Example:
        >>> from fastlora.bench import Layer, TrainProvider, providers_of, register
        >>> @register
        ... class Frozen(TrainProvider):
        ...     name, label = "frozen", "the frozen layer, which is no LoRA"
        ...     def make(self, problem, p):
        ...         return Layer(lambda x: x @ problem.weight.t(), problem.lora_A, problem.lora_B)
        >>> "frozen" in providers_of("train")
        True
    """
    if not isinstance(kind, type) or not issubclass(kind, Provider):
        raise TypeError(f"a provider must be a subclass of Provider, got {kind!r}")
    name = getattr(kind, "name", "")
    if not name or not getattr(kind, "label", ""):
        raise ValueError(f"{kind.__name__} must have a name and a label")
    if name == FLOOR or (kind.suite, name) in _PROVIDERS:
        raise ValueError(f"provider {name!r} of suite {kind.suite} is there already")
    _PROVIDERS[kind.suite, name] = kind()
    return kind


def providers_of(suite: str) -> dict[str, Provider]:
    """The registered providers of a suite, by name."""
    return {name: p for (found, name), p in _PROVIDERS.items() if found == suite}


def load_file(path: Path) -> None:
    """Run a user's file, which registers providers of its own.

    Args:
        path (Path): a Python file.

    Raises:
        ValueError: there is no such file, or it registers nothing.
    """
    if not path.is_file():
        raise ValueError(f"--provider {path}: there is no such file")
    before = len(_PROVIDERS)
    name = f"fastlora_bench_provider_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--provider {path}: not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except TypeError as error:
        raise ValueError(f"--provider {path}: {error}") from error
    if len(_PROVIDERS) == before:
        raise ValueError(f"--provider {path}: it registers no provider")


def choose(
    suites: Sequence[str], names: Sequence[str] | None, device: torch.device, slow: bool
) -> tuple[dict[str, list[Provider]], list[str]]:
    """The providers to measure, by suite, and why others are left out.

    Args:
        suites (Sequence[str]): among ``"train"``, ``"serve"`` and ``"model"``.
        names (Sequence[str] | None): only these; ``None`` for all.
        device (torch.device): on a CPU nothing is compiled.
        slow (bool): take in the slow ones too; a name in ``names`` takes one in as well.

    Raises:
        ValueError: a name is that of no provider, or none of them is one of these suites.
    """
    known = {name for _, name in _PROVIDERS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown provider {name!r}; there are {', '.join(sorted(known))}")
    chosen: dict[str, list[Provider]] = {}
    left_out = []
    for suite in suites:
        chosen[suite] = []
        for name, provider in providers_of(suite).items():
            if names is not None and name not in names:
                continue
            reason = provider.unavailable()
            if not reason and provider.slow and not slow and names is None:
                reason = "takes minutes to compile; --slow takes it in"
            if not reason and "compile" in name and device.type != "cuda":
                reason = "nothing is compiled on a CPU"
            if reason:
                left_out.append(f"{provider.label} ({suite}): {reason}")
            else:
                chosen[suite].append(provider)
    if names and not any(chosen.values()) and not left_out:
        kinds = ", ".join(suites)
        raise ValueError(f"no provider of {', '.join(names)} measures {kinds}")
    return chosen, left_out


def accelerate(model: nn.Module, device: torch.device) -> None:
    """``fastlora.accelerate`` a PEFT model.

    Raises:
        RuntimeError: a layer would run PEFT's own forward on a GPU, so that PEFT itself would be timed.
    """
    library: Any = fastlora
    report = library.accelerate(model)
    kept = [*report.left, *((m.name, m.now) for m in report.modules if m.now)]
    if kept and device.type == "cuda":
        raise RuntimeError(f"accelerate leaves {len(kept)} layers to PEFT, one since: {kept[0][1]}")


def no_accelerate() -> str:
    """Why PEFT cannot be accelerated here, or an empty string."""
    return missing("peft") if hasattr(fastlora, "accelerate") else "this fastlora has no accelerate"


def missing(package: str) -> str:
    """``"<package> is not installed"``, or an empty string where it is."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"
