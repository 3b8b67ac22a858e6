"""The tables and plots of README.md and docs/, from the results that are kept in ``benchmarks/results/``.

``python benchmarks/tables.py h200-2026-11-29`` prints every table of a set of results, ``--write`` puts them
between the ``<!-- tables NAME -->`` and ``<!-- end -->`` lines of the pages that name the set in a line
``<!-- results SET -->``, and draws its plots. ``--take`` keeps new results first:
``python benchmarks/tables.py h200-2026-11-29 --take out/train out/serve --write``.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastlora.bench.cases import TRAIN_TABLE, ModelCase, ServeCase, TrainCase, suites
from fastlora.bench.clock import EAGER, GRAPH
from fastlora.bench.plots import make_plots
from fastlora.bench.registry import FLOOR
from fastlora.bench.results import FILE, OK, Result, Results, load
from fastlora.bench.stats import spread
from fastlora.bench.summary import worst_cases
from fastlora.bench.workloads import COPY, FORWARD, MODE_LABELS, STEP

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/performance.md", "docs/performance_h100.md")
PLOTS = ("train_graph", "serve_graph", "memory_train")

PEER_GPU = "H100"
PEERS = ("vLLM", "SGLang csgmv", "SGLang triton_v2")
PEER_US = {
    (16, 16, 4096, 4096): (8.9, 23.9, 25.7, 17.3),
    (64, 16, 4096, 4096): (8.9, 43.1, 34.2, 25.5),
    (64, 16, 4096, 14336): (44.7, 99.8, 80.0, 60.9),
    (256, 16, 4096, 4096): (16.2, 59.3, 44.4, 37.7),
    (64, 64, 4096, 4096): (8.8, 83.7, 63.9, 39.1),
    (8192, 16, 4096, 4096): (347.0, 585.0, 669.0, 438.0),
    (8192, 16, 4096, 14336): (1322.0, 1893.0, 2286.0, 1592.0),
}
"""Rows, rank, K, N to us of the base product and of each peer, measured before fastlora was begun: one H100,
torch 2.11, triton 3.6, bf16, CUDA graphs, warm. No samples of them were kept."""

Row = list[str]


def table(header: Row, rows: list[Row]) -> str:
    """A Markdown table, nothing without rows; columns in which no row has anything are left out."""
    if not rows:
        return ""
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[header[i] for i in used], ["---"] * len(used)]
    lines += [[row[i] or "-" for i in used] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def providers_of(results: Results, suite: str) -> dict[str, str]:
    """Name to label, of those that were measured."""
    found = {
        r.provider: r.label
        for r in results.results.values()
        if r.suite == suite and r.device_ms and r.provider not in (FLOOR, COPY)
    }
    return dict(sorted(found.items(), key=lambda item: item[0] != "fastlora"))


def get(results: Results, case: str, mode: str, schedule: str, provider: str) -> Result | None:
    result = results.results.get((case, mode, schedule, provider))
    return result if result is not None and result.status == OK and result.device_ms else None


def ratio(results: Results, result: Result | None) -> str:
    value = results.ratio(result) if result else None
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def us_of(result: Result) -> str:
    us = result.ms.median * 1e3
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def train_cases() -> list[TrainCase]:
    return [TrainCase("table", *sizes, p=p) for sizes in TRAIN_TABLE for p in (0.0, 0.1)]


def name_of(case: TrainCase) -> str:
    tokens = "" if TRAIN_TABLE[0][0] == case.M else f", {case.M} tokens"
    return f"{case.K} → {case.N}{tokens}, p={case.p:g}"


def missing(cases: Iterable[TrainCase | ServeCase], results: Results, mode: str) -> str:
    """A line that names the rows of a table for which there is no result."""
    names = [
        name_of(case) if isinstance(case, TrainCase) else f"{case.title} ({case.tag})"
        for case in cases
        if not get(results, case.id, mode, EAGER, "fastlora")
        and not get(results, case.id, mode, GRAPH, "fastlora")
    ]
    return f"\n\nNot measured in this run: {'; '.join(names)}." if names else ""


def ratio_rows(
    results: Results,
    cases: Iterable[TrainCase],
    label: Callable[[TrainCase], str],
    mode: str,
    providers: Iterable[str],
) -> list[Row]:
    """Of each case that was measured, the floor in ms and ratios to it: eager, and in a CUDA graph."""
    rows = []
    for case in cases:
        floor = get(results, case.id, mode, EAGER, FLOOR)
        if floor is None:
            continue
        row = [label(case), f"{floor.ms.median:.3f}"]
        for name in providers:
            eager, graph = (
                ratio(results, get(results, case.id, mode, how, name)) for how in (EAGER, GRAPH)
            )
            row.append(f"{eager} ({graph or '-'})" if eager else "")
        rows.append(row)
    return rows


def train(results: Results, mode: str = STEP) -> str:
    """Ratios to the floor, eager and in a CUDA graph."""
    providers = providers_of(results, "train")
    rows = ratio_rows(results, train_cases(), name_of, mode, providers)
    header = ["in → out", "floor, ms", *providers.values()]
    return table(header, rows) + missing(train_cases(), results, mode)


def train_forward(results: Results) -> str:
    return train(results, FORWARD)


def sweep(results: Results) -> str:
    """The same of every case outside of the table."""
    labels = providers_of(results, "train")
    shown = {n: labels[n] for n in ("fastlora", "eager", "peft", "peft-fastlora") if n in labels}
    others = [c for c in suites()["train"] if isinstance(c, TrainCase) and c.tag != "table"]
    rows = ratio_rows(results, others, lambda case: case.title, STEP, shown)
    return table(["case", "floor, ms", *shown.values()], rows)


def memory(results: Results) -> str:
    """MiB of a step: peak beyond weights and inputs, and what a forward keeps for backward."""
    providers = {FLOOR: "floor", **providers_of(results, "train")}
    rows = []
    for case in train_cases():
        row = [name_of(case)]
        for name in providers:
            found = get(results, case.id, STEP, EAGER, name)
            peak = f"{(found.peak_bytes or 0) / 2**20:.0f}" if found else ""
            saved = found.saved_bytes if found else None
            row.append(peak + (f" / {saved / 2**20:.4g}" if saved is not None else ""))
        if any(row[1:]):
            rows.append(row)
    return table(["in → out", *providers.values()], rows)


def host(results: Results) -> str:
    """Host time of an eager step, us, and fastlora's over that of PEFT."""
    providers = {FLOOR: "floor", **providers_of(results, "train")}
    rows = []
    for case in train_cases():
        us = {}
        for name in providers:
            found = get(results, case.id, STEP, EAGER, name)
            if found and found.host_ms:
                us[name] = spread(found.host_ms).median * 1e3
        if us:
            both = "fastlora" in us and "peft" in us
            last = f"{us['fastlora'] / us['peft']:.2f}" if both else ""
            row = [name_of(case), *(f"{us[n]:.0f}" if n in us else "" for n in providers), last]
            rows.append(row)
    return table(["in → out", *providers.values(), "fastlora / PEFT in x's dtype"], rows)


