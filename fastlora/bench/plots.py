"""The plots of a run: readable in greyscale, one figure for one question."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastlora.bench.clock import EAGER, GRAPH
from fastlora.bench.registry import FLOOR
from fastlora.bench.results import OK, Result, Results
from fastlora.bench.workloads import COPY, FORWARD, GENERATE, MODE_LABELS, STEP

STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.85", "legend.frameon": False,
    "legend.fontsize": 9, "legend.handlelength": 3,
}  # fmt: skip

# Marker and dashes differ as well as the grey, so that nothing depends on colour.
_LOOKS = (
    ("0.05", "o", "-"), ("1.0", "s", "--"), ("0.75", "^", "-."), ("1.0", "D", ":"), ("0.5", "v", "--"),
    ("0.5", "P", "-."), ("1.0", "X", ":"), ("0.75", "p", "-"), ("0.75", "h", "--"),
)  # fmt: skip

WIDTH = 4.0  # inches: on a phone's screen the text is still of a readable size
Figure = Any


def _legend(label: str) -> str:
    """A provider's label as it is written: no mathematics, and no longer than a line."""
    return textwrap.fill(label, 48).replace("$", r"\$")


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


def ratio_dots(results: Results, suite: str, mode: str, schedule: str) -> Figure | None:
    """Time over the floor for the cases of the table: a row for each, a mark for each provider."""
    wanted = ("table", "cold", "layer", "finetune", "generate", "mixed-training")
    found = {
        case: rows
        for case, rows in _good(results, suite, mode, schedule).items()
        if _tag(results, case) in wanted
    }
    values = {
        case: {
            name: results.ratio(r) or 0.0 for name, r in rows.items() if name not in (FLOOR, COPY)
        }
        for case, rows in found.items()
    }
    how = "in a CUDA graph" if schedule == GRAPH else "eager, with host time"
    label = f"time over the frozen layer alone\n({MODE_LABELS[mode]}, {how})"
    return _dots(results, values, _labels(found), label, floor=1.0)


def _labels(found: dict[str, dict[str, Result]]) -> dict[str, str]:
    """Provider to label, without what is no provider."""
    return {
        name: result.label
        for rows in found.values()
        for name, result in rows.items()
        if name not in (FLOOR, COPY)
    }


