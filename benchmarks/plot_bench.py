"""Draw forward + backward over the frozen floor from a file of ``python -m fastlora bench --json``.

``python benchmarks/plot_bench.py benchmarks/results/h100_lora_linear.json docs/h100_lora_linear.png``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEP = "forward + backward"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    content = json.loads(args.data.read_text(encoding="utf-8"))
    cases = content["cases"]
    labels = [row["label"] for row in cases[0]["rows"][1:]]  # the first is the floor itself
    figure, axis = plt.subplots(figsize=(10, 4.2), constrained_layout=True)
    width = 0.8 / len(labels)
    greys = [str(i / len(labels)) for i in range(len(labels))]
    for i, label in enumerate(labels):
        found = [
            next((r["x_floor"].get(STEP) for r in case["rows"] if r["label"] == label), None)
            for case in cases
        ]
        places = [j + (i - len(labels) / 2 + 0.5) * width for j in range(len(cases))]
        heights = [value or 0.0 for value in found]
        axis.bar(places, heights, width, label=label, color=greys[i], edgecolor="black")
    axis.axhline(1.0, color="black", linewidth=1)
    names = [f"{c['case']['K']}->{c['case']['N']}\np={c['case']['p']:g}" for c in cases]
    axis.set_xticks(range(len(cases)), names)
    axis.set_ylabel(f"{STEP}, x frozen floor")
    first = cases[0]["case"]
    axis.set_title(
        f"{first['M']} tokens, r={first['R']}, {first['dtype'].removeprefix('torch.')}: "
        f"{content['machine']['GPU']}, torch {content['machine']['torch']}, "
        f"triton {content['machine']['triton']}"
    )
    axis.legend(ncols=3, fontsize="small")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