def serve_cases(*tags: str) -> list[ServeCase]:
    return [c for c in suites()["serve"] if isinstance(c, ServeCase) and c.tag in tags]


def serve_rows(results: Results, cases: list[ServeCase], schedule: str, mode: str = FORWARD) -> str:
    providers = providers_of(results, "serve")
    rows = []
    for case in cases:
        floor = get(results, case.id, mode, schedule, FLOOR)
        if floor is None:
            continue
        row = [case.title, us_of(floor)]
        for name in providers:
            found = get(results, case.id, mode, schedule, name)
            row.append(f"{us_of(found)} ({ratio(results, found)})" if found else "")
        rows.append(row)
    return table(["rows", "base, us", *providers.values()], rows) + missing(cases, results, mode)


def serve(results: Results) -> str:
    """The rows of the table in a CUDA graph, beside the peers' times."""
    rows, behind, measured = [], 0, 0
    for case in serve_cases("table"):
        floor = get(results, case.id, FORWARD, GRAPH, FLOOR)
        mine = get(results, case.id, FORWARD, GRAPH, "fastlora")
        if floor is None or mine is None:
            continue
        base, *peers = PEER_US[(case.M, case.R, case.K, case.N)]
        us = mine.ms.median * 1e3
        measured += 1
        behind += us > 1.01 * min(peers)
        row = [case.title, us_of(floor), f"{us_of(mine)} ({ratio(results, mine)})"]
        rows.append([*row, f"{base:g}", *(f"{p:g} ({p / base:.2f})" for p in peers)])
    same = all(PEER_GPU in run["machine"]["GPU"] for run in results.runs)
    peers_base = "base of the peers' run" + ("" if same else f", {PEER_GPU}")
    header = ["rows", "base, us", "fastlora, us", peers_base, *PEERS]
    words = (
        f"\n\nfastlora is more than 1 % slower than the fastest of the three peers in {behind} of "
        f"{measured} rows."
        if same
        else f"\n\nThe peers ran on an {PEER_GPU}: their times are not to be compared with these."
    )
    lacking = missing(serve_cases("table"), results, FORWARD)
    return table(header, rows) + words + lacking


