"""``python -m fastlora demo``: fine-tune a model with eager LoRA and with fastlora."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import fastlora
from fastlora import dispatch
from fastlora.bench.registry import missing
from fastlora.bench.train_providers import eager_lora_linear
from fastlora.cli.arguments import probability, rate, whole
from fastlora.cli.check import CheckReport, run_check, run_interpreted_check, summarise
from fastlora.cli.demo_task import Batch, Task, TextModel, make_task
from fastlora.cli.memory import PeakMemory
from fastlora.cli.system import describe_machine, make_console, pick_device

SUMMARY = "fine-tune a real transformer with eager LoRA and with fastlora, and compare the two runs"

EAGER, FASTLORA, PLAIN = "eager LoRA", "fastlora", "plain PyTorch LoRA"
RANK, ALPHA = 8, 16
CURVE_ROWS = 10


@dataclass
class TrainingRun:
    """What one run of training left behind."""

    label: str
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    loss_before: float = math.nan
    loss_after: float = math.nan
    accuracy_before: float = math.nan
    accuracy_after: float = math.nan
    paths: frozenset[str] = frozenset()

    @property
    def steps_per_second(self) -> float:
        """Steps a second, the first left out: it compiles and fills caches."""
        return (len(self.losses) - 1) / self.seconds if self.seconds else math.nan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``demo``."""
    parser.add_argument("--steps", type=int, default=None, help="40 on a CPU, 100 on a GPU")
    parser.add_argument(
        "--batch", type=whole("a batch size", 1), default=None, help="passages a step, by model"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--model", choices=("auto", "minilm", "llama"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and dropout")
    parser.add_argument("--lr", type=rate, default=1e-3, help="learning rate of AdamW")
    parser.add_argument("--dropout", type=probability, default=0.1, help="lora_dropout")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results")
    parser.add_argument("--skip-check", action="store_true", help="leave out the check of kernels")


def run(args: argparse.Namespace) -> int:
    """Train twice (three times on a GPU), print and save the comparison; 1 on wrong numbers."""
    console = make_console()
    device = pick_device(args.device)
    steps = args.steps if args.steps is not None else (100 if device.type == "cuda" else 40)
    if problem := missing("transformers"):
        raise SystemExit(f"the demo needs it: {problem}; pip install transformers")
    if steps < 2:
        raise SystemExit(f"--steps must be at least 2, got {steps}")
    try:  # before the training, of which the results go there
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {args.out}: {error}") from error
    machine = describe_machine(device)
    console.print(", ".join(f"{label} {value}" for label, value in machine.items()))
    check = CheckReport(()) if args.skip_check else _check(console, device)
    task = make_task(args.model, device, args.batch)
    console.print(f"Task: {task.description}.")

    labels = (EAGER, FASTLORA, PLAIN) if device.type == "cuda" else (EAGER, FASTLORA)
    runs: dict[str, TrainingRun] = {}
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for label in labels:
            model, runs[label] = _train(label, task, steps, args, device, progress)
            if label == FASTLORA:
                folder = args.out / "adapter"
                fastlora.save_adapter(model.encoder, folder)
                torch.save(model.head.state_dict(), folder / "head.pt")
            del model
    if device.type == "cpu" and not runs[FASTLORA].paths - {"eager"}:
        kernels = (
            "the kernels went through Triton's interpreter, for the check"
            if check.fused
            else "the kernels did not run"
        )
        console.print(
            f"No CUDA GPU: {kernels}; both runs trained on the eager path. So the curves must be "
            "equal, and the speeds differ by chance alone."
        )
    _print_curves(console, runs[EAGER], runs[FASTLORA])
    _print_summary(console, list(runs.values()))
    largest = largest_difference(runs[EAGER].losses, runs[FASTLORA].losses)
    console.print(f"Largest difference of the two loss curves: {largest:.2e}")
    saved = [str(args.out / "adapter")]
    if plot := _plot(runs[EAGER], runs[FASTLORA], task.name, args.out / "loss.png"):
        saved.append(str(plot))
    else:
        console.print("No loss.png: matplotlib is not installed")
    console.print(f"Saved: {', '.join(saved)}")
    finite = all(math.isfinite(loss) for r in runs.values() for loss in r.losses)
    wrong = check.fused and not check.passed
    return 1 if wrong or not finite else 0


def largest_difference(first: Iterable[float], second: Iterable[float]) -> float:
    """The largest distance of two curves of the same length; NaN when a value is NaN."""
    distances = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return math.nan if any(math.isnan(d) for d in distances) else max(distances)


def _check(console: Console, device: torch.device) -> CheckReport:
    if device.type == "cuda":
        report, where = run_check(device), "on this GPU"
    else:
        with console.status("checking the kernels in Triton's interpreter"):
            report, where = run_interpreted_check(), "in Triton's interpreter"
    console.print(summarise(report, where))
    return report


