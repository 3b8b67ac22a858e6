"""``python -m fastlora bench``: measure on this machine, report, compare."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

import fastlora.bench  # noqa: F401 - registers the providers
from fastlora.bench.cases import Case, select, suites
from fastlora.bench.clock import Clock, CudaClock
from fastlora.bench.compare import (
    MIN_EFFECT,
    absent,
    compare,
    describe_changes,
    describe_machines,
    describe_rule,
)
from fastlora.bench.correctness import check_cases
from fastlora.bench.registry import Provider, choose, load_file, missing
from fastlora.bench.results import OK, Results, Store, load
from fastlora.bench.runner import RestartError, Runner, measure_ceilings
from fastlora.bench.summary import worst_cases
from fastlora.bench.terminal import TerminalListener, make_table
from fastlora.cli.arguments import seconds
from fastlora.cli.check import run_check, run_interpreted_check, summarise
from fastlora.cli.system import (
    INTERRUPTED,
    describe_machine,
    make_console,
    pick_device,
    read_clocks,
    source_state,
)

SUMMARY = (
    "measure LoRA on this GPU: fastlora, PyTorch, PEFT, each against the floor of the hardware"
)

SAME = ("GPU", "driver", "torch", "triton", "peft", "transformers", "loralib", "sources")
"""What must be the same for a run to go on in a folder of results."""

TABLE = "table.txt"

_RESTARTS, _SPENT = "FASTLORA_BENCH_RESTARTS", "FASTLORA_BENCH_SPENT"
MAX_RESTARTS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench``."""
    parser.add_argument(
        "action", nargs="*", metavar="report DIR", help="make the page and the plots of results"
    )
    parser.add_argument("--suite", choices=list(suites()), default="quick")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of results")
    parser.add_argument(
        "--filter", default=None, metavar="REGEX", help="only cases whose id matches"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--providers", type=_names, default=None, metavar="A,B", help="only these")
    parser.add_argument(
        "--provider", type=Path, action="append", default=[], metavar="FILE",
        help="a Python file that registers a provider of yours; may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--slow", action="store_true", help="providers that compile for minutes too"
    )
    parser.add_argument("--time-limit", type=seconds, default=None, metavar="SECONDS")
    parser.add_argument("--fresh", action="store_true", help="set the results in --out aside first")
    parser.add_argument("--repeats", type=int, default=20, help="samples of each callable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="kept with the results, e.g. a commit")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--compare", type=Path, nargs=2, default=None, metavar=("A", "B"),
        help="what changed from results A to results B; 1 when fastlora became slower",
    )  # fmt: skip
    parser.add_argument("--min-effect", type=float, default=MIN_EFFECT, help="of --compare")


def run(args: argparse.Namespace) -> int:
    """Measure, or report, or compare.

    Returns:
        int: 0; 1 when fastlora's numbers are wrong anywhere, or became slower; 2 for bad arguments.
    """
    console = make_console()
    try:
        if args.action:
            return _report(console, args.action)
        if args.compare is not None:
            return _compare(console, args.compare, args.min_effect, args.filter)
        for path in args.provider:
            load_file(path)
        cases = select(args.suite, args.filter)
        if args.list:
            for case in cases:
                console.print(f"{case.id}  [dim]{case.title}[/dim]", soft_wrap=True)
            return 0
        if args.repeats < 3:
            raise ValueError(f"--repeats must be at least 3, got {args.repeats}")
        device = pick_device(args.device)
        wanted = list(dict.fromkeys(case.suite for case in cases))
        providers, left_out = choose(wanted, args.providers, device, args.slow)
        if device.type != "cuda":
            return _without_gpu(console, args, providers)
        with _alone(args.out):
            return _measure(console, args, CudaClock(device), cases, providers, left_out)
    except (ValueError, OSError) as error:
        console.print(f"bench: {error}", markup=False)
        return 2


def _report(console: Console, action: list[str]) -> int:
    if len(action) != 2 or action[0] != "report":
        raise ValueError(f"expected `bench report DIR`, got {' '.join(action)!r}")
    if problem := missing("matplotlib"):
        raise ValueError(f"the report needs it: {problem}")
    path = Path(action[1])
    _save_report(console, _loaded(console, path), path if path.is_dir() else path.parent)
    return 0


def _loaded(console: Console, path: Path) -> Results:
    results = load(path)
    if results.broken_lines:
        console.print(
            f"{path}: {results.broken_lines} lines could not be read", soft_wrap=True, markup=False
        )
    return results


def _save_report(console: Console, results: Results, folder: Path) -> None:
    from fastlora.bench.report import write_report  # needs matplotlib

    page, *plots = write_report(results, folder)
    console.print(f"The page: {page}, and {len(plots)} plots beside it", soft_wrap=True)


def _compare(console: Console, paths: list[Path], min_effect: float, pattern: str | None) -> int:
    before, after = (_loaded(console, path) for path in paths)
    try:
        changes = compare(before, after, min_effect, pattern=pattern)
    except re.error as error:
        raise ValueError(f"--filter {pattern!r}: {error}") from error
    console.print(describe_rule(min_effect), soft_wrap=True)
    lines = describe_machines(before, after, [name for name in SAME if name != "sources"])
    if missing_there := absent(before, after):
        lines.append(f"{missing_there} results of the first run are not in the second")
    for line in [*lines, *describe_changes(changes)]:
        console.print(line, soft_wrap=True, markup=False)
    return 1 if any(change.regression for change in changes) else 0


def _without_gpu(
    console: Console, args: argparse.Namespace, providers: dict[str, list[Provider]]
) -> int:
    """No timing on a CPU: it would say nothing about the kernels."""
    console.print(
        "No CUDA GPU here: nothing is timed, the quick suite's correctness part runs on small twins."
    )
    quick, _ = choose(("train", "serve", "model"), args.providers, torch.device("cpu"), False)
    bad = False
    for checked in check_cases(select("quick"), quick, torch.device("cpu"), args.seed):
        worst = max(checked.errors.values(), default=float("nan"))
        verdict = checked.problem or f"passed, error {worst:.1e}"
        bad |= bool(checked.problem)
        console.print(f"{checked.case}: {checked.label}: {verdict}", soft_wrap=True, markup=False)
    report = run_interpreted_check()
    console.print(summarise(report, "in Triton's interpreter"))
    eager = run_check(torch.device("cpu"))
    verdict = "passed" if eager.passed else "FAILED"
    console.print(f"The {eager.results[0].path} path, which calls take here: {verdict}")
    return 1 if bad or (report.fused and not report.passed) or not eager.passed else 0


def _measure(
    console: Console,
    args: argparse.Namespace,
    clock: Clock,
    cases: list[Case],
    providers: dict[str, list[Provider]],
    left_out: list[str],
) -> int:
    machine = {**describe_machine(clock.device), **source_state()}
    console.print(", ".join(f"{label} {value}" for label, value in machine.items()), soft_wrap=True)
    for reason in left_out:
        console.print(f"left out: {reason}", soft_wrap=True, markup=False)
    restarts = int(os.environ.get(_RESTARTS, "0"))
    store = Store(args.out, fresh=args.fresh and restarts == 0)
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in args.provider
    }
    _check_same_machine(store.results, machine)
    _check_same_providers(store.results, files)
    store.append(
        "run", machine=machine, clocks=read_clocks(clock.device),
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=shlex.join(["python", "-m", "fastlora", *sys.argv[1:]]), note=args.note,
        platform=platform.platform(terse=True), left_out=left_out, repeats=args.repeats,
        provider_files=files,
    )  # fmt: skip
    began = time.monotonic() - float(os.environ.get(_SPENT, "0"))
    limit = None if args.time_limit is None else began + args.time_limit - time.monotonic()
    if not store.results.ceilings:
        store.append("ceiling", values=measure_ceilings(clock))
    with TerminalListener(console, len(cases)) as listener:
        runner = Runner(store, clock, providers, listener, args.repeats, args.seed, limit)
        try:
            left = runner.run(cases)
        except RestartError as error:
            reason = str(error)
        except KeyboardInterrupt:
            console.print("Stopped: what was measured is kept, and the same command goes on.")
            return INTERRUPTED
        else:
            reason = ""
    if reason:
        console.print(f"A new process goes on after: {reason}", soft_wrap=True, markup=False)
        return _restart(restarts, time.monotonic() - began)
    store.append("clocks", values=read_clocks(clock.device))
    table = make_table(store.results, [case.id for case in cases])
    with (args.out / TABLE).open("w", encoding="utf-8") as file:
        Console(file=file, width=150).print(table)
    if console.is_terminal:  # a log has the line of every block already
        console.print(table)
    for result in store.results.results.values():
        if result.status != OK:
            text = f"{result.case}, {result.mode}, {result.schedule}: {result.label}: "
            console.print(f"{text}{result.status}: {result.message}", soft_wrap=True, markup=False)
    for line in worst_cases(store.results):
        console.print(line, soft_wrap=True, markup=False)
    if left:
        console.print(f"No time for {len(left)} of {len(cases)} cases; the same command goes on.")
    console.print(f"Results: {store.path}", soft_wrap=True)
    if missing("matplotlib"):
        console.print("No page: matplotlib is not installed")
    else:
        _save_report(console, store.results, args.out)
    mine = [r for r in store.results.results.values() if "fastlora" in r.provider]
    return 1 if any(r.status not in (OK, "out of memory") for r in mine) else 0


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second run out of a folder of results: each would take the other's time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run measures into {folder} now") from None
        yield


