"""``python -m fastlora doctor``: what is here, and which path a call would take and why."""

from __future__ import annotations

import argparse

import torch
from rich.table import Table

import fastlora
from fastlora.cli.check import run_check, summarise
from fastlora.cli.system import describe_machine, make_console, pick_device
from fastlora.cli.tune import describe
from fastlora.dispatch import Call, Decision, decide
from fastlora.kernels import tuned

SUMMARY = "print the GPU, the versions, and which path common shapes take and why"

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# dtype of x and of the frozen weight, dtype of the adapter, K, N, R
ROWS = (
    (bf16, bf16, 4096, 4096, 16),
    (bf16, bf16, 4096, 14336, 16),
    (bf16, bf16, 14336, 4096, 16),
    (bf16, bf16, 8192, 8192, 16),
    (bf16, bf16, 4096, 1024, 64),
    (bf16, fp32, 4096, 4096, 16),
    (fp16, fp16, 4096, 4096, 16),
    (fp32, fp32, 4096, 4096, 16),
    (fp32, fp32, 384, 384, 8),
    (bf16, bf16, 4096, 4096, 256),
    (bf16, bf16, 4096, 4096, 512),
    (bf16, fp16, 4096, 4096, 16),
    (fp64, fp64, 4096, 4096, 16),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor``."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when the kernels do not give the right numbers on this GPU."""
    console = make_console()
    device = pick_device(args.device)
    machine = Table(title="This machine", show_header=False)
    for label, value in describe_machine(device).items():
        machine.add_row(label, value)
    console.print(machine)
    console.print(describe(tuned.table(device)), soft_wrap=True, markup=False)

    on_gpu = device.type == "cuda"
    table = Table(title="Which path a call takes")
    there = ("here", "why") if on_gpu else ("here", "on an sm_80+ GPU", "why there")
    for column in ("x, weight", "lora_A, lora_B", "K -> N", "r", *there):
        table.add_column(column)
    for x_dtype, adapter_dtype, K, N, R in ROWS:
        here = _explain(x_dtype, adapter_dtype, K, N, R, device)
        cells = [_short(x_dtype), _short(adapter_dtype), f"{K} -> {N}", str(R), here.path]
        if on_gpu:
            cells.append(here.reason)
        else:
            call = Call("cuda", (8, 0), x_dtype, x_dtype, (adapter_dtype,) * 2, 8, K, N, R)
            cells.extend((decide(call).path, decide(call).reason))
        table.add_row(*cells)
    console.print(table)

    if not on_gpu:
        console.print(f"Here: {_explain(*ROWS[0], device)}")
        console.print(
            "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly, to check their "
            "numbers without a GPU."
        )
        return 0
    report = run_check(device)
    console.print(summarise(report, "on this GPU"))
    return 1 if report.fused and not report.passed else 0


def _explain(
    x_dtype: torch.dtype, adapter_dtype: torch.dtype, K: int, N: int, R: int, device: torch.device
) -> Decision:
    """`fastlora.explain` on tensors that are allocated and never read."""
    x = torch.empty(8, K, dtype=x_dtype, device=device)
    weight = torch.empty(N, K, dtype=x_dtype, device=device)
    lora_A = torch.empty(R, K, dtype=adapter_dtype, device=device)
    lora_B = torch.empty(N, R, dtype=adapter_dtype, device=device)
    return fastlora.explain(x, weight, lora_A, lora_B)


def _short(dtype: torch.dtype) -> str:
    return {bf16: "bf16", fp16: "fp16", fp32: "fp32", fp64: "fp64"}[dtype]