def serve_graph(results: Results) -> str:
    return serve_rows(
        results, serve_cases("table", "cold", "requests", "random", "base", "slots"), GRAPH
    )


def serve_eager(results: Results) -> str:
    return serve_rows(results, serve_cases("table"), EAGER)


def mixed_training(results: Results) -> str:
    return serve_rows(results, serve_cases("mixed-training"), GRAPH, STEP)


def model(results: Results, kind: str) -> str:
    """Tokens a second and peak GiB of whole models: training, generating, or of one decoder layer."""
    providers = {FLOOR: "frozen floor", **providers_of(results, "model")}
    rows = []
    for case in (c for c in suites()["model"] if isinstance(c, ModelCase) and c.kind == kind):
        for mode in ("step", "generate", "forward"):
            row = [f"{case.title}; {MODE_LABELS[mode]}"]
            for name in providers:
                found = get(results, case.id, mode, EAGER, name)
                rate = f"{case.tokens / found.ms.median * 1e3:.0f}" if found else ""
                peak = f" / {found.peak_bytes / 2**30:.1f}" if found and found.peak_bytes else ""
                row.append(rate + peak)
            if any(row[2:]):
                rows.append(row)
    return table(["case", *providers.values()], rows)


def worst(results: Results) -> str:
    return "\n".join(f"- {line}" for line in worst_cases(results))


def machine(results: Results) -> str:
    """What ran, on what, in words, with the commands."""
    shown = ("GPU", "driver", "Python", "torch", "triton", "peft", "transformers", "loralib")
    seen: dict[str, None] = {}
    counts = {len(r.device_ms) for r in results.results.values() if r.device_ms}
    for run in results.runs:
        facts = ", ".join(f"{k} {v}" for k, v in run["machine"].items() if k in shown)
        at = f"{run['started'][:10]}, commit {run['note'] or run['machine'].get('git commit')}"
        seen[f"{facts.removeprefix('GPU ')}; {at}."] = None
    samples = f"{' or '.join(map(str, sorted(counts, reverse=True)))} samples of each callable."
    commands = dict.fromkeys(run["command"] for run in results.runs)
    return "\n".join([*seen, samples, "", "```bash", *commands, "```"])


def sizes_of(key: str) -> str:
    M, K, N = (int(word) for word in re.findall(r"\d+", key))
    return f"{M} tokens, {K} → {N}"


