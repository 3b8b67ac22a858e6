"""Draw forward + backward over the frozen floor from results of ``python -m fastlora bench``.

``python benchmarks/plot_bench.py benchmarks/results/h100-2026-11-25-train.jsonl docs/h100_lora_linear.png``

The results may also be a folder that the command wrote: the cases of the train suite's table are drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if importlib.util.find_spec("fastlora") is None:  # a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from fastlora.bench.clock import EAGER
from fastlora.bench.registry import FLOOR
from fastlora.bench.results import load
from fastlora.bench.workloads import STEP

HATCHES = ("", "", "///", "...", "xx", "\\\\\\", "+")  # greys alone are too like each other


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    results = load(args.data)
    found = {
        case: [row for row in rows if row.provider != FLOOR]
        for (case, mode, schedule), rows in results.blocks().items()
        if case.startswith("train/table/") and (mode, schedule) == (STEP, EAGER)
    }
    if not found:
        raise SystemExit(f"{args.data}: no case of the train suite's table")
    labels = list(dict.fromkeys(row.label for rows in found.values() for row in rows))
    figure, axis = plt.subplots(figsize=(10, 4.2), constrained_layout=True)
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        ratios = [
            next((results.ratio(row) for row in rows if row.label == label), None)
            for rows in found.values()
        ]
        places = [j + (i - len(labels) / 2 + 0.5) * width for j in range(len(found))]
        heights = [ratio or 0.0 for ratio in ratios]
        grey = str(0.4 + 0.6 * i / len(labels)) if i else "black"
        hatch = HATCHES[i % len(HATCHES)]
        axis.bar(places, heights, width, label=label, color=grey, edgecolor="black", hatch=hatch)
    axis.axhline(1.0, color="black", linewidth=1)
    sizes = [results.cases[case]["sizes"] for case in found]
    tokens = {size["M"] for size in sizes}
    between = "\n" if len(found) > 8 else ""
    names = [
        f"{size['K']}{between}->{size['N']}\np={size['p']:g}"
        + (f"\n{size['M']}\ntokens" if len(tokens) > 1 else "")
        for size in sizes
    ]
    axis.set_xticks(range(len(found)), names, fontsize="small" if len(tokens) > 1 else None)
    axis.set_ylabel("forward + backward, x frozen floor")
    machine = results.runs[-1]["machine"]
    what = f"{tokens.pop()} tokens, " if len(tokens) == 1 else ""
    figure.supxlabel(
        f"{what}r={sizes[0]['R']}, {sizes[0]['dtype']}: "
        f"{machine['GPU']}, torch {machine['torch']}, triton {machine['triton']}",
        fontsize="medium",
    )
    figure.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
