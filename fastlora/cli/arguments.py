"""Types of the options of ``python -m fastlora``: an error says what was expected."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def list_of(parse: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Several of what ``parse`` takes, between commas, each once."""

    def parse_all(text: str) -> tuple[T, ...]:
        return tuple(dict.fromkeys(parse(part.strip()) for part in text.split(",")))

    return parse_all


def shape(text: str) -> tuple[int, int]:
    """in_features and out_features, as in ``4096x14336``."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"expected in_features x out_features, as in 4096x14336, got {text!r}"
        )
    return int(found[1]), int(found[2])


def whole(what: str, least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number within limits; ``what`` names it."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"\d+", text) else -1
        if value < least or (most is not None and value > most):
            limits = f"from {least} on" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected {what} {limits}, got {text!r}")
        return value

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


def probability(text: str) -> float:
    """From 0 to below 1."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a probability from 0 to below 1, got {text!r}")
    return value


def seconds(text: str) -> float:
    """Above 0, and not without an end."""
    return _above_0(text, "seconds")


def rate(text: str) -> float:
    """Above 0, and finite."""
    return _above_0(text, "a number")


def _above_0(text: str, what: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected {what} above 0, got {text!r}")
    return value
