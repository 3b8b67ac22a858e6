"""``python -m fastlora bench``: one LoRA linear against its frozen floor, PyTorch and PEFT."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fastlora import reference
from fastlora.cli.cases import (
    DROPOUTS,
    DTYPES,
    RANK,
    SHAPES,
    TOKENS,
    Case,
    Problem,
    default_cases,
    make_problem,
)
from fastlora.cli.check import run_check, run_interpreted_check, summarise
from fastlora.cli.providers import FLOOR, PROVIDERS, Layer, Provider, available
from fastlora.cli.system import describe_machine, make_console, pick_device
from fastlora.cli.timing import Call, Samples, peak_bytes, spread, time_interleaved

SUMMARY = "time forward, forward + backward and peak memory against the frozen floor and peers"

FORWARD, STEP = "forward", "forward + backward"

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 2e-3}
"""Bounds on ``||got - want|| / ||want||``, for every provider alike; the reference is fp32."""


@dataclass
class Row:
    """One provider on one case."""

    provider: str
    label: str
    samples: dict[str, Samples] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    checked_at_p: float = 0.0
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench``."""
    parser.add_argument("--tokens", type=_integers, default=(TOKENS,), help="e.g. 2048,8192")
    parser.add_argument("--shapes", type=_shapes, default=SHAPES, help="KxN,KxN,...")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--dropout", type=_floats, default=DROPOUTS, help="e.g. 0,0.1")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--adapter-dtype", choices=sorted(DTYPES), default=None, help="as --dtype")
    parser.add_argument("--providers", type=_names, default=None, help=",".join(PROVIDERS))
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time torch.compile as well, in its default mode",
    )
    parser.add_argument("--repeats", type=int, default=20, help="samples of each callable")
    parser.add_argument("--inner", type=int, default=5, help="calls a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--json", type=Path, default=None, help="file for every sample")


def run(args: argparse.Namespace) -> int:
    """Check, time and print; 1 when fastlora's numbers are wrong anywhere."""
    console = make_console()
    device = pick_device(args.device)
    if device.type != "cuda":
        return _without_gpu(console)
    if args.repeats < 1 or args.inner < 1:
        raise SystemExit("--repeats and --inner must be at least 1")
    torch.cuda.set_device(device)
    machine = describe_machine(device)
    console.print(", ".join(f"{label} {value}" for label, value in machine.items()))
    providers, left_out = available(args.providers)
    if not args.compile:
        providers = [p for p in providers if p.name != "compile"]
    for reason in left_out:
        console.print(f"left out: {reason}")
    adapter_dtype = DTYPES[args.adapter_dtype] if args.adapter_dtype else None
    cases = [
        case
        for tokens in args.tokens
        for case in default_cases(
            tokens, DTYPES[args.dtype], args.shapes, args.dropout, args.rank, adapter_dtype
        )
    ]
    started = time.perf_counter()
    results: list[tuple[Case, list[Row]]] = []
    for case in track(cases, description="cases", console=console, transient=True):
        rows = run_case(case, providers, device, args.repeats, args.inner, args.seed)
        results.append((case, rows))
        torch.cuda.empty_cache()
    console.print(make_table(results, args.dtype))
    console.print(
        f"Median (20th to 80th percentile) of {args.repeats} samples of {args.inner} calls each, "
        "host time included; providers take turns. 'x floor' is the ratio to the frozen linear "
        "alone, timed in the same turns: x W0^T, and x W0^T then dy W0. 'host' is the time to "
        "enqueue a forward and backward. Gradients: x, lora_A, lora_B. 'error' is the largest "
        "relative error of the output and the gradients against fp32. "
        f"{time.perf_counter() - started:.0f} s in all."
    )
    for case, rows in results:
        for row in rows:
            if row.problem:
                console.print(f"{case}: {row.label}: {row.problem}")
    if args.json is not None:
        _write_json(args.json, machine, results)
        console.print(f"Saved: {args.json}")
    ours = [row for _, rows in results for row in rows if row.provider == "fastlora"]
    return 1 if any(row.problem for row in ours) else 0


