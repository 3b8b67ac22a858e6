"""Times of projections that share x: `lora_linear_group` beside separate calls, eager LoRA and cuBLAS.

``python benchmarks/bench_group.py [--json FILE] [--graphs]``. Forward and backward of q, k and v and of gate
and up with the sizes of Llama-3.1-8B; each row is a ratio to the frozen floor, which is the cuBLAS products
of the frozen weights and nothing else. Without a CUDA GPU the sizes are tiny and every call is only checked
and run: no times are given.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

if importlib.util.find_spec("fastlora") is None:  # a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import fastlora
from fastlora import reference
from fastlora.bench.clock import (
    CudaClock,
    calls_for,
    estimate_ms,
    time_eager,
    time_graphs,
    timing_lines,
)
from fastlora.bench.problems import sets_past_l2
from fastlora.bench.train_providers import eager_lora_linear

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
DTYPE = torch.bfloat16
WIDTHS = (
    {"qkv": (4096, 1024, 1024), "gate_up": (14336, 14336)}
    if CUDA
    else {"qkv": (32, 16, 16), "gate_up": (48, 48)}
)
K = 4096 if CUDA else 32
TOKENS = (8192, 2048) if CUDA else (16,)
SCALING = 2.0
GRAPH_CALLS = 8
Calls = dict[str, Callable[[int], object]]


class Group:
    """The tensors of a case: frozen weights, adapters, and enough x and dy to push each other out of L2."""

    def __init__(self, M: int, widths: tuple[int, ...], R: int) -> None:
        """Draw them: y of order one, and a LoRA branch that matters."""

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, device=DEVICE, dtype=DTYPE).mul_(scale)

        sets = sets_past_l2(M * (K + sum(widths)) * DTYPE.itemsize, DEVICE)
        self.xs = [draw(M, K).requires_grad_() for _ in range(sets)]
        self.dys = [[draw(M, n) for n in widths] for _ in range(sets)]
        self.weights = [draw(n, K, scale=K**-0.5) for n in widths]
        self.lora_As = [draw(R, K, scale=K**-0.5).requires_grad_() for _ in widths]
        self.lora_Bs = [draw(n, R, scale=R**-0.5).requires_grad_() for n in widths]

    def grads(self, i: int, forward: Callable[[Tensor], Any]) -> tuple[Tensor, ...]:
        """Forward and backward on one set of inputs: the gradients of x and of the adapters."""
        x, dys = self.xs[i % len(self.xs)], self.dys[i % len(self.xs)]
        leaves = (x, *self.lora_As, *self.lora_Bs)
        return torch.autograd.grad(forward(x), leaves, dys)

    def group(self, x: Tensor, p: float, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        """All projections in one call."""
        return fastlora.lora_linear_group(
            x, self.weights, self.lora_As, self.lora_Bs,
            scaling=SCALING, dropout_p=p, seed=seed,
        )  # fmt: skip

    def each(self, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        """One call for each projection."""
        return tuple(map(call, self.weights, self.lora_As, self.lora_Bs))

    def frozen(self, i: int) -> Tensor:
        """Forward and backward of the frozen weights alone, x's gradient summed by cuBLAS."""
        x, dys = self.xs[i % len(self.xs)].detach(), self.dys[i % len(self.xs)]
        for weight in self.weights:
            torch.mm(x, weight.t())
        dx = torch.mm(dys[0], self.weights[0])
        for dy, weight in zip(dys[1:], self.weights[1:], strict=True):
            dx.addmm_(dy, weight)
        return dx

    def calls(self, p: float) -> Calls:
        """What is timed, by name."""

        def separate(x: Tensor) -> tuple[Tensor, ...]:
            return self.each(
                lambda w, a, b: fastlora.lora_linear(x, w, a, b, scaling=SCALING, dropout_p=p)
            )

        def eager(x: Tensor) -> tuple[Tensor, ...]:
            return self.each(lambda w, a, b: eager_lora_linear(x, w, a, b, None, SCALING, p))

        return {
            "frozen": self.frozen,
            "group": lambda i: self.grads(i, lambda x: self.group(x, p)),
            "separate": lambda i: self.grads(i, separate),
            "eager": lambda i: self.grads(i, eager),
        }

    def errors(self, p: float) -> list[float]:
        """Relative errors, in norm, of outputs and gradients to the twin, which computes in fp32."""
        seed = torch.tensor(7, device=DEVICE) if p else None

        def twin(x: Tensor) -> tuple[Tensor, ...]:
            return reference.lora_linear_group(
                x, self.weights, self.lora_As, self.lora_Bs,
                scaling=SCALING, dropout_p=p, seed=seed,
            )  # fmt: skip

        found = []
        with torch.no_grad():
            pairs = list(zip(self.group(self.xs[0], p, seed), twin(self.xs[0]), strict=True))
        grads = self.grads(0, lambda x: self.group(x, p, seed)), self.grads(0, twin)
        for got, expected in [*pairs, *zip(*grads, strict=True)]:
            error = (got.float() - expected.float()).norm() / expected.float().norm()
            found.append(float(error))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", help="write every sample to this file")
    parser.add_argument("--rank", type=int, default=16, help="of each projection (default: 16)")
    parser.add_argument(
        "--repeats", type=int, default=20, help="samples of each call (default: 20)"
    )
    parser.add_argument("--graphs", action="store_true", help="time CUDA graphs of the calls too")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if CUDA else "no CUDA GPU: nothing is timed"
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, rank {args.rank}")
    clock = CudaClock(DEVICE) if CUDA else None
    found = []
    for (group_name, widths), M, p in itertools.product(WIDTHS.items(), TOKENS, (0.0, 0.1)):
        title = f"{group_name} {M} x {K} -> {'+'.join(map(str, widths))}, p = {p}"
        group = Group(M, widths, args.rank)
        errors = group.errors(p)
        if not max(errors) <= 0.02:
            raise SystemExit(f"{title}: relative errors {errors}, expected 0.02 at most")
        calls = group.calls(p)
        if clock is None:
            for call in calls.values():
                call(0)
                call(1)
            print(f"{title}: {', '.join(calls)} ran, largest relative error {max(errors):.1e}")
            continue
        counts = {n: calls_for(estimate_ms(clock, call), 20) for n, call in calls.items()}
        samples = time_eager(clock, calls, counts, args.repeats)
        graphs = {}
        if args.graphs:
            captured = {n: clock.capture(call, GRAPH_CALLS) for n, call in calls.items()}
            graphs = time_graphs(clock, captured, args.repeats)
            del captured
        print(f"{title}, largest relative error {max(errors):.1e}")
        for line in timing_lines(samples, graphs, "frozen"):
            print(f"  {line}")
        found.append(
            {
                "group": group_name, "tokens": M, "in": K, "out": widths, "p": p, "rank": args.rank,
                "errors": errors,
                "eager": {n: dataclasses.asdict(s) for n, s in samples.items()},
                "graphs": {n: dataclasses.asdict(s) for n, s in graphs.items()},
            }
        )  # fmt: skip
        del group, calls
        clock.forget()
    if args.json and CUDA:
        versions = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({**versions, "cases": found}, file)


if __name__ == "__main__":
    main()
