"""Times of the other layers: the embedding, q and v in one weight, DoRA, and switching tasks.

``python benchmarks/bench_layers.py [--json FILE]``. Each row is a ratio to what the layer is measured by:
the plain gather, the plain linear, its products forward and backward, one copy of all weights. Times are
those of an eager program, with what the host takes to enqueue a call beside them, and of a CUDA graph of
the same calls: the GPU alone. Without a CUDA GPU the sizes are tiny and every call is only checked to run:
no times are given.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

if importlib.util.find_spec("fastlora") is None:  # a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import fastlora
from fastlora.bench.clock import (
    CaptureError,
    CudaClock,
    estimate_ms,
    time_eager,
    time_graphs,
    timing_lines,
)
from fastlora.cli.system import describe_machine, read_clocks, source_state

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16
Calls = dict[str, Callable[[int], object]]


def embedding(R: int = 16) -> Calls:
    """A vocabulary of 128,256, 4096 wide, 8192 ids: forward, and forward with backward."""
    V, N, M = (128256, 4096, 8192) if CUDA else (64, 32, 16)
    base = nn.Embedding(V, N, device=DEVICE, dtype=DTYPE)
    layer = fastlora.LoRAEmbedding(base, R, 2 * R)
    nn.init.normal_(layer.lora_A)
    ids = [torch.randint(0, V, (M,), device=DEVICE) for _ in range(8)]
    dy = torch.randn(M, N, device=DEVICE, dtype=DTYPE)

    def step(i: int) -> None:
        torch.autograd.grad(layer(ids[i % 8]), (layer.lora_A, layer.lora_B), dy)

    @torch.no_grad()
    def forward(i: int) -> object:
        return layer(ids[i % 8])

    return {"plain": lambda i: F.embedding(ids[i % 8], base.weight), "lora": forward, "step": step}


def query_and_value(R: int = 16) -> Calls:
    """q and v of a grouped-query attention in one weight, 8192 tokens: forward."""
    K, widths, M = (4096, [4096, 1024, 1024], 8192) if CUDA else (32, [32, 16, 16], 8)
    layer = fastlora.LoRAMergedLinear(
        K, sum(widths), R, 2 * R, enable_lora=[True, False, True], widths=widths,
        device=DEVICE, dtype=DTYPE,
    )  # fmt: skip
    nn.init.normal_(layer.lora_B)
    x = torch.randn(M, K, device=DEVICE, dtype=DTYPE)

    @torch.no_grad()
    def forward(i: int) -> object:
        return layer(x)

    @torch.no_grad()
    def eager(i: int) -> object:
        with fastlora.dispatch.force("eager"):
            return layer(x)

    return {
        "plain": lambda i: F.linear(x, layer.weight, layer.bias),
        "lora": forward,
        "reference": eager,
    }


def dora(R: int = 16) -> Calls:
    """DoRA of 4096 -> 4096, 8192 tokens: forward + backward, beside the two frozen products."""
    K, N, M = (4096, 4096, 8192) if CUDA else (32, 16, 8)
    base = nn.Linear(K, N, bias=False, device=DEVICE, dtype=DTYPE)
    weight = base.weight.detach()
    x = torch.randn(M, K, device=DEVICE, dtype=DTYPE, requires_grad=True)
    dy = torch.randn(M, N, device=DEVICE, dtype=DTYPE)
    lora_A = torch.randn(R, K, device=DEVICE, dtype=DTYPE) / K**0.5
    lora_B = torch.randn(N, R, device=DEVICE, dtype=DTYPE) / R**0.5
    magnitude = torch.linalg.vector_norm(weight, dim=1)
    leaves = [t.requires_grad_() for t in (lora_A, lora_B, magnitude)]

    @torch.no_grad()
    def plain(i: int) -> None:
        F.linear(x, weight)
        torch.mm(dy, weight)

    def step(i: int) -> None:
        y = fastlora.dora_linear(x, weight, lora_A, lora_B, magnitude, scaling=2.0)
        torch.autograd.grad(y, (x, *leaves), dy)

    calls: Calls = {"plain": plain, "dora": step}
    if importlib.util.find_spec("peft") is not None:
        import peft

        config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"], use_dora=True)
        model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        learns = [p for p in layer.parameters() if p.requires_grad]

        def theirs(i: int) -> None:
            torch.autograd.grad(layer(x), (x, *learns), dy)

        calls["dora, PEFT"] = theirs
    return calls


def switching(R: int = 16) -> Calls:
    """A merged model with the linears of an 8B Llama, between two adapters on the GPU."""
    H, KV, FF, blocks = (4096, 1024, 14336, 32) if CUDA else (32, 16, 48, 2)
    shapes = [(H, H), (H, KV), (H, KV), (H, H), (H, FF), (H, FF), (FF, H)]
    model = nn.Sequential(
        *(
            nn.Linear(k, n, bias=False, device=DEVICE, dtype=DTYPE)
            for _ in range(blocks)
            for k, n in shapes
        )
    )
    fastlora.inject(model, [str(i) for i in range(len(model))], r=R, lora_alpha=2 * R)
    model.eval()
    state = fastlora.lora_state_dict(model)
    tasks = [{k: torch.randn_like(v) * 0.01 for k, v in state.items()} for _ in range(2)]
    fastlora.merge(model)
    merged = [layer.weight.detach() for layer in model]
    frozen = [layer._frozen.values.detach() for layer in model]

    def copy(i: int) -> None:
        for old, new in zip(frozen, merged, strict=True):
            new.copy_(old)

    return {
        "plain": copy,
        "switch": lambda i: fastlora.switch_adapter(model, tasks[i % 2]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", help="write every sample to this file")
    args = parser.parse_args()
    device = torch.device(DEVICE, 0) if CUDA else torch.device(DEVICE)
    machine = {**describe_machine(device), **source_state()}
    print(", ".join(f"{label} {value}" for label, value in machine.items()))
    clock = CudaClock(device) if CUDA else None
    run = {
        "machine": machine,
        "clocks": read_clocks(device),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["python", "benchmarks/bench_layers.py", *sys.argv[1:]]),
        "platform": platform.platform(terse=True),
    }
    eager, alone, failed = {}, {}, ""
    for make in (embedding, query_and_value, dora, switching):
        calls, name = make(), make.__name__
        if clock is None:
            for call in calls.values():
                call(0)
                call(1)
            print(f"{name}: {', '.join(calls)} ran")
            continue
        for call in calls.values():
            estimate_ms(clock, call)  # warms it up
        counts = dict.fromkeys(calls, 1 if make is switching else 10)
        samples, graphs = time_eager(clock, calls, counts, repeats=20), {}
        try:
            captured = {
                n: clock.capture(call, 2 if make is switching else 8) for n, call in calls.items()
            }
            graphs = time_graphs(clock, captured, repeats=20)
            del captured
        except CaptureError as error:
            failed = f"{name}: {error}"
        eager[name] = {n: dataclasses.asdict(s) for n, s in samples.items()}
        alone[name] = {n: dataclasses.asdict(s) for n, s in graphs.items()}
        for line in timing_lines(samples, graphs, "plain"):
            print(f"{name:16} {line}", flush=True)
        if failed:  # what a process does after a failed capture is unsafe
            break
        del calls
        clock.forget()
    if args.json and clock is not None:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({**run, "failed": failed, "eager": eager, "graphs": alone}, file)
    if failed:
        print(failed, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
