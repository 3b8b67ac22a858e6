"""One HTML page of a run: it holds its plots and asks no network for anything."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from fastlora.bench.clock import EAGER, GRAPH
from fastlora.bench.plots import make_plots
from fastlora.bench.registry import FLOOR
from fastlora.bench.results import OK, Result, Results
from fastlora.bench.stats import spread
from fastlora.bench.summary import worst_cases
from fastlora.bench.workloads import COPY, MODE_LABELS, STEP

PAGE = "report.html"

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: #111;
  background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.plots { display: grid; gap: 1.6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; max-width: 36rem; } figure img { display: block; width: 100%; height: auto; }
figcaption { margin-bottom: .4rem; font-weight: 600; }
details { margin: .8rem 0; } summary { cursor: pointer; }
.scroll { overflow: auto; max-height: 85vh; border: 1px solid #767676; }
table { border-collapse: separate; border-spacing: 0; font-size: .82rem; font-variant-numeric: tabular-nums;
  width: 100%; }
th, td { padding: .2rem .4rem; text-align: right; white-space: nowrap; border-top: 1px solid #e4e4e4; }
th { position: sticky; top: 0; z-index: 2; border-top: 0; background: #eee; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; }
td:first-child { white-space: normal; min-width: 10.5rem; max-width: 16rem; background: #fff; z-index: 1; }
th:first-child { z-index: 3; }
tr.case td { background: #f6f6f6; font-weight: 600; max-width: none; }
tr.case span { position: sticky; left: .4rem; display: inline-block; max-width: calc(100vw - 3rem); }
tr.ours td { font-weight: 600; }
dl { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: .1rem .8rem; font-size: .9rem; }
dt { color: #555; } dd { margin: 0; }
p, ul, dl { max-width: 46rem; } ul { padding-left: 1.2rem; }
nav a { margin-right: .9rem; line-height: 1.9; white-space: nowrap; display: inline-block; }
a { color: #0a3d91; } .lead { font-size: 1.05rem; }
@media print { .scroll { max-height: none; } }
"""

_HOW = """
Every provider was checked against the fp32 reference before it was timed: output and gradients, without
dropout where its mask is its own. The callables of a case take turns, a sample of each in every round, so
that a clock that drifts hits all alike. Eager samples lie between two CUDA events in the middle of a program
(two calls before the first are not timed), so host time counts wherever the GPU waits for it; 'host us' is
the time until everything is enqueued.
Samples in a CUDA graph are GPU time alone. Inputs rotate past the L2 cache, except in the rows called warm.
'x floor' is the median over that of the frozen layer's own products, timed in the same turns: x W0^T, and
for a step dy W0 as well. TFLOP/s and GB/s count the operations and bytes that LoRA needs at least, not
those that were made; 'x bytes' time' is the time over that of moving these bytes at the bandwidth of a
large copy, where that is the bound. 'peak MiB' is what a call allocates beyond weights and inputs; 'saved
MiB' what a forward keeps for backward.
"""

