"""The plots of a run: readable in greyscale, one figure for one question."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastlora.bench.clock import EAGER, GRAPH
from fastlora.bench.registry import FLOOR
from fastlora.bench.results import OK, Result, Results
from fastlora.bench.workloads import COPY, FORWARD, GENERATE, MODE_LABELS, STEP

STYLE = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.85", "legend.frameon": False,
    "hatch.linewidth": 0.8,
}  # fmt: skip

# Grey level, hatch, marker and dashes differ, so that nothing depends on colour.
_LOOKS = (
    ("0.05", "", "o", "-"), ("0.95", "", "s", "--"), ("0.8", "///", "^", "-."), ("0.6", "", "D", ":"),
    ("0.95", "...", "v", "--"), ("0.4", "\\\\\\", "P", "-."), ("0.8", "xxx", "X", ":"),
    ("0.7", "--", "*", "-"), ("0.9", "++", "h", "--"),
)  # fmt: skip

Figure = Any


def _ordered(labels: dict[str, str]) -> list[str]:
    """Provider names, fastlora first: its look is the dark one everywhere."""
    return sorted(labels, key=lambda name: (name != "fastlora", "fastlora" not in name))


def _good(results: Results, suite: str, mode: str, schedule: str) -> dict[str, dict[str, Result]]:
    """Case to provider to result."""
    found: dict[str, dict[str, Result]] = {}
    for (case, its_mode, its_schedule), rows in results.blocks().items():
        if rows[0].suite == suite and its_mode == mode and its_schedule == schedule:
            good = {r.provider: r for r in rows if r.status == OK and r.device_ms}
            if FLOOR in good and len(good) > 1:
                found[case] = good
    return found


def _tag(results: Results, case: str) -> str:
    return str(results.cases.get(case, {}).get("tag", ""))


def _size(results: Results, case: str, name: str) -> Any:
    return results.cases[case]["sizes"].get(name)


def ratio_bars(results: Results, suite: str, mode: str, schedule: str) -> Figure | None:
    """Time over the floor for the cases of the table, by shape."""
    wanted = ("table", "cold", "layer", "finetune", "generate", "mixed-training")
    found = {
        case: rows
        for case, rows in _good(results, suite, mode, schedule).items()
        if _tag(results, case) in wanted
    }
    if not found:
        return None
    labels = {
        name: r.label
        for rows in found.values()
        for name, r in rows.items()
        if name not in (FLOOR, COPY)
    }
    names, width = _ordered(labels), 0.8 / len(labels)
    # Groups go downwards, so that a phone scrolls through them and labels need no turning.
    height = 1.6 + len(found) * (0.21 * len(labels) + 0.32)
    figure, axis = plt.subplots(figsize=(7.2, height), constrained_layout=True)
    shown = [results.ratio(r) or 0.0 for rows in found.values() for r in rows.values()]
    limit = min(max(shown) * 1.12, 6.0)
    for i, name in enumerate(names):
        grey, hatch, _, _ = _LOOKS[i % len(_LOOKS)]
        places, lengths = [], []
        for j, rows in enumerate(found.values()):
            ratio = results.ratio(rows[name]) if name in rows else None
            if ratio is not None:
                places.append(j + (i - len(names) / 2 + 0.5) * width)
                lengths.append(ratio)
        bars = [min(length, limit) for length in lengths]
        axis.barh(
            places, bars, width, label=labels[name], color=grey, hatch=hatch, edgecolor="black",
            linewidth=0.8,
        )  # fmt: skip
        for place, length, bar in zip(places, lengths, bars, strict=True):
            words = f"{length:.2f}" + (" →" if length > limit else "")
            axis.text(bar + limit * 0.008, place, words, va="center", fontsize=8)
    axis.axvline(1.0, color="black", linewidth=1.2)
    axis.set_yticks(range(len(found)), [_short_title(results, case) for case in found])
    axis.tick_params(axis="y", labelsize=9)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlim(0, limit * 1.1)
    axis.grid(axis="x")
    axis.grid(visible=False, axis="y")
    how = "in a CUDA graph" if schedule == GRAPH else "eager, host time included"
    axis.set_xlabel(f"{MODE_LABELS[mode]}, {how}: time over the frozen layer alone")
    figure.legend(loc="outside upper left", ncols=2, fontsize=9)
    return figure


def _short_title(results: Results, case: str) -> str:
    title = str(results.cases.get(case, {}).get("title", case))
    return "\n".join(_wrap(title, 26))


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(", "):
        if lines[-1] and len(lines[-1]) + len(word) + 2 > width:
            lines[-1] += ","
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + word
    return lines


def _lines(
    results: Results,
    found: dict[str, dict[str, Result]],
    x_of: Callable[[str], float],
    x_label: str,
    mode: str,
    schedule: str,
) -> Figure | None:
    """Ratio to the floor as lines over a size, with the spread of the samples."""
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    labels = {}
    for case, rows in found.items():
        for name, result in rows.items():
            floor = results.floor_of(result)
            if name in (FLOOR, COPY) or floor is None:
                continue
            labels[name] = result.label
            base, ms = floor.ms.median, result.ms
            point = (x_of(case), ms.median / base, ms.p20 / base, ms.p80 / base)
            points.setdefault(name, []).append(point)
    if not points or max(len(p) for p in points.values()) < 2:
        return None
    figure, axis = plt.subplots(figsize=(7.2, 4.6), constrained_layout=True)
    for i, name in enumerate(_ordered(labels)):
        x, middle, low, high = zip(*sorted(points[name]), strict=True)
        _, _, marker, dashes = _LOOKS[i % len(_LOOKS)]
        grey = ("0.0", "0.35", "0.55")[i % 3]
        axis.plot(
            x, middle, dashes, marker=marker, color=grey, markerfacecolor="white" if i else grey,
            label=labels[name],
        )  # fmt: skip
        axis.fill_between(x, low, high, color=grey, alpha=0.15, linewidth=0)
    axis.axhline(1.0, color="black", linewidth=1.2)
    axis.set_xscale("log", base=2)
    ticks = sorted({point[0] for line in points.values() for point in line})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    highest = max(point[1] for line in points.values() for point in line)
    if highest > 8:
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel(x_label)
    how = "in a CUDA graph" if schedule == GRAPH else "eager"
    axis.set_ylabel(f"time over the frozen layer alone\n({MODE_LABELS[mode]}, {how})")
    figure.legend(loc="outside upper left", ncols=2, fontsize=9)
    return figure


def by_rank(results: Results) -> Figure | None:
    """Cost by rank, 8192 tokens, 4096 -> 4096, no dropout."""
    found = _good(results, "train", STEP, GRAPH)
    pattern = re.compile(r"^train/(rank|table)/8192x4096x4096/r\d+/p0/bf16$")
    found = {case: rows for case, rows in found.items() if pattern.match(case)}
    label = "rank (8192 tokens, 4096 to 4096)"
    return _lines(results, found, lambda c: float(_size(results, c, "R")), label, STEP, GRAPH)


def by_tokens(results: Results) -> Figure | None:
    """Cost by tokens, eager: this is where host time shows."""
    pattern = re.compile(r"^train/(tokens|table)/\d+x4096x4096/r16/p0/bf16$")
    found = {
        case: rows
        for case, rows in _good(results, "train", STEP, EAGER).items()
        if pattern.match(case)
    }
    label = "tokens (4096 to 4096, r = 16)"
    return _lines(results, found, lambda c: float(_size(results, c, "M")), label, STEP, EAGER)


def by_adapters(results: Results) -> Figure | None:
    """Cost by the number of adapters in a batch of 64 rows, cold weights."""
    pattern = re.compile(r"^serve/(adapters|cold)/64x4096x4096/\d+of\d+/r16/mixed/cold/bf16$")
    found = {
        case: rows
        for case, rows in _good(results, "serve", FORWARD, GRAPH).items()
        if pattern.match(case)
    }
    label = "adapters in a batch of 64 rows (4096 to 4096, r = 16, cold)"
    return _lines(results, found, lambda c: float(_size(results, c, "live")), label, FORWARD, GRAPH)


def roofline(results: Results) -> Figure | None:
    """Achieved TFLOP/s over operations per byte, under the two measured ceilings."""
    if not results.ceilings:
        return None
    bandwidth = results.ceilings["copy_gb_per_s"] / 1e3  # TB/s
    peak = results.ceilings["matmul_tflop_per_s"]
    points: dict[str, list[tuple[float, float]]] = {}
    for suite, mode in (("train", STEP), ("serve", FORWARD)):
        for case, rows in _good(results, suite, mode, GRAPH).items():
            flops, moved = results.cases[case]["work"][mode]
            if _size(results, case, "dtype") != "bf16" or (
                "/warm/" in case and flops / moved < 200
            ):
                continue  # another ceiling, and a weight that stays in L2, are not on this roof
            for name in ("fastlora", FLOOR):
                if name in rows:
                    rate = flops / rows[name].ms.median / 1e9
                    points.setdefault(name, []).append((flops / moved, rate))
    if "fastlora" not in points:
        return None
    figure, axis = plt.subplots(figsize=(7.2, 4.6), constrained_layout=True)
    low = min(x for line in points.values() for x, _ in line) / 2
    high = max(x for line in points.values() for x, _ in line) * 2
    ridge = peak / bandwidth
    roof = sorted({low, *([ridge] if low < ridge < high else []), high})
    axis.plot(
        roof, [min(peak, x * bandwidth) for x in roof], color="black",
        label=f"measured: {bandwidth:.2f} TB/s copied, {peak:.0f} TFLOP/s bf16",
    )  # fmt: skip
    for name, marker, face, label in (
        (FLOOR, "s", "white", "frozen layer alone (its time, LoRA's work)"),
        ("fastlora", "o", "0.2", "fastlora"),
    ):
        if name in points:
            x, y = zip(*points[name], strict=True)
            axis.plot(x, y, marker, color="0.1", markerfacecolor=face, label=label, alpha=0.9)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(axis="both")
    axis.set_xlabel("floating-point operations per byte that must move")
    axis.set_ylabel("TFLOP/s, in a CUDA graph")
    figure.legend(loc="outside upper left", fontsize=9)
    return figure


def memory_bars(results: Results, suite: str) -> Figure | None:
    """Peak memory of a step, beyond weights and inputs."""
    mode = GENERATE if suite == "generate" else STEP
    found = _good(results, "model" if suite == "generate" else suite, mode, EAGER)
    cases = [c for c in found if _tag(results, c) in ("table", "layer", "finetune", "generate")]
    if suite == "train":
        cases = [c for c in cases if "/p0.1/" in c] or cases
    rows = {c: {n: r for n, r in found[c].items() if r.peak_bytes and n != COPY} for c in cases}
    rows = {c: r for c, r in rows.items() if len(r) > 1}
    if not rows:
        return None
    labels = {n: r.label for group in rows.values() for n, r in group.items()}
    names, width = _ordered(labels), 0.8 / len(labels)
    height = 1.4 + len(rows) * (0.21 * len(labels) + 0.32)
    figure, axis = plt.subplots(figsize=(7.2, height), constrained_layout=True)
    largest = max((r.peak_bytes or 0) / 2**20 for group in rows.values() for r in group.values())
    for i, name in enumerate(names):
        grey, hatch, _, _ = _LOOKS[i % len(_LOOKS)]
        present = [(j, group[name]) for j, group in enumerate(rows.values()) if name in group]
        places = [j + (i - len(names) / 2 + 0.5) * width for j, _ in present]
        mib = [(r.peak_bytes or 0) / 2**20 for _, r in present]
        axis.barh(
            places, mib, width, label=labels[name], color=grey, hatch=hatch, edgecolor="black",
            linewidth=0.8,
        )  # fmt: skip
        for place, value in zip(places, mib, strict=True):
            axis.text(value + largest * 0.008, place, f"{value:.0f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [_short_title(results, case) for case in rows])
    axis.tick_params(axis="y", labelsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, largest * 1.1)
    axis.grid(axis="x")
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(f"peak MiB of {MODE_LABELS[mode]}, beyond weights and inputs")
    figure.legend(loc="outside upper left", ncols=2, fontsize=9)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def make_plots(results: Results) -> dict[str, tuple[str, bytes]]:
    """Every plot for which there is data.

    Args:
        results (Results): of a run.

    Returns:
        dict: file name without its ending, to a caption and the PNG.
    """
    wanted: list[tuple[str, str, Callable[[], Figure | None]]] = [
        ("train_eager", "One LoRA linear in training, as an eager program sees it.",
         lambda: ratio_bars(results, "train", STEP, EAGER)),
        ("train_graph", "The same in a CUDA graph: GPU time alone.",
         lambda: ratio_bars(results, "train", STEP, GRAPH)),
        ("serve_graph", "Many adapters in one batch.",
         lambda: ratio_bars(results, "serve", FORWARD, GRAPH)),
        ("mixed_training_graph", "Several adapters trained in one batch.",
         lambda: ratio_bars(results, "serve", STEP, GRAPH)),
        ("model_training", "A transformers Llama: forward, backward and optimizer.",
         lambda: ratio_bars(results, "model", STEP, EAGER)),
        ("model_generation", "A transformers Llama: greedy generation, a different adapter each prompt.",
         lambda: ratio_bars(results, "model", GENERATE, EAGER)),
        ("by_rank", "Cost by rank.", lambda: by_rank(results)),
        ("by_tokens", "Cost by the number of tokens.", lambda: by_tokens(results)),
        ("by_adapters", "Cost by the number of adapters.", lambda: by_adapters(results)),
        ("roofline", "Rate against what this card was measured to reach.", lambda: roofline(results)),
        ("memory_train", "Memory of one LoRA linear.", lambda: memory_bars(results, "train")),
        ("memory_model", "Memory of a training step.", lambda: memory_bars(results, "model")),
    ]  # fmt: skip
    made = {}
    with matplotlib.rc_context(STYLE):
        for name, caption, draw in wanted:
            figure = draw()
            if figure is not None:
                made[name] = (caption, png(figure))
    return made
