"""A small check of the kernels: forward and every gradient against the reference in fp64.

``python -m fastlora.cli.check`` prints it as JSON; the commands run it that way with
``TRITON_INTERPRET=1`` on a machine with no GPU, since Triton reads that variable at import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastlora
from fastlora import reference

# M, K, N, R, dropout: no tile multiple anywhere, a rank of 1, then a layer of MiniLM's own size.
CASES = ((5, 72, 40, 3, 0.0), (33, 130, 75, 1, 0.25), (64, 384, 384, 8, 0.1))

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Bounds on ``max |got - want| / max |want|``.

bf16 and fp16 round s, ds and the results once each, to 8 and 11 bits; in fp32 the order of sums
differs.
"""


@dataclass(frozen=True)
class CheckResult:
    """One case: the path it took and the relative errors of y, dx, dA and dB."""

    case: str
    dtype: str
    path: str
    errors: dict[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every error is a number within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())


@dataclass(frozen=True)
class CheckReport:
    """The results, or why there are none."""

    results: tuple[CheckResult, ...]
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the check ran and every case passed; an empty check passes nothing."""
        return bool(self.results) and all(result.passed for result in self.results)

    @property
    def fused(self) -> bool:
        """Whether every case took the kernels."""
        return bool(self.results) and all(result.path == "fused" for result in self.results)

    def worst(self, dtype: str) -> float:
        """The largest error of the cases in ``dtype``; NaN when a value is NaN."""
        errors = [e for r in self.results if r.dtype == dtype for e in r.errors.values()]
        return float("nan") if any(e != e for e in errors) else max(errors)


def max_error(got: Tensor, want: Tensor) -> float:
    """``max |got - want| / max |want|``; NaN where a value is NaN."""
    scale = want.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((got.double() - want).abs().max() / scale)


def check_case(
    M: int, K: int, N: int, R: int, p: float, *, dtype: torch.dtype, device: torch.device
) -> CheckResult:
    """Compare `fastlora.lora_linear` with the fp64 reference on one random problem with a bias."""
    generator = torch.Generator().manual_seed(M * K + N)
    shapes = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R)}
    names = (*shapes, "bias", "dy")
    drawn = [torch.randn(s, generator=generator) for s in (*shapes.values(), (N,), (M, N))]
    low = {name: t.to(device, dtype) for name, t in zip(names, drawn, strict=True)}
    exact = {name: t.double() for name, t in low.items()}

    wanted = ("x", "lora_A", "lora_B")
    outputs = []
    for function, tensors in ((fastlora.lora_linear, low), (reference.lora_linear, exact)):
        args = {k: t.clone().requires_grad_(k in wanted) for k, t in tensors.items() if k != "dy"}
        torch.manual_seed(0)  # the same seed of the mask is drawn on both sides
        x, weight, lora_A, lora_B, bias = (args[name] for name in names[:-1])
        y = function(x, weight, lora_A, lora_B, bias=bias, scaling=2.0, dropout_p=p)
        grads = torch.autograd.grad(y, [args[name] for name in wanted], tensors["dy"])
        outputs.append((y.detach(), *grads))
    path = fastlora.explain(low["x"], low["weight"], low["lora_A"], low["lora_B"]).path
    errors = {
        name: max_error(got, want)
        for name, got, want in zip(("y", "dx", "dA", "dB"), *outputs, strict=True)
    }
    name = str(dtype).removeprefix("torch.")
    return CheckResult(f"M={M} K={K} N={N} r={R} p={p}", name, path, errors, TOLERANCE[dtype])


def run_check(
    device: torch.device, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
) -> CheckReport:
    """Check every case in every dtype, in this process; torch's generators stay as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return CheckReport(
            tuple(check_case(*c, dtype=dtype, device=device) for dtype in dtypes for c in CASES)
        )


def run_interpreted_check() -> CheckReport:
    """Check the kernels in Triton's interpreter, in a process of its own."""
    root = str(Path(fastlora.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "fastlora.cli.check"]
    try:
        answer = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return CheckReport((), "the check in Triton's interpreter took more than 300 s")
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        return CheckReport((), f"the check in Triton's interpreter did not run: {last}")
    rows = json.loads(answer.stdout.splitlines()[-1])
    return CheckReport(tuple(CheckResult(**row) for row in rows))


def summarise(report: CheckReport, where: str) -> str:
    """One sentence on what was checked and how it went."""
    if report.problem:
        return f"Kernels not checked: {report.problem}"
    if not report.fused:
        kept = ", ".join(sorted({r.path for r in report.results}))
        return f"Kernels not checked {where}: the calls took the {kept} path"
    bounds = {result.dtype: result.tolerance for result in report.results}
    errors = ", ".join(f"{d} {report.worst(d):.1e} (bound {b:.0e})" for d, b in bounds.items())
    verdict = "passed" if report.passed else "FAILED"
    return (
        f"Kernels checked {where}: {verdict}. Forward, dx, dA and dB of {len(report.results)} "
        "small problems against the fp64 reference; largest error, over the largest value: "
        f"{errors}"
    )


if __name__ == "__main__":
    print(json.dumps([asdict(result) for result in run_check(torch.device("cpu")).results]))
