"""A decode step of mixed adapters, kernel by kernel and whole, each way that it can go: us in a CUDA graph.

``python benchmarks/bench_decode.py [--json FILE]``. Every whole step is compared with the reference before it
is timed. Without a CUDA GPU the sizes are tiny, everything is only checked, and the kernels run in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
if importlib.util.find_spec("fastlora") is None:  # a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import fastlora
from fastlora import autograd_multi
from fastlora.bench.cases import SERVE_TABLE
from fastlora.bench.clock import CudaClock, time_graphs
from fastlora.kernels import launch, multi_add, multi_gemm
from fastlora.kernels.config_multi import FEW_BLOCK_M, multi_decode_config
from fastlora.kernels.multi_add_blocks import lora_multi_add_blocks
from fastlora.kernels.multi_shrink_blocks import lora_multi_shrink_blocks
from fastlora.kernels.multi_shrink_rows import lora_multi_shrink_rows

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float16)
SHAPES = [s for s in SERVE_TABLE if s[0] <= 256] if CUDA else [(20, 3, 4, 64, 48)]
CALLS = 20
Call = Callable[[int], object]


@contextmanager
def way(name: str) -> Iterator[None]:
    """The kernels of a step: as chosen, all in one launch, by rows or by blocks of rows."""
    chosen = autograd_multi.multi_reads_rows
    fused = {"one launch": lambda *_: multi_decode_config(16, 4096, DTYPE.itemsize, 132)}
    rows = {"rows": lambda _: True, "blocks": lambda _: False}.get(name, chosen)
    tiles = fused.get(name, multi_gemm.multi_decode_config)
    launch.clear_plans()
    with (
        mock.patch.object(autograd_multi, "multi_reads_rows", rows),
        mock.patch.object(multi_add, "multi_reads_rows", rows),
        mock.patch.object(multi_gemm, "multi_decode_config", tiles),
    ):
        yield
    launch.clear_plans()


@torch.no_grad()
def calls_of(M: int, live: int, R: int, K: int, N: int) -> dict[str, tuple[str, Call]]:
    """What is timed, and the way it goes."""
    new: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE}
    x, weight = torch.randn(M, K, **new), torch.randn(N, K, **new) * K**-0.5
    lora_A, lora_B = torch.randn(live, R, K, **new) * K**-0.5, torch.randn(live, N, R, **new)
    ids, factor = torch.arange(M, device=DEVICE) % live, torch.full((live,), 2.0, device=DEVICE)
    routing = fastlora.route(ids, live)
    stack = fastlora.AdapterStack(lora_A, lora_B, scaling=2.0)
    blocks = (routing.order, routing.sorted_ids, routing.block_starts(FEW_BLOCK_M))
    exact = fastlora.reference.lora_linear_multi(
        x.double(), weight.double(), lora_A.double(), lora_B.double(), ids, scaling=2.0
    )
    s = lora_multi_shrink_rows(x, lora_A, factor, None, blocks[:2])
    y = multi_add.frozen_linear(x, weight)

    def whole(_: int) -> torch.Tensor:
        return fastlora.lora_linear_multi(x, weight, stack, routing)

    calls: dict[str, tuple[str, Call]] = {
        "x W0^T, cuBLAS": ("", lambda _: torch.mm(x, weight.t())),
        "s, blocks": ("", lambda _: lora_multi_shrink_blocks(x, lora_A, factor, None, blocks)),
        "s, rows": ("", lambda _: lora_multi_shrink_rows(x, lora_A, factor, None, blocks[:2])),
        "updates added, rows": (
            "",
            lambda _: multi_add.lora_multi_add(y, s, lora_B, None, blocks[:2]),
        ),
        "updates added, blocks": (
            "",
            lambda _: lora_multi_add_blocks(y, s, lora_B, None, blocks),
        ),
    }
    ways = ["", "rows", "blocks", *(["one launch"] if M <= 16 else [])]
    for name in ways:
        with way(name):
            error = float((whole(0).double() - exact).norm() / exact.norm())
        if not error < 0.01:
            raise RuntimeError(f"{name or 'as chosen'}: relative error {error:.2g}")
        calls[f"whole, {name or 'as chosen'}"] = (name, whole)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", help="where to write the medians")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        calls = calls_of(*shape)
        print(shape)
        if not CUDA:
            print(f"  {len(calls)} calls, each way of a step as the reference")
            continue
        clock, graphs = CudaClock(torch.device("cuda", 0)), {}
        for name, (how, call) in calls.items():
            with torch.no_grad(), way(how):
                graphs[name] = clock.capture(call, CALLS)
        samples = time_graphs(clock, graphs, repeats=12)
        found[str(shape)] = {n: 1e3 * statistics.median(s.device_ms) for n, s in samples.items()}
        for name, us in found[str(shape)].items():
            print(f"  {us:7.2f} us  {name}")
    if args.json and CUDA:
        device = torch.cuda.get_device_name()
        Path(args.json).write_text(json.dumps({"device": device, "us": found}, indent=1))


if __name__ == "__main__":
    main()