def kernels(content: Any) -> str:
    """Single kernels, us, beside the cuBLAS products that they hold."""
    columns = {
        "cublas_f": "x W0ᵀ, cuBLAS", "fwd": "y", "shrink": "s", "shrink_d": "s, p=0.1",
        "cublas_b": "dy W0, cuBLAS", "grad_x": "dx", "grad_x_d": "dx, p=0.1",
        "grad_b": "dB and ds", "grad_a": "dA", "grad_a_d": "dA, p=0.1", "copy_x": "a copy of x",
    }  # fmt: skip
    found = {key: us for key, us in content.items() if not key.startswith("eager")}
    rows = [[sizes_of(key), *(f"{us[c]:.1f}" for c in columns)] for key, us in found.items()]
    return table(["shape", *columns.values()], rows)


def overlap(content: Any) -> str:
    """Split against the fastest variant of kernels that run beside the GEMM, us."""
    rows = []
    words = {"F": "forward", "Fd": "forward, p=0.1", "B": "backward", "Bd": "backward, p=0.1"}
    for key, us in content.items():
        for short, what in words.items():
            variants = {
                k.partition(".")[2]: v
                for k, v in us.items()
                if k.startswith(f"{short}.") and not k.endswith(".old")
            }
            best = min(variants, key=lambda k: variants[k])
            old, new = us[f"{short}.old"], variants[best]
            floor = us["cf" if short[0] == "F" else "cb"]
            change = f"{(new / old - 1) * 100:+.1f} %"
            row = [sizes_of(key), what, f"{floor:.1f}", f"{old:.1f}", f"{new:.1f}", best, change]
            rows.append(row)
    header = [
        "shape",
        "pass",
        "cuBLAS",
        "one after the other",
        "beside the GEMM",
        "variant",
        "change",
    ]
    return table(header, rows)


def layers(content: Any) -> str:
    """The other layers: eager and graph ms, medians, and in brackets over the plain call; host ms."""
    rows = []
    for kind, calls in content["eager"].items():
        plain = {how: ms_of(content[how][kind]["plain"]) for how in ("eager", "graphs")}
        for name, samples in calls.items():
            row = [kind.replace("_", " "), name]
            for how, base in plain.items():
                ms = ms_of(content[how][kind][name])
                row.append(f"{ms:.3f} ({ms / base:.2f})")
            rows.append([*row, f"{spread(samples['host_ms']).median:.3f}"])
    return table(["layer", "call", "ms", "ms, CUDA graph", "host ms"], rows)


def ms_of(samples: Any) -> float:
    return spread(samples["device_ms"]).median


SUITE_TABLES: dict[str, dict[str, Callable[[Results], str]]] = {
    "train": {"train": train, "train-forward": train_forward, "sweep": sweep, "train-sweep": sweep,
              "memory": memory, "host": host, "train-worst": worst, "train-run": machine},
    # The other cases, where they were measured on other sources than the table.
    "sweep": {"sweep": sweep, "sweep-worst": worst, "sweep-run": machine},
    "train-rest": {"rest": sweep, "rest-run": machine},
    "serve": {"serve": serve, "serve-graph": serve_graph, "serve-eager": serve_eager,
              "mixed-training": mixed_training,
              "serve-worst": worst, "serve-run": machine},
    "model": {
        "model": functools.partial(model, kind="finetune"), "model-run": machine,
        "decoder-layer": functools.partial(model, kind="layer"),
        "generation": functools.partial(model, kind="generate"),
    },
    # A whole step, likewise.
    "training-step": {"training-step": functools.partial(model, kind="finetune"),
                      "training-step-run": machine},
    "generation": {"generation-64": functools.partial(model, kind="generate"),
                   "generation-64-run": machine},
    "checkpointing": {"checkpointing": functools.partial(model, kind="finetune"),
                      "checkpointing-run": machine},
}  # fmt: skip
OTHER_TABLES: dict[str, Callable[[Any], str]] = {
    "kernels": kernels, "overlap": overlap, "layers": layers,
}  # fmt: skip


