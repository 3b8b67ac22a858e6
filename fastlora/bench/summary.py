"""What the whole of a run says in a sentence or two."""

from __future__ import annotations

from fastlora.bench.results import Result, Results
from fastlora.bench.workloads import MODE_LABELS

PEERS = {"train": ("eager", "peft", "peft-default"), "serve": ("loop", "bmm")}


def worst_against(results: Results, suite: str, peer: str) -> tuple[float, Result] | None:
    """Where fastlora does worst beside a peer.

    Args:
        results (Results): of a run.
        suite (str): ``"train"`` or ``"serve"``.
        peer (str): a provider's name.

    Returns:
        tuple[float, Result] | None: its time over the peer's, timed in the same turns, and its result.
    """
    found = []
    for mine in results.results.values():
        other = results.results.get((*mine.key[:3], peer))
        if mine.provider != "fastlora" or mine.suite != suite or not mine.device_ms:
            continue
        if other is not None and other.device_ms and other.block == mine.block:
            found.append((mine.ms.median / other.ms.median, mine))
    return max(found, key=lambda pair: pair[0]) if found else None


def worst_cases(results: Results) -> list[str]:
    """For each peer the case of all in which fastlora does worst beside it, in words."""
    lines = []
    for suite, peers in PEERS.items():
        for peer in peers:
            found = worst_against(results, suite, peer)
            if found is None:
                continue
            ratio, mine = found
            other = results.results[(*mine.key[:3], peer)]
            title = results.cases.get(mine.case, {}).get("title", mine.case)
            lines.append(
                f"Worst of all cases beside {other.label}: {ratio:.2f} of its time ({title}; "
                f"{MODE_LABELS[mine.mode]}, {mine.schedule})."
            )
    return lines