def _train(
    label: str,
    task: Task,
    steps: int,
    args: argparse.Namespace,
    device: torch.device,
    progress: Progress,
) -> tuple[TextModel, TrainingRun]:
    """Build, inject and train the model from the seed; the runs differ in the path alone."""
    bar = progress.add_task(label, total=steps, loss="-")
    torch.manual_seed(args.seed)
    model = task.build(device)
    fastlora.inject(
        model.encoder,
        task.target_modules,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=args.dropout,
        adapter_dtype=torch.float32,  # AdamW's small steps would be lost in bf16
    )
    model = model.to(device)
    linears = [m for m in model.modules() if isinstance(m, fastlora.LoRALinear)]
    if label == PLAIN:
        for linear in linears:
            linear.forward = functools.partial(_plain_forward, linear)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    result = TrainingRun(label)
    eager = dispatch.force("eager") if label == EAGER else contextlib.nullcontext()
    with eager:
        if label != PLAIN:
            result.paths = frozenset(_path(linear, task.dtype, device) for linear in linears)
        result.loss_before, result.accuracy_before = _evaluate(model, task, device)
        torch.manual_seed(args.seed)
        model.train()
        start = 0.0
        with PeakMemory(device) as memory:
            for step, batch in enumerate(task.batches(steps, args.seed)):
                result.losses.append(_step(model, batch.to(device), optimizer))
                progress.update(bar, advance=1, loss=f"{result.losses[-1]:.4f}")
                if step == 0:
                    start = time.perf_counter()
            result.seconds = time.perf_counter() - start
        result.peak_bytes = memory.peak_bytes
        result.loss_after, result.accuracy_after = _evaluate(model, task, device)
    return model, result


def _step(model: TextModel, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    loss, _ = model(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _plain_forward(linear: fastlora.LoRALinear, x: Tensor) -> Tensor:
    p = linear.lora_dropout if linear.training else 0.0
    return eager_lora_linear(
        x, linear.weight, linear.lora_A, linear.lora_B, linear.bias, linear.scaling, p
    )


def _path(linear: fastlora.LoRALinear, dtype: torch.dtype, device: torch.device) -> str:
    x = torch.empty(1, linear.in_features, dtype=dtype, device=device)
    return fastlora.explain(x, linear.weight, linear.lora_A, linear.lora_B).path


@torch.no_grad()
def _evaluate(model: TextModel, task: Task, device: torch.device) -> tuple[float, float]:
    """Mean loss and accuracy on the held-out passages."""
    model.eval()
    rows, loss_sum, right_sum = 0, 0.0, 0.0
    for batch in task.held_out_batches():
        loss, right = model(batch.to(device))
        rows += len(batch.labels)
        loss_sum += float(loss) * len(batch.labels)
        right_sum += float(right) * len(batch.labels)
    return loss_sum / rows, right_sum / rows


def _print_curves(console: Console, eager: TrainingRun, fused: TrainingRun) -> None:
    table = Table(title="Training loss, from the same seed and with the same dropout masks")
    for column in ("step", eager.label, fused.label, "difference"):
        table.add_column(column, justify="right")
    last = len(eager.losses) - 1
    for i in sorted({round(k * last / CURVE_ROWS) for k in range(CURVE_ROWS + 1)}):
        a, b = eager.losses[i], fused.losses[i]
        table.add_row(str(i + 1), f"{a:.5f}", f"{b:.5f}", f"{b - a:+.1e}")
    console.print(table)


def _print_summary(console: Console, runs: list[TrainingRun]) -> None:
    table = Table(title="The runs", show_lines=False)
    columns = ("", "path", "steps/s", "peak memory", "held-out loss", "held-out accuracy")
    for column in columns:
        table.add_column(column)
    for r in runs:
        table.add_row(
            r.label,
            ", ".join(sorted(r.paths)) or "own masks, for speed only",
            f"{r.steps_per_second:.2f}",
            f"{r.peak_bytes / 2**20:.0f} MiB" if r.peak_bytes else "not known here",
            f"{r.loss_before:.3f} -> {r.loss_after:.3f}",
            f"{r.accuracy_before:.1%} -> {r.accuracy_after:.1%}",
        )
    console.print(table)
    console.print(
        f"'{EAGER}' is fastlora's reference: the same masks, in fp32, not made for speed. For "
        "speed beside what people run, see `python -m fastlora bench`. Before training, the head "
        "is random."
    )


def _plot(eager: TrainingRun, fused: TrainingRun, title: str, path: Path) -> Path | None:
    """Draw both curves side by side and their difference; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = range(1, len(eager.losses) + 1)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, curve in zip(axes, (eager, fused), strict=False):
        axis.plot(steps, curve.losses)
        axis.set(title=curve.label, xlabel="step", ylabel="training loss")
    axes[1].sharey(axes[0])
    difference = [b - a for a, b in zip(eager.losses, fused.losses, strict=True)]
    axes[2].plot(steps, difference, color="tab:red")
    axes[2].set(title=f"{fused.label} - {eager.label}", xlabel="step", ylabel="difference")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