def _dots(
    results: Results,
    values: dict[str, dict[str, float]],
    labels: dict[str, str],
    label: str,
    floor: float | None = None,
) -> Figure | None:
    """A row for each case, a mark for each provider, the number beside fastlora's."""
    if not values or not labels:
        return None
    names = _ordered(labels)
    titles = [_wrap(str(results.cases.get(case, {}).get("title", case)), 54) for case in values]
    rows = list(zip(titles, values.values(), strict=True))
    # y is in inches: a row's title, the line with its marks, the number.
    ends = list(accumulate(0.55 + 0.15 * title.count("\n") for title in titles))
    lines = [end - 0.3 for end in ends]
    height = 0.9 + 0.2 * len(names) + ends[-1]
    figure, axis = plt.subplots(figsize=(WIDTH, height), constrained_layout=True)
    largest = max(value for row in values.values() for value in row.values())
    smallest = min(value for row in values.values() for value in row.values())
    logarithmic = largest > 6 * (floor or smallest)
    if logarithmic:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.set_xlim(min(smallest, floor or smallest) / 1.5, largest * 1.25)
    else:
        reach = max(largest - (floor or 0.0), 0.1)
        axis.set_xlim(min(floor or 0.0, smallest) - 0.08 * reach, largest + 0.08 * reach)
    for i, name in reversed(list(enumerate(names))):
        grey, marker, _ = _LOOKS[i % len(_LOOKS)]
        places = [(row[name], y) for (_, row), y in zip(rows, lines, strict=True) if name in row]
        if places:
            x, y = zip(*places, strict=True)
            # Each lies on those after it, and is smaller: what is below is seen around it.
            axis.plot(
                x, y, marker, color="black", markerfacecolor=grey, markersize=8 + 0.5 * i if i else 6,
                linestyle="none", label=_legend(labels[name]), zorder=3 + len(names) - i,
            )  # fmt: skip
    above_lines = {
        "textcoords": "offset points", "fontsize": 9, "zorder": 2,
        "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    }  # fmt: skip
    left = axis.get_xlim()[0]
    for (title, row), place in zip(rows, lines, strict=True):
        axis.plot((min(row.values()), max(row.values())), (place, place), color="0.75", zorder=1)
        axis.annotate(title, (left, place), (0, 7), ha="left", va="bottom", **above_lines)
        if names[0] in row:
            value = row[names[0]]
            words = f"{value:.2f}" if value < 100 else f"{value:.0f}"
            axis.annotate(words, (value, place), (0, -6), ha="center", va="top", **above_lines)
    if floor is not None:
        axis.axvline(floor, color="black", linewidth=1.2, zorder=1)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_ylim(ends[-1], -0.1)
    axis.grid(axis="x")
    axis.set_xlabel(label)
    handles, words = axis.get_legend_handles_labels()
    figure.legend(handles[::-1], words[::-1], loc="outside upper left")
    return figure


def _wrap(text: str, width: int) -> str:
    """Lines that end at a comma."""
    lines = [""]
    for word in text.split(", "):
        if lines[-1] and len(lines[-1]) + len(word) + 2 > width:
            lines[-1] += ","
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + word
    return "\n".join(lines)


def _lines(
    results: Results, suite: str, mode: str, schedule: str, cases: str, size: str, x_label: str
) -> Figure | None:
    """Ratio to the floor as lines over a size, with the spread of the samples."""
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    labels = {}
    for case, rows in _good(results, suite, mode, schedule).items():
        if not re.fullmatch(cases, case):
            continue
        for name, result in rows.items():
            floor = results.floor_of(result)
            if name in (FLOOR, COPY) or floor is None:
                continue
            labels[name] = result.label
            base, ms = floor.ms.median, result.ms
            point = (
                float(_size(results, case, size)),
                ms.median / base,
                ms.p20 / base,
                ms.p80 / base,
            )
            points.setdefault(name, []).append(point)
    if not points or max(len(p) for p in points.values()) < 2:
        return None
    figure, axis = plt.subplots(figsize=(WIDTH, 2.9 + 0.2 * len(points)), constrained_layout=True)
    for i, name in enumerate(_ordered(labels)):
        x, middle, low, high = zip(*sorted(points[name]), strict=True)
        _, marker, dashes = _LOOKS[i % len(_LOOKS)]
        grey = ("0.0", "0.35", "0.55")[i % 3]
        axis.plot(
            x, middle, dashes, marker=marker, color=grey, markerfacecolor="white" if i else grey,
            label=_legend(labels[name]),
        )  # fmt: skip
        axis.fill_between(x, low, high, color=grey, alpha=0.15, linewidth=0)
    axis.axhline(1.0, color="black", linewidth=1.2)
    axis.set_xscale("log", base=2)
    ticks = _apart(sorted({point[0] for line in points.values() for point in line}))
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    highest = max(point[1] for line in points.values() for point in line)
    if highest > 8:
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel(x_label)
    how = "in a CUDA graph" if schedule == GRAPH else "eager"
    words = f"time over the frozen layer alone\n({MODE_LABELS[mode]}, {how})"
    axis.set_title(words, loc="left", fontsize="medium")
    figure.legend(loc="outside upper left")
    return figure


def _apart(ticks: list[float]) -> list[float]:
    """Those whose labels do not touch on a logarithmic axis."""
    least = math.log(ticks[-1] / ticks[0]) / 9
    kept = ticks[:1]
    for tick in ticks[1:]:
        if math.log(tick / kept[-1]) > least:
            kept.append(tick)
    return kept


def by_rank(results: Results) -> Figure | None:
    """Cost by rank, 8192 tokens, 4096 -> 4096, no dropout."""
    cases = r"train/(rank|table)/8192x4096x4096/r\d+/p0/bf16"
    label = "rank (8192 tokens, 4096 to 4096)"
    return _lines(results, "train", STEP, GRAPH, cases, "R", label)


def by_tokens(results: Results) -> Figure | None:
    """Cost by tokens, eager: this is where host time shows."""
    cases = r"train/(tokens|table)/\d+x4096x4096/r16/p0/bf16"
    return _lines(results, "train", STEP, EAGER, cases, "M", "tokens (4096 to 4096, r = 16)")


def by_adapters(results: Results) -> Figure | None:
    """Cost by the number of adapters in a batch of 64 rows, cold weights."""
    cases = r"serve/(adapters|cold)/64x4096x4096/\d+of\d+/r16/mixed/cold/bf16"
    label = "adapters in a batch of 64 rows, cold"
    return _lines(results, "serve", FORWARD, GRAPH, cases, "live", label)


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
    figure, axis = plt.subplots(figsize=(WIDTH, 2.9 + 0.2 * len(points)), constrained_layout=True)
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
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.minorticks_off()
    axis.grid(axis="both")
    axis.set_xlabel("floating-point operations per byte that must move")
    axis.set_title("TFLOP/s, in a CUDA graph", loc="left", fontsize="medium")
    figure.legend(loc="outside upper left")
    return figure


def memory_dots(results: Results, suite: str) -> Figure | None:
    """Peak memory of a step, beyond weights and inputs."""
    mode = STEP
    found = _good(results, suite, mode, EAGER)
    cases = [c for c in found if _tag(results, c) in ("table", "layer", "finetune")]
    if suite == "train":
        cases = [c for c in cases if "/p0.1/" in c] or cases
    rows = {c: {n: r for n, r in found[c].items() if r.peak_bytes and n != COPY} for c in cases}
    rows = {c: r for c, r in rows.items() if len(r) > 1}
    if not rows:
        return None
    values = {
        case: {n: (r.peak_bytes or 0) / 2**20 for n, r in group.items() if n != FLOOR}
        for case, group in rows.items()
    }
    label = f"peak MiB of {MODE_LABELS[mode]},\nbeyond weights and inputs"
    return _dots(results, values, _labels(found), label)


def png(figure: Figure) -> bytes:
    """The figure as a file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
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
         lambda: ratio_dots(results, "train", STEP, EAGER)),
        ("train_graph", "The same in a CUDA graph: GPU time alone.",
         lambda: ratio_dots(results, "train", STEP, GRAPH)),
        ("serve_graph", "Many adapters in one batch.",
         lambda: ratio_dots(results, "serve", FORWARD, GRAPH)),
        ("mixed_training_graph", "Several adapters trained in one batch.",
         lambda: ratio_dots(results, "serve", STEP, GRAPH)),
        ("model_training", "A transformers Llama: forward, backward and optimizer.",
         lambda: ratio_dots(results, "model", STEP, EAGER)),
        ("model_generation", "A transformers Llama: greedy generation, a different adapter each prompt.",
         lambda: ratio_dots(results, "model", GENERATE, EAGER)),
        ("by_rank", "Cost by rank.", lambda: by_rank(results)),
        ("by_tokens", "Cost by the number of tokens.", lambda: by_tokens(results)),
        ("by_adapters", "Cost by the number of adapters.", lambda: by_adapters(results)),
        ("roofline", "Rate against what this card was measured to reach.", lambda: roofline(results)),
        ("memory_train", "Memory of one LoRA linear.", lambda: memory_dots(results, "train")),
        ("memory_model", "Memory of a training step.", lambda: memory_dots(results, "model")),
    ]  # fmt: skip
    made = {}
    with matplotlib.rc_context(STYLE):
        for name, caption, draw in wanted:
            figure = draw()
            if figure is not None:
                made[name] = (caption, png(figure))
    return made
