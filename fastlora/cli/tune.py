"""``python -m fastlora tune``: measure launch configurations on this GPU, and keep what is faster."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastlora.bench.cases import DTYPES
from fastlora.cli.arguments import list_of, probability, seconds, shape, whole
from fastlora.cli.system import INTERRUPTED, make_console, pick_device
from fastlora.kernels import tuned
from fastlora.kernels.cache import cache_folder
from fastlora.kernels.config import MAX_RANK
from fastlora.tune_candidates import STEPS, Shape, describe_changes

if TYPE_CHECKING:  # without Triton there is nothing to measure, but a file can be shown
    from fastlora.tune import Outcome

SUMMARY = "measure launch configurations on this GPU, and keep those that beat the defaults"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``tune``."""
    parser.add_argument(
        "--shapes", type=list_of(shape), default="4096x4096,4096x14336,14336x4096",
        metavar="KxN,...", help="in_features x out_features of your linears",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=list_of(whole("a token count", 1)), default="8192", metavar="M,..."
    )
    parser.add_argument(
        "--ranks", type=list_of(whole("a rank", 1, MAX_RANK)), default="16", metavar="R,..."
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of x and weights")
    parser.add_argument(
        "--adapters", choices=("same", "fp32"), default="same",
        help="their dtype: that of x, or fp32 as PEFT keeps them",
    )  # fmt: skip
    parser.add_argument(
        "--dropout", type=list_of(probability), default="0", metavar="P,...",
        help="only whether it is 0 makes a difference",
    )  # fmt: skip
    parser.add_argument(
        "--time-limit", type=seconds, default=None, metavar="SECONDS", help="begin no row after it"
    )
    parser.add_argument("--again", action="store_true", help="measure what the file has too")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="print what was measured and stop")
    what.add_argument("--clear", action="store_true", help="remove this GPU's file and stop")
    what.add_argument("--dry-run", action="store_true", help="print what would be measured")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> int:
    """Measure, or show, clear or describe.

    Returns:
        int: 0; 1 where it could not go on; 2 without a GPU; 130 when interrupted.
    """
    console = make_console()
    device = pick_device(args.device)
    identity = tuned.identify(device)
    try:
        if args.show:
            return _show(console, identity)
        if args.dry_run:
            return _describe(console, args, identity)
        if identity is None:
            _say(console, "tune: no CUDA GPU that the kernels run on here: nothing can be measured")
            return 2
        if args.clear:
            return _clear(console, tuned.file_of(identity.name))
        return _measure(console, args, device, identity)
    except (OSError, RuntimeError) as error:  # a folder that cannot be written, or a broken GPU
        _say(console, f"tune: {error}")
        return 1


def _show(console: Console, identity: tuned.Identity | None) -> int:
    """This GPU's file; without a GPU, the names of those that are there."""
    if identity is None:
        folder = cache_folder()
        files = sorted(folder.glob("tuned-*.json")) if folder.is_dir() else []
        found = ", ".join(path.name for path in files) or "none"
        _say(console, f"No CUDA GPU here that a file could be for. Files in {folder}: {found}")
        return 0
    table = tuned.read_table(identity)
    if table.problem:
        _say(console, describe(table))
        return 0
    console.print(_table([(key, row, "") for key, row in table.rows.items()], str(table.path)))
    return 0


def describe(table: tuned.Table) -> str:
    """One line on the file that is in use, or why none is."""
    if table.problem:
        where = f"{table.path}: " if table.path else ""
        return f"Tuned launches: defaults, for {where}{table.problem}"
    better = sum(row.best != row.default for row in table.rows.values())
    return f"Tuned launches: {table.path}, {len(table.rows)} rows, {better} of them not the default"


def _clear(console: Console, path: Path) -> int:
    from fastlora.tune_file import clear

    _say(console, f"Removed {path}" if clear(path) else f"There was no {path}")
    return 0


def _shapes(args: argparse.Namespace) -> list[Shape]:
    every = itertools.product(args.shapes, args.tokens, args.ranks, args.dropout)
    adapter_dtype = torch.float32 if args.adapters == "fp32" else None
    dtype = DTYPES[args.dtype]
    return [Shape(M, K, N, R, dtype, p, adapter_dtype) for (K, N), M, R, p in every]


def _describe(console: Console, args: argparse.Namespace, identity: tuned.Identity | None) -> int:
    path = tuned.file_of(identity.name) if identity else cache_folder() / "tuned-<GPU>.json"
    shapes = _shapes(args)
    for each in shapes:
        _say(console, f"{each}: {', '.join(STEPS)}")
    _say(console, f"{len(shapes)} shapes; rows would go to {path}")
    return 0


def _measure(
    console: Console, args: argparse.Namespace, device: torch.device, identity: tuned.Identity
) -> int:
    from fastlora.bench.clock import CudaClock
    from fastlora.bench.workloads import tf32_products
    from fastlora.tune import Tuner, measure_on
    from fastlora.tune_file import TuneFile

    properties = torch.cuda.get_device_properties(device)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 0)) or 101_376
    clock = CudaClock(device)
    file = TuneFile(tuned.file_of(identity.name), identity)
    if file.replaces:
        _say(console, f"{file.path} is replaced: {file.replaces}")
    limit = args.time_limit
    deadline = None if limit is None else time.monotonic() + limit
    tuner = Tuner(file, clock, measure_on(clock), shared, again=args.again, deadline=deadline)
    shapes = _shapes(args)
    outcomes: list[Outcome] = []
    try:
        with tf32_products(args.dtype == "tf32"), Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
        ) as progress:  # fmt: skip
            task = progress.add_task("shapes", total=len(shapes))
            for each in shapes:
                progress.update(task, description=str(each))
                for outcome in tuner.tune(each):
                    outcomes.append(outcome)
                    _say(console, _line(outcome))
                progress.advance(task)
    except KeyboardInterrupt:
        _say(console, "Interrupted: every row above is kept, and the same command goes on")
        return INTERRUPTED
    finally:
        tuned.forget()
        rows = {o.key: (o.row, o.step) for o in outcomes if o.row is not None}
        console.print(_table([(k, row, step) for k, (row, step) in rows.items()], str(file.path)))
    if tuner.out_of_time:
        _say(console, "The time limit came first: the same command goes on")
    return 0


def _line(outcome: Outcome) -> str:
    where = f"{outcome.shape}, {outcome.step}"
    row = outcome.row
    if row is None:
        return f"{where}: skipped: {outcome.message or 'its row is gone'}"
    if not outcome.fresh:
        return f"{where}: {outcome.key}: known"
    counts = f"{row.tried} tried, {row.skipped} skipped"
    return f"{where}: {outcome.key}: {row.default_us:.1f} us, best {row.best_us:.1f}; {counts}"


def _table(rows: list[tuple[str, tuned.Row, str]], title: str) -> Table:
    table = Table(title=title, caption="us of the whole step that the op is part of")
    for column in ("op and shape", "step", "default, us", "best, us", "what changed"):
        table.add_column(column, justify="right" if column.endswith("us") else "left")
    for key, row, step in rows:
        changed = row.note or describe_changes(row.default, row.best)
        table.add_row(key, step, f"{row.default_us:.1f}", f"{row.best_us:.1f}", changed)
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False)
