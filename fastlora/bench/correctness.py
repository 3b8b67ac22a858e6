"""The suite's checks without its clock: every provider on a small twin of every case, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastlora.bench.cases import Case
from fastlora.bench.making import make_workload
from fastlora.bench.registry import Provider
from fastlora.bench.runner import describe


@dataclass(frozen=True)
class Checked:
    """One provider on the small twin of one case."""

    case: str
    provider: str
    label: str
    errors: dict[str, float] = field(default_factory=dict)
    problem: str = ""


def check_cases(
    cases: Sequence[Case], providers: dict[str, list[Provider]], device: torch.device, seed: int = 0
) -> list[Checked]:
    """Check, and time nothing.

    Args:
        cases (Sequence[Case]): they are shrunk first.
        providers (dict[str, list[Provider]]): by suite.
        device (torch.device): where to check.
        seed (int): of every tensor. Default: 0.

    Returns:
        list[Checked]: with a problem where a provider fails, or its numbers are wrong.
    """
    found = []
    for case in cases:
        small = case.shrunk()
        workload = None
        for provider in providers.get(case.suite, ()):
            if not provider.handles(small):
                continue
            try:
                workload = workload or make_workload(small, device, seed)
                errors, problem = workload.contender(provider).errors, ""
            except Exception as error:
                errors, problem = {}, " ".join(describe(error))
            found.append(Checked(small.id, provider.name, provider.label, errors, problem))
    return found