def run_case(
    case: Case, providers: list[Provider], device: torch.device, repeats: int, inner: int, seed: int
) -> list[Row]:
    """Check every provider against the fp32 reference, then time those that pass, in turns.

    Returns:
        list[Row]: the floor first; a provider that failed has ``problem`` set and no samples.
    """
    problem = make_problem(case, device, seed)
    forward_calls: dict[str, Call] = {FLOOR: _floor_forward(problem)}
    step_calls: dict[str, Call] = {FLOOR: _floor_step(problem)}
    rows = [Row(FLOOR, "frozen floor (cuBLAS)")]
    wanted: dict[float, dict[str, Tensor]] = {}
    for provider in providers:
        row = Row(provider.name, provider.label)
        rows.append(row)
        try:
            # Another mask cannot be compared element by element: such a provider is checked at 0.
            row.checked_at_p = case.p if provider.same_mask else 0.0
            if row.checked_at_p not in wanted:
                wanted[row.checked_at_p] = wanted_outputs(problem, row.checked_at_p, seed)
            checked = provider.make(problem, row.checked_at_p)
            row.errors = layer_errors(problem, checked, wanted[row.checked_at_p], seed)
            worst = max(row.errors.values())
            if not worst <= TOLERANCE[case.dtype]:
                row.problem = f"wrong numbers, not timed: {_in_words(row.errors)}"
                continue
            layer = checked if row.checked_at_p == case.p else provider.make(problem, case.p)
            forward, step = layer_forward(problem, layer), layer_step(problem, layer)
            step(0)
        except Exception as error:  # a peer that cannot run here must not end the benchmark
            row.problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        forward_calls[provider.name], step_calls[provider.name] = forward, step
    wanted.clear()
    torch.cuda.empty_cache()
    for name, calls in ((FORWARD, forward_calls), (STEP, step_calls)):
        timed = time_interleaved(calls, repeats=repeats, inner=inner)
        for row in rows:
            if row.provider in timed:
                row.samples[name] = timed[row.provider]
                row.peak_bytes[name] = peak_bytes(calls[row.provider])
    return rows


def _floor_forward(problem: Problem) -> Call:
    weight, xs = problem.weight, [x.detach() for x in problem.xs]
    return lambda i: F.linear(xs[i % len(xs)], weight)


def _floor_step(problem: Problem) -> Call:
    weight, dys = problem.weight, problem.dys
    xs = [x.detach() for x in problem.xs]

    def call(i: int) -> tuple[Tensor, Tensor]:
        return F.linear(xs[i % len(xs)], weight), dys[i % len(dys)] @ weight

    return call


def layer_forward(problem: Problem, layer: Layer) -> Call:
    """A callable that runs forward on the set of inputs that its argument picks."""
    forward, xs = layer.forward, problem.xs
    return lambda i: forward(xs[i % len(xs)])


def layer_step(problem: Problem, layer: Layer) -> Call:
    """A callable that runs forward and backward and returns dx, dA and dB."""
    forward, xs, dys = layer.forward, problem.xs, problem.dys
    lora_A, lora_B = layer.lora_A, layer.lora_B

    def call(i: int) -> tuple[Tensor, ...]:
        x = xs[i % len(xs)]
        return torch.autograd.grad(forward(x), (x, lora_A, lora_B), dys[i % len(dys)])

    return call


def wanted_outputs(problem: Problem, p: float, seed: int) -> dict[str, Tensor]:
    """What the fp32 reference gives for the first set of inputs."""
    tensors = [problem.xs[0], problem.lora_A, problem.lora_B]
    x, lora_A, lora_B = (t.detach().float().requires_grad_() for t in tensors)
    torch.manual_seed(seed)
    y = reference.lora_linear(
        x, problem.weight.float(), lora_A, lora_B, scaling=problem.scaling, dropout_p=p
    )
    grads = torch.autograd.grad(y, (x, lora_A, lora_B), problem.dys[0].float())
    return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *grads), strict=True))