SUITES = {
    "train": "Training: one LoRA linear",
    "serve": "Serving: many adapters in one batch",
    "model": "Whole models",
}


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write ``report.html`` and the plots as PNG files.

    Args:
        results (Results): of one run, or of one that was resumed.
        folder (Path): where to put them.

    Returns:
        list[Path]: the files, the page first.

    Raises:
        ValueError: there is no result to report.
    """
    if not results.results:
        raise ValueError("there is no result to report")
    plots = make_plots(results)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    page.write_text(make_page(results, plots), encoding="utf-8")
    written = [page]
    for name, (_, content) in plots.items():
        path = folder / f"{name}.png"
        path.write_bytes(content)
        written.append(path)
    return written


def make_page(results: Results, plots: dict[str, tuple[str, bytes]]) -> str:
    """The page as text."""
    machine = results.runs[-1]["machine"] if results.runs else {}
    gpu = machine.get("GPU", "an unknown GPU")
    present = [suite for suite in SUITES if any(r.suite == suite for r in results.results.values())]
    links = [("plots", "Plots")] if plots else []
    links += [(suite, SUITES[suite]) for suite in present]
    links += [("failed", "What was not measured"), ("run", "Machine and command"), ("how", "How")]
    parts = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>fastlora on {_text(gpu)}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>",
        f"<h1>What LoRA costs on {_text(gpu)}</h1>", _summary(results),
        "<nav>" + "".join(f'<a href="#{to}">{_text(words)}</a>' for to, words in links) + "</nav>",
    ]  # fmt: skip
    if plots:
        figures = (_figure(name, *plots[name]) for name in plots)
        parts += ['<h2 id="plots">Plots</h2>', '<div class="plots">', *figures, "</div>"]
    for suite in present:
        parts += [f'<h2 id="{suite}">{_text(SUITES[suite])}</h2>', _tables(results, suite)]
    parts += [_failures(results), _run(results), _how(results), "</body>", "</html>"]
    return "\n".join(parts) + "\n"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _figure(name: str, caption: str, content: bytes) -> str:
    data = base64.b64encode(content).decode()
    return (
        f'<figure id="{name}"><figcaption>{_text(caption)}</figcaption>'
        f'<img alt="{_text(caption)} The numbers are in the tables below." '
        f'src="data:image/png;base64,{data}"></figure>'
    )


def _summary(results: Results) -> str:
    """Medians over the cases of each suite's table, in one sentence each."""
    lines = []
    for suite, mode, schedule, words in (
        ("train", "step", EAGER, "A training step of one linear over the frozen layer"),
        (
            "serve",
            "forward",
            GRAPH,
            "A batch of mixed adapters, in a CUDA graph, over the frozen layer",
        ),
        ("model", "step", EAGER, "A training step of a Llama over the frozen model"),
        ("model", "generate", EAGER, "Generation with mixed adapters over the frozen model"),
    ):
        ratios: dict[str, list[float]] = {}
        labels: dict[str, str] = {}
        for result in results.results.values():
            tag = results.cases.get(result.case, {}).get("tag", "table")
            same = (result.suite, result.mode, result.schedule) == (suite, mode, schedule)
            ratio = results.ratio(result) if same else None
            if ratio is None or result.status != OK or result.provider in (FLOOR, COPY):
                continue
            if suite == "model" or tag == "table":
                ratios.setdefault(result.provider, []).append(ratio)
                labels[result.provider] = result.label
        if ratios:
            count = max(len(found) for found in ratios.values())
            shown = [  # beside medians of other cases one of a few says nothing
                f"{labels[name]} {spread(found).median:.2f}x"
                for name, found in sorted(ratios.items(), key=lambda item: spread(item[1]).median)
                if len(found) == count
            ]
            lines.append(
                f"<li>{_text(words)} alone (median of {count} {'case' if count == 1 else 'cases'}): "
                f"{_text('; '.join(shown))}.</li>"
            )
    lines += [f"<li>{_text(line)}</li>" for line in worst_cases(results)]
    return f'<ul class="lead">{"".join(lines)}</ul>' if lines else ""


