"""What changed between two runs beyond noise: the rule, and a table of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastlora.bench.registry import FLOOR
from fastlora.bench.results import OK, Result, Results
from fastlora.bench.stats import least_p, mann_whitney, spread
from fastlora.bench.workloads import COPY, MODE_LABELS

MIN_EFFECT = 0.05
HOST_EFFECT = 0.25
"""The same where the host is what is timed: from one process to the next, its speed changed by up to 67 % on
an H100 machine, and fastlora's time over eager PyTorch's by up to 16 %."""
HOST_SHARE = 0.9
"""An eager call is the host's where it is busy for this share of the time."""
HOST_YARDSTICK = "eager"
LEVEL = 0.01

RULE = (
    "Compared are ratios to the floor of the same turn, which a clock that differs between the runs leaves "
    "alone; where the host is what is timed, ratios to eager PyTorch, which leave the host's speed alone. A "
    "result changed when its median ratio moved by more than {effect:.0%} (the host's: {host:.0%}), by more "
    "than the noise of either run (half of what lies between the 20th and the 80th percentile), and a "
    "Mann-Whitney test of the samples gives p < {level} over the number of comparisons. A regression is a "
    "result of fastlora that became slower so, or that is wrong, fails or is missing now."
)


@dataclass(frozen=True)
class Change:
    """One result in both runs."""

    key: tuple[str, str, str, str]
    label: str
    before: float
    after: float
    p: float
    changed: bool
    failed: str = ""
    unit: str = "x floor"
    too_few: bool = False
    """Whether no change could show: too few samples for so many comparisons."""

    @property
    def effect(self) -> float:
        """Relative change of the median; positive is slower."""
        return self.after / self.before - 1 if self.before else 0.0

    @property
    def ours(self) -> bool:
        """Whether it is a result of fastlora."""
        return "fastlora" in self.key[3]

    @property
    def regression(self) -> bool:
        """Whether it is a result of fastlora that is slower or fails."""
        return self.ours and (bool(self.failed) or (self.changed and self.effect > 0))


def _host_effect(min_effect: float) -> float:
    return max(min_effect, HOST_EFFECT)


def describe_rule(min_effect: float = MIN_EFFECT, level: float = LEVEL) -> str:
    """What `compare` goes by, in words, with its numbers."""
    return RULE.format(effect=min_effect, host=_host_effect(min_effect), level=level)


def host_bound(result: Result) -> bool:
    """Whether the GPU waits for the host rather than the other way round."""
    busy = spread(result.host_ms).median if result.host_ms else 0.0
    return busy > HOST_SHARE * spread(result.device_ms).median


def relative_samples(results: Results, result: Result, yardstick: str) -> tuple[list[float], str]:
    """Each sample over the yardstick's of the same turn; plain ms where there is no such result."""
    other = results.beside(result, yardstick)
    if other is None or len(other.device_ms) != len(result.device_ms):
        return result.device_ms, "ms"
    pairs = zip(result.device_ms, other.device_ms, strict=True)
    return [mine / its for mine, its in pairs], f"x {yardstick}"


def compare(
    before: Results,
    after: Results,
    min_effect: float = MIN_EFFECT,
    level: float = LEVEL,
    pattern: str | None = None,
) -> list[Change]:
    """Every result of ``before`` that ``after`` holds, or should.

    Args:
        before (Results): the run to compare with.
        after (Results): the run in question.
        min_effect (float): smallest relative change that counts. Default: 0.05.
        level (float): of the test, divided by the number of comparisons. Default: 0.01.
        pattern (str | None): compare only cases whose id it matches. Default: ``None``, all.

    Returns:
        list[Change]: in the order of ``before``.

    Raises:
        ValueError: the runs have nothing in common.
    """
    pairs: list[tuple[Result, Result | None, str]] = []
    for key, old in before.results.items():
        if key[3] in (FLOOR, COPY) or old.status != OK or not old.device_ms:
            continue
        if pattern is not None and not re.search(pattern, old.case):
            continue
        new = after.results.get(key)
        if new is None:
            failed = _why_missing(after, old)
        else:
            failed = "" if new.status == OK and new.device_ms else new.message or new.status
        if new is not None or failed:
            pairs.append((old, new, failed))
    if all(new is None for _, new, _ in pairs):
        raise ValueError("the two runs have no result in common")
    bound = level / len(pairs)
    changes = []
    for old, new, failed in pairs:
        if new is None or failed:
            old_samples, old_unit = relative_samples(before, old, FLOOR)
            median = spread(old_samples).median
            changes.append(Change(old.key, old.label, median, 0.0, 0.0, True, failed, old_unit))
            continue
        hosts = host_bound(old) or host_bound(new)
        yardstick = HOST_YARDSTICK if hosts else FLOOR
        old_samples, old_unit = relative_samples(before, old, yardstick)
        new_samples, unit = relative_samples(after, new, yardstick)
        if unit != old_unit:
            old_samples, new_samples, unit = old.device_ms, new.device_ms, "ms"
        a, b = spread(old_samples), spread(new_samples)
        p = mann_whitney(old_samples, new_samples)
        effect = abs(b.median / a.median - 1)
        least = _host_effect(min_effect) if hosts else min_effect
        comparable = not hosts or unit != "ms"
        changed = comparable and effect > max(least, a.noise, b.noise) and p < bound
        few = least_p(len(old_samples), len(new_samples)) >= bound
        changes.append(
            Change(old.key, old.label, a.median, b.median, p, changed, unit=unit, too_few=few)
        )
    return changes


def _why_missing(after: Results, old: Result) -> str:
    """Why a run that should have this result has none; empty where it did not ask for it."""
    if old.case in after.unfinished:
        return "the case began and did not end"
    asked = old.case in after.cases and any(key[3] == old.provider for key in after.results)
    return "not measured" if asked else ""


def absent(before: Results, after: Results) -> int:
    """How many good results of ``before`` the other run did not ask for."""
    return sum(
        old.status == OK and key not in after.results and not _why_missing(after, old)
        for key, old in before.results.items()
    )


def describe_machines(before: Results, after: Results, names: Sequence[str]) -> list[str]:
    """What differs between the machines of two runs, as far as they say; ``names`` are looked at."""
    old, new = ((r.runs[-1]["machine"] if r.runs else {}) for r in (before, after))
    return [
        f"other {name}: {old.get(name, 'unknown')}, then {new.get(name, 'unknown')}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def describe_changes(changes: Sequence[Change]) -> list[str]:
    """One line for each change, regressions first, then a count."""
    lines = []
    found = [c for c in changes if c.changed]
    for change in sorted(found, key=lambda c: (not c.regression, -c.effect)):
        case, mode, schedule, _ = change.key
        what = "REGRESSION" if change.regression else "slower" if change.effect > 0 else "faster"
        if change.failed:
            what = "REGRESSION" if change.regression else "fails"
            moved = f"was {change.before:.3f} {change.unit}, now: {change.failed}"
        else:
            moved = (
                f"{change.before:.3f} -> {change.after:.3f} {change.unit} ({change.effect:+.1%})"
            )
        lines.append(f"{what}: {case}, {MODE_LABELS[mode]}, {schedule}, {change.label}: {moved}")
    regressions = sum(c.regression for c in changes)
    few = sum(c.too_few for c in changes)
    if few:
        lines.append(
            f"{few} of {len(changes)} results have too few samples for so many comparisons: no change can "
            "show in them; --repeats takes more, --filter compares fewer"
        )
    lines.append(
        f"{len(changes)} results compared, {len(found)} changed, {regressions} regressions"
    )
    return lines