def layer_errors(
    problem: Problem, layer: Layer, wanted: dict[str, Tensor], seed: int
) -> dict[str, float]:
    """``||got - want|| / ||want||`` of the output and of every gradient."""
    torch.manual_seed(seed)
    x = problem.xs[0]
    y = layer.forward(x)
    grads = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), problem.dys[0])
    got = dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *grads), strict=True))
    return {
        name: float((got[name].float() - want).norm() / want.norm())
        for name, want in wanted.items()
    }


def make_table(results: list[tuple[Case, list[Row]]], dtype: str) -> Table:
    """The table of every case and provider."""
    table = Table(title=f"One LoRA linear, {dtype}")
    table.add_column("")
    columns = ("forward ms", "x floor", "fwd + bwd ms", "x floor", "host us", "peak MiB", "error")
    for column in columns:
        table.add_column(column, justify="right")
    for case, rows in results:
        table.add_section()
        table.add_row(f"[bold]{case}[/bold]")
        floor = {name: spread(s.device_ms).median for name, s in rows[0].samples.items()}
        for row in rows:
            if not row.samples:
                table.add_row(row.label, "failed, see below")
                continue
            cells = []
            for name in (FORWARD, STEP):
                ms = spread(row.samples[name].device_ms)
                cells.append(f"{ms.median:.3f} ({ms.p20:.3f} to {ms.p80:.3f})")
                cells.append(f"{ms.median / floor[name]:.3f}")
            host_us = spread(row.samples[STEP].host_ms).median * 1e3
            peak = f"{row.peak_bytes[STEP] / 2**20:.0f}"
            error = f"{max(row.errors.values()):.1e}" if row.errors else ""
            table.add_row(row.label, *cells, f"{host_us:.0f}", peak, error)
    return table


def _without_gpu(console: Console) -> int:
    """No timing on a CPU: it would say nothing about the kernels. A small check only."""
    console.print("No CUDA GPU here: nothing is timed, only a small check of the numbers is made.")
    report = run_interpreted_check()
    console.print(summarise(report, "in Triton's interpreter"))
    eager = run_check(torch.device("cpu"))
    verdict = "passed" if eager.passed else "FAILED"
    console.print(f"The {eager.results[0].path} path, which calls take here: {verdict}")
    return 1 if (report.fused and not report.passed) or not eager.passed else 0


def _write_json(path: Path, machine: dict[str, str], results: list[tuple[Case, list[Row]]]) -> None:
    cases: list[dict[str, Any]] = []
    for case, rows in results:
        sizes = {**asdict(case), "dtype": str(case.dtype), "adapter_dtype": str(case.adapter_dtype)}
        floor = {name: spread(s.device_ms).median for name, s in rows[0].samples.items()}
        ratios = [
            {name: spread(s.device_ms).median / floor[name] for name, s in row.samples.items()}
            for row in rows
        ]
        written = [
            {**asdict(row), "x_floor": ratio} for row, ratio in zip(rows, ratios, strict=True)
        ]
        cases.append({"case": sizes, "rows": written})
    command = shlex.join(["python", "-m", "fastlora", *sys.argv[1:]])
    content = {
        "command": command,
        "machine": machine,
        "platform": platform.platform(terse=True),
        "cases": cases,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _in_words(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def _split(text: str, convert: Callable[[str], Any], example: str) -> tuple[Any, ...]:
    try:
        return tuple(convert(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {example}, got {text!r}") from error


def _integers(text: str) -> tuple[int, ...]:
    return _split(text, int, "integers as in 2048,8192")


def _floats(text: str) -> tuple[float, ...]:
    return _split(text, float, "numbers as in 0,0.1")


def _names(text: str) -> tuple[str, ...]:
    return _split(text, str.strip, "names as in fastlora,eager")


def _shape(text: str) -> tuple[int, int]:
    K, N = text.lower().split("x")
    return int(K), int(N)


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    return _split(text, _shape, "in x out features as in 4096x4096,4096x14336")
