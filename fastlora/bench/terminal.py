"""What a person sees while a suite runs: a line for each block, a bar with the time left, a table."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fastlora.bench.cases import Case
from fastlora.bench.registry import FLOOR
from fastlora.bench.results import OK, Result, Results
from fastlora.bench.workloads import COPY, MODE_LABELS, STEP


class TerminalListener:
    """Prints as a run goes on; a context manager that shows a bar where the output is a terminal."""

    def __init__(self, console: Console, total: int) -> None:
        """Expect ``total`` cases."""
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("cases", total=total)
        self._title = ""

    def __enter__(self) -> TerminalListener:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        self._progress.stop()

    def case_began(self, case: Case) -> None:
        """Name the case in the bar, and above its lines."""
        self._progress.update(self._task, description=case.id)
        self.console.print(f"[bold]{case.title}[/bold]  {case.id}", soft_wrap=True)

    def case_ended(self, case: Case, seconds: float) -> None:
        """Move the bar."""
        self._progress.advance(self._task)
        if seconds:
            self.console.print(f"  {seconds:.1f} s")

    def block_timed(self, case: Case, results: list[Result]) -> None:
        """One line: the floor in ms, the others in multiples of it."""
        good = {r.provider: r for r in results if r.status == OK and r.device_ms}
        for result in results:
            if result.status != OK:
                where = f"{MODE_LABELS[result.mode]}, {result.schedule}"
                self.console.print(
                    f"  {where}: {result.label}: {result.status}: {result.message}",
                    soft_wrap=True, markup=False,
                )  # fmt: skip
        if not good:
            return
        first = next(iter(good.values()))
        floor = good.get(FLOOR)
        words = [f"{MODE_LABELS[first.mode]}, {first.schedule}:"]
        for name, result in good.items():
            ms = result.ms.median
            if floor is None or name == FLOOR:
                words.append(f"{name} {_time(ms)}")
            elif name != COPY:
                words.append(f"{name} {ms / floor.ms.median:.2f}x")
        self.console.print("  " + "  ".join(words), soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        """Print it."""
        self.console.print(text, soft_wrap=True, markup=False)


def _time(ms: float) -> str:
    return f"{ms * 1e3:.1f} us" if ms < 0.1 else f"{ms:.3f} ms"


def make_table(results: Results, case_ids: list[str]) -> Table:
    """Every provider on every case: time, ratio to the floor, host time, memory, error."""
    table = Table(
        title="Medians; 'x floor' is over the frozen layer alone, timed in the same turns"
    )
    table.add_column("", overflow="fold")
    for column in ("ms", "p20 to p80", "x floor", "host us", "peak MiB", "saved MiB", "error"):
        table.add_column(column, justify="right")
    blocks = results.blocks()
    for (case, mode, schedule), rows in blocks.items():
        if case not in case_ids:
            continue
        title = results.cases.get(case, {}).get("title", case)
        table.add_section()
        table.add_row(f"[bold]{escape(title)}[/bold]: {MODE_LABELS[mode]}, {schedule}")
        for row in rows:
            if row.status != OK or not row.device_ms:
                table.add_row(escape(row.label), row.status)
                continue
            ms, ratio = row.ms, results.ratio(row)
            host = sorted(row.host_ms)[len(row.host_ms) // 2] * 1e3 if row.host_ms else None
            memory = row.saved_bytes if mode == STEP else None
            table.add_row(
                escape(row.label), f"{ms.median:.4f}", f"{ms.p20:.4f} to {ms.p80:.4f}",
                f"{ratio:.3f}" if ratio else "", f"{host:.0f}" if host is not None else "",
                f"{row.peak_bytes / 2**20:.0f}" if row.peak_bytes else "",
                f"{memory / 2**20:.0f}" if memory is not None else "",
                f"{max(row.errors.values()):.1e}" if row.errors else "",
            )  # fmt: skip
    return table