def _check_same_machine(results: Results, machine: dict[str, str]) -> None:
    if not results.runs:
        return
    before = results.runs[-1]["machine"]
    for name in SAME:
        if before.get(name) != machine.get(name):
            raise ValueError(
                f"the results there were made with {name} {before.get(name)}, here it is "
                f"{machine.get(name)}: give another --out, or --fresh to set them aside"
            )


def _check_same_providers(results: Results, files: dict[str, str]) -> None:
    for run in results.runs:
        for name, digest in run.get("provider_files", {}).items():
            if files.get(name, digest) != digest:
                raise ValueError(
                    f"{name} has changed since it was measured there: give another --out, or --fresh to "
                    "set the results aside"
                )


def _restart(restarts: int, spent: float) -> int:
    """The same command in a new process image; everything that holds the GPU is closed with this one."""
    if restarts >= MAX_RESTARTS:
        print(f"gave up after {restarts} restarts", file=sys.stderr)
        return 1
    os.environ[_RESTARTS], os.environ[_SPENT] = str(restarts + 1), str(spent)
    sys.stdout.flush()
    sys.stderr.flush()
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            if int(name) > 2:
                os.set_inheritable(int(name), False)
        except OSError:  # the descriptor of this very listing
            continue
    os.execv(sys.executable, [sys.executable, "-m", "fastlora", *sys.argv[1:]])


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
