"""``bench --compare``: the test of samples, the rule, and what it says of what it cannot see."""

from __future__ import annotations

import itertools
import random

import pytest

pytest.importorskip("rich", reason="the commands print through rich")

from fastlora.bench.compare import (
    absent,
    compare,
    describe_changes,
    describe_machines,
    relative_samples,
)
from fastlora.bench.registry import FLOOR
from fastlora.bench.results import OOM, Result, Results
from fastlora.bench.stats import least_p, mann_whitney
from fastlora.bench.summary import worst_against


@pytest.mark.parametrize(
    ("n", "m", "method"), [(8, 8, "exact"), (20, 17, "exact"), (40, 35, "asymptotic")]
)
def test_mann_whitney_is_scipys(n: int, m: int, method: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    for shift in (0.0, 0.5, 2.0):
        a = [rng.gauss(0, 1) for _ in range(n)]
        b = [rng.gauss(shift, 1) for _ in range(m)]
        want = stats.mannwhitneyu(a, b, alternative="two-sided", method=method).pvalue
        assert mann_whitney(a, b) == pytest.approx(want, rel=1e-9)
        a, b = [round(v) for v in a], [round(v) for v in b]
        want = stats.mannwhitneyu(a, b, alternative="two-sided", method="asymptotic").pvalue
        exact = n + m <= 60
        assert mann_whitney(a, b) == pytest.approx(want, rel=0.5 if exact else 1e-9, abs=2e-3)


def test_mann_whitney_counts_the_orders() -> None:
    a, b = [1, 2, 2, 5], [2, 3, 5, 5, 6]
    ranks = {1: 1, 2: 3, 3: 5, 5: 7, 6: 9}
    every = [ranks[v] for v in (*a, *b)]
    sums = [sum(every[i] for i in chosen) for chosen in itertools.combinations(range(9), 4)]
    middle = sum(every) * 4 / 9
    far = abs(sum(ranks[v] for v in a) - middle)
    want = sum(abs(total - middle) >= far for total in sums) / len(sums)
    assert mann_whitney(a, b) == pytest.approx(want)
    assert mann_whitney([], [1.0]) == 1.0
    assert mann_whitney([1.0, 1.0], [1.0]) == 1.0
    assert mann_whitney([1.0] * 50, [1.0] * 40) == 1.0
    assert mann_whitney([1.0] * 8, [2.0] * 8) == pytest.approx(least_p(8, 8)) == 2 / 12870


def planted(
    slower: float = 1.0, clock: float = 1.0, seed: int = 0, noise: float = 0.01, cases: int = 60
) -> Results:
    """A run of many cases; ``slower`` scales one result of fastlora, ``clock`` everything."""
    rng, found = random.Random(seed), Results()
    for number in range(cases):
        for provider, ms in ((FLOOR, 1.0), ("fastlora", 1.1), ("peft", 1.5)):
            drift = [1 + 0.02 * rng.random() for _ in range(20)]
            factor = slower if (number, provider) == (3, "fastlora") else 1.0
            samples = [ms * factor * clock * d * (1 + abs(rng.gauss(0, noise))) for d in drift]
            result = Result(
                f"train/table/{number}", "train", "step", "eager", provider, provider,
                device_ms=samples, block=number,
            )  # fmt: skip
            found.add({"type": "result", **vars(result)})
    return found


@pytest.mark.parametrize("seed", range(8))
def test_two_honest_runs_are_not_different(seed: int) -> None:
    changes = compare(planted(seed=seed), planted(seed=100 + seed, clock=1.07))
    assert len(changes) == 120
    assert not any(change.changed for change in changes)


@pytest.mark.parametrize("seed", range(8))
def test_a_planted_slowdown_of_a_tenth_is_a_regression(seed: int) -> None:
    changes = compare(planted(seed=seed), planted(seed=100 + seed, slower=1.1))
    (found,) = (change for change in changes if change.changed)
    assert found.key[0] == "train/table/3"
    assert found.regression
    assert found.effect == pytest.approx(0.1, abs=0.02)
    lines = describe_changes(changes)
    assert lines[0].startswith("REGRESSION: train/table/3")
    assert "1 regressions" in lines[-1]
    assert not any(c.regression for c in compare(planted(seed=seed, slower=1.1), planted(seed=9)))


def bound_by_the_host(ours: float, host: float, yardstick: bool = True) -> Results:
    rng, found = random.Random(ours + host), Results()
    for provider, ms in ((FLOOR, 0.1), ("fastlora", ours), ("eager", 0.4)):
        if provider == "eager" and not yardstick:
            continue
        samples = [
            ms * (1 if provider == FLOOR else host) * rng.uniform(1, 1.02) for _ in range(20)
        ]
        waits = [0.02 if provider == FLOOR else ms for ms in samples]
        result = Result(
            "train/table/0", "train", "step", "eager", provider, provider,
            device_ms=samples, host_ms=waits, block=1,
        )  # fmt: skip
        found.add({"type": "result", **vars(result)})
    return found


def test_a_slower_host_is_no_regression_and_slower_code_on_it_is() -> None:
    before = bound_by_the_host(ours=0.3, host=1.0)
    assert not any(c.changed for c in compare(before, bound_by_the_host(ours=0.34, host=1.7)))
    change = compare(before, bound_by_the_host(ours=0.45, host=0.8))[0]
    assert change.regression
    assert change.unit == "x eager"
    alone = [bound_by_the_host(ours, 1.0, yardstick=False) for ours in (0.3, 0.45)]
    assert not any(c.changed for c in compare(*alone))


def test_noise_as_large_as_the_change_is_no_regression() -> None:
    changes = compare(planted(noise=0.3, cases=8), planted(noise=0.3, cases=8, seed=7, slower=1.1))
    assert not any(change.changed for change in changes)


def test_a_peer_that_became_slower_is_no_regression_and_a_failure_of_ours_is() -> None:
    before, after = planted(cases=4), planted(cases=4, seed=1)
    for key, result in after.results.items():
        if key[3] == "peft":
            result.device_ms = [2 * ms for ms in result.device_ms]
        if key[3] == "fastlora" and key[0].endswith("/2"):
            result.status, result.message, result.device_ms = OOM, "does not fit", []
    changes = compare(before, after)
    assert sum(c.changed for c in changes) == 5
    (failed,) = (c for c in changes if c.regression)
    assert "does not fit" in describe_changes([failed])[0]
    with pytest.raises(ValueError, match="no result in common"):
        compare(before, Results())


def few_samples(results: Results, count: int) -> Results:
    for result in results.results.values():
        result.device_ms = result.device_ms[:count]
    return results


def test_eight_samples_are_enough_for_a_suite_and_three_are_said_to_be_too_few() -> None:
    before, after = (few_samples(planted(cases=20, slower=s, seed=s > 1), 8) for s in (1.0, 1.5))
    (found,) = (c for c in compare(before, after) if c.regression)
    assert found.key[0] == "train/table/3"
    changes = compare(few_samples(before, 3), few_samples(after, 3))
    assert not any(c.changed for c in changes)
    assert describe_changes(changes)[0].startswith("40 of 40 results have too few samples")
    one = compare(before, after, pattern="table/3$")
    assert {c.key[0] for c in one} == {"train/table/3"}


def test_results_that_are_missing() -> None:
    before, after = planted(cases=4), planted(cases=4, seed=1)
    for number in range(4):
        after.add({"type": "case", "case": f"train/table/{number}"})
    del after.results["train/table/1", "step", "eager", "fastlora"]
    after.add({"type": "begin", "case": "train/table/2"})
    del after.results["train/table/2", "step", "eager", "fastlora"]
    del after.results["train/table/3", "step", "eager", "peft"]
    changes = compare(before, after)
    found = {c.key[0]: c.failed for c in changes if c.regression}
    assert found == {
        "train/table/1": "not measured",
        "train/table/2": "the case began and did not end",
    }
    assert sum(bool(c.failed) for c in changes) == 3  # PEFT's is no regression of ours
    assert absent(before, after) == 0
    for key in [key for key in after.results if key[3] == "peft"]:
        del after.results[key]  # as with --providers fastlora
    assert absent(before, after) == 3
    assert not any(
        c.key[3] == "peft" and c.key[0] != "train/table/2" for c in compare(before, after)
    )


def test_samples_of_other_turns_are_not_divided_by_each_other() -> None:
    found = planted(cases=1)
    mine = found.results["train/table/0", "step", "eager", "fastlora"]
    found.beside(mine, FLOOR).device_ms.pop()
    assert relative_samples(found, mine, FLOOR) == (mine.device_ms, "ms")


def test_the_worst_case_is_of_those_that_were_timed_in_the_same_turns() -> None:
    found = planted(slower=2.0, cases=5)
    ratio, mine = worst_against(found, "train", "peft")
    assert mine.case == "train/table/3"
    assert ratio == pytest.approx(2 * 1.1 / 1.5, rel=0.1)
    mine.block = 7  # timed again since
    ratio, mine = worst_against(found, "train", "peft")
    assert mine.case != "train/table/3"
    assert ratio == pytest.approx(1.1 / 1.5, rel=0.1)
    assert worst_against(found, "serve", "peft") is None


def test_other_machines_are_named() -> None:
    before, after = planted(cases=1), planted(cases=1)
    before.add({"type": "run", "machine": {"GPU": "one", "torch": "2.13"}})
    after.add({"type": "run", "machine": {"GPU": "other", "torch": "2.13"}})
    lines = describe_machines(before, after, ("GPU", "torch", "peft"))
    assert lines == ["other GPU: one, then other"]
    assert describe_machines(Results(), after, ("GPU",)) == ["other GPU: unknown, then other"]