def _tables(results: Results, suite: str) -> str:
    """A table for each mode and schedule."""
    groups: dict[tuple[str, str], list[tuple[str, list[Result]]]] = {}
    for (case, mode, schedule), rows in results.blocks().items():
        if rows[0].suite == suite and any(r.status == OK for r in rows):
            groups.setdefault((mode, schedule), []).append((case, rows))
    parts: list[str] = []
    for (mode, schedule), entries in groups.items():
        how = "in a CUDA graph" if schedule == GRAPH else "eager"
        name = _text(f"{MODE_LABELS[mode]}, {how}")
        good = [(case, [r for r in rows if r.status == OK]) for case, rows in entries]
        cells = {row.key: _cells(results, row) for _, rows in good for row in rows}
        every = next(iter(cells.values()))
        columns = [c for c in every if any(words[c] for words in cells.values())]
        state = "" if parts else " open"
        parts.append(f"<details{state}><summary>{name}</summary>")
        parts.append(f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">')
        parts.append("<table><thead><tr>")
        parts += [f'<th scope="col">{_text(c)}</th>' for c in columns]
        parts.append("</tr></thead><tbody>")
        for case, rows in good:
            title = f"<span>{_text(_case_title(results, case))}</span>"
            parts.append(f'<tr class="case"><td colspan="{len(columns)}">{title}</td></tr>')
            for row in rows:
                ours = ' class="ours"' if "fastlora" in row.provider else ""
                found = "".join(f"<td>{_text(cells[row.key][c])}</td>" for c in columns)
                parts.append(f"<tr{ours}>{found}</tr>")
        parts.append("</tbody></table></div></details>")
    return "\n".join(parts)


def _case_title(results: Results, case: str) -> str:
    record = results.cases.get(case, {})
    facts = ", ".join(f"{value} {name}" for name, value in (record.get("facts") or {}).items())
    return str(record.get("title", case)) + (f" ({facts})" if facts else "")


def _cells(results: Results, row: Result) -> dict[str, str]:
    """Column to text, empty where it says nothing."""
    ms, ratio = row.ms, results.ratio(row)
    record = results.cases.get(row.case, {})
    flops, moved = (record.get("work") or {}).get(row.mode, (0, 0))
    is_copy = row.provider == COPY
    bandwidth = results.ceilings.get("copy_gb_per_s")
    return {
        "provider": row.label,
        "x floor": f"{ratio:.3f}" if ratio and not is_copy else "",
        "ms": f"{ms.median:.4g}",
        "p20 to p80": f"{ms.p20:.4g} to {ms.p80:.4g}",
        "TFLOP/s": f"{flops / ms.median / 1e9:.0f}" if flops and not is_copy else "",
        "GB/s": f"{moved / ms.median / 1e6:.0f}" if moved and not is_copy else "",
        "x bytes' time": _over_bytes(results, row, moved, bandwidth),
        "host us": f"{spread(row.host_ms).median * 1e3:.0f}" if row.host_ms else "",
        "peak MiB": f"{row.peak_bytes / 2**20:.0f}" if row.peak_bytes else "",
        "saved MiB": f"{row.saved_bytes / 2**20:.0f}"
        if row.saved_bytes is not None and row.mode == STEP
        else "",
        "tokens/s": f"{record.get('tokens', 0) / ms.median * 1e3:.0f}"
        if row.suite == "model"
        else "",
        "error": f"{max(row.errors.values()):.1e}" if row.errors else "",
    }


def _over_bytes(results: Results, row: Result, moved: int, bandwidth: float | None) -> str:
    """Time over that of moving the fewest bytes, at the bandwidth of the copy in the same turns."""
    if not moved or row.provider == COPY:
        return ""
    copied = results.results.get((*row.key[:3], COPY))
    if copied is not None and copied.block == row.block and copied.device_ms:
        words = copied.label.split()
        bandwidth = 2 * int(words[-2]) * 2**20 / copied.ms.median / 1e6
    peak = results.ceilings.get("matmul_tflop_per_s")
    flops = results.cases[row.case]["work"][row.mode][0]
    if not bandwidth or not peak or flops / moved > peak / bandwidth * 1e3:
        return ""  # unknown, or bound by arithmetic
    return f"{row.ms.median / (moved / bandwidth / 1e6):.2f}"


def _failures(results: Results) -> str:
    failed = [r for r in results.results.values() if r.status != OK or not r.device_ms]
    items = [
        f"<li>{_text(results.cases.get(r.case, {}).get('title', r.case))}, {_text(MODE_LABELS[r.mode])}, "
        f"{_text(r.schedule)}: {_text(r.label)}: {_text(r.status)}: {_text(r.message)}</li>"
        for r in failed
    ]
    left_out = dict.fromkeys(reason for run in results.runs for reason in run.get("left_out", ()))
    items += [f"<li>left out: {_text(reason)}</li>" for reason in left_out]
    body = f"<ul>{''.join(items)}</ul>" if items else "<p>Nothing was skipped.</p>"
    return f'<h2 id="failed">What was not measured</h2>{body}'


def _run(results: Results) -> str:
    parts = ['<h2 id="run">Machine and command</h2>']
    seen = []
    for run in results.runs:
        facts = {**run.get("machine", {}), "platform": run.get("platform", "")}
        facts.update({"started": run.get("started", ""), "note": run.get("note", "")})
        facts.update(run.get("clocks") or {})
        facts["command"] = run.get("command", "")
        seen.append(
            "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items() if v)
        )
    parts += [f"<dl>{entry}</dl>" for entry in seen[-1:]]
    if len(seen) > 1:
        earlier = "".join(f"<dl>{entry}</dl>" for entry in seen[:-1])
        parts.append(
            f"<details><summary>Earlier starts: {len(seen) - 1}</summary>{earlier}</details>"
        )
    return "\n".join(parts)


def _how(results: Results) -> str:
    ceilings = results.ceilings
    measured = (
        f"Measured on this card before the cases: a large copy moves {ceilings['copy_gb_per_s']:.0f} GB/s "
        f"(bytes read and written), a bf16 product of 8192 cubed runs at "
        f"{ceilings['matmul_tflop_per_s']:.0f} TFLOP/s."
        if ceilings
        else ""
    )
    return f'<h2 id="how">How it was measured</h2><p>{_HOW}</p><p>{_text(measured)}</p>'