def take(folders: list[Path], name: str) -> list[Path]:
    """Keep the results of folders, one file for each suite, in the place of what it held.

    Folders of one suite are joined, the later ones winning. The output folder and the machine's kernel are
    left out: neither is a fact of a result.
    """
    kept: dict[Path, list[str]] = {}
    sources: dict[Path, set[str]] = {}
    for folder in folders:
        results = load(folder)
        found = sorted({r.suite for r in results.results.values()})
        if len(found) != 1:
            raise SystemExit(f"{folder}: expected results of one suite, got {found or 'none'}")
        path = KEPT / f"{name}-{found[0]}.jsonl"
        sources.setdefault(path, set()).update(run["machine"]["sources"] for run in results.runs)
        if len(sources[path]) > 1:
            raise SystemExit(f"{folder}: other sources than the folders of {found[0]} before it")
        for line in (folder / FILE).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["type"] == "run":
                record["command"] = re.sub(r" --out \S+", "", record["command"])
                record.pop("platform", None)
            kept.setdefault(path, []).append(json.dumps(record) + "\n")
    for path, lines in kept.items():
        path.write_text("".join(lines), encoding="utf-8")
    return list(kept)


def make_tables(name: str) -> dict[str, str]:
    """Every table for which ``benchmarks/results/NAME-*`` has data."""
    made = {}
    for suite, functions in SUITE_TABLES.items():
        path = KEPT / f"{name}-{suite}.jsonl"
        if path.exists():
            results = load(path)
            made.update({key: function(results) for key, function in functions.items()})
    for key, function in OTHER_TABLES.items():
        path = KEPT / f"{name}-{key}.json"
        if path.exists():
            made[key] = function(json.loads(path.read_text(encoding="utf-8")))
    return made


def fill(text: str, tables: dict[str, str]) -> str:
    """A page with its tables; where there is no data for one, it says so."""
    pattern = re.compile(r"(<!-- tables ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    lacking = "Not measured in this run."
    return pattern.sub(lambda m: f"{m[1]}\n{(tables.get(m[2]) or lacking).strip()}\n\n{m[3]}", text)


def set_of(text: str) -> str:
    """The set of results that a page names."""
    found = re.search(r"<!-- results (\S+) -->", text)
    if found is None:
        raise SystemExit("a page must name its results: <!-- results SET -->")
    return found[1]


def small(picture: bytes) -> bytes:
    """A greyscale picture in 16 greys: a fifth of its size."""
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("L").quantize(16).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def draw(name: str) -> None:
    """The suite's plots, as ``docs/CARD_*.png``: the name of the set up to its date."""
    card = name.partition("-")[0]
    for suite in ("train", "serve", "model"):
        path = KEPT / f"{name}-{suite}.jsonl"
        if not path.exists():
            continue
        for key, (_, content) in make_plots(load(path)).items():
            if key in PLOTS:
                (ROOT / "docs" / f"{card}_{key}.png").write_bytes(small(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="of a set of results, such as h200-2026-11-29")
    parser.add_argument("--take", type=Path, nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--write", action="store_true", help="rewrite the tables and plots of docs")
    args = parser.parse_args()
    for path in take(args.take, args.name):
        print(f"kept {path.relative_to(ROOT)}", file=sys.stderr)
    tables = make_tables(args.name)
    if not tables:
        raise SystemExit(f"no results {KEPT.relative_to(ROOT)}/{args.name}-*")
    if args.write:
        texts = {ROOT / page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
        mine = {page: text for page, text in texts.items() if set_of(text) == args.name}
        if not mine:
            raise SystemExit(
                f"none of {', '.join(PAGES)} is of {args.name}: put <!-- results {args.name} --> into one"
            )
        for page, text in mine.items():
            page.write_text(fill(text, tables), encoding="utf-8")
        draw(args.name)
    else:
        print("\n\n".join(f"## {key}\n\n{text}" for key, text in tables.items()))


if __name__ == "__main__":
    main()
