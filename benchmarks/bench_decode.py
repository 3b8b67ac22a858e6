"""A decode step of mixed adapters, kernel by kernel and whole, for given tiles: us in a CUDA graph.

``python benchmarks/bench_decode.py [--json FILE] [--tiles M,N,K,warps,stages,splits ...]``. Without tiles
each shape takes those of `fastlora.kernels.config.multi_decode_config`. Every result is compared with the
reference before it is timed. It needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if importlib.util.find_spec("fastlora") is None:  # a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import fastlora
from fastlora.bench.cases import SERVE_TABLE
from fastlora.bench.clock import CudaClock, time_graphs
from fastlora.kernels import launch, multi_gemm
from fastlora.kernels.config import MULTI_BLOCK_M, LaunchConfig, multi_decode_config
from fastlora.kernels.multi_decode import lora_multi_decode
from fastlora.kernels.multi_shrink import lora_multi_shrink

CALLS = 20


def tiles_of(text: str) -> LaunchConfig:
    block_m, block_n, block_k, warps, stages, splits = map(int, text.split(","))
    return LaunchConfig(
        block_m, block_n, block_k, num_warps=warps, num_stages=stages, SPLITS=splits
    )


@torch.no_grad()
def calls_of(
    M: int, live: int, R: int, K: int, N: int, tiles: list[LaunchConfig]
) -> dict[str, Callable[[int], object]]:
    """What is timed: the base product, the small kernels alone, and for each tiles the product and all."""
    new: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, weight = torch.randn(M, K, **new), torch.randn(N, K, **new) * K**-0.5
    lora_A, lora_B = torch.randn(live, R, K, **new) * K**-0.5, torch.randn(live, N, R, **new)
    ids, factor = torch.arange(M, device="cuda") % live, torch.full((live,), 2.0, device="cuda")
    routing = fastlora.route(ids, live)
    stack = fastlora.AdapterStack(lora_A, lora_B, scaling=2.0)
    blocks = (routing.order, routing.sorted_ids, routing.block_starts(MULTI_BLOCK_M))
    exact = fastlora.reference.lora_linear_multi(
        x.double(), weight.double(), lora_A.double(), lora_B.double(), ids, scaling=2.0
    )
    s, _ = lora_multi_shrink(x, lora_A, factor, None, blocks, MULTI_BLOCK_M, parts=8)
    calls: dict[str, Callable[[int], object]] = {"base": lambda _: torch.mm(x, weight.t())}
    for parts in (4, 8, 16):
        calls[f"shrink in {parts}"] = lambda _, n=parts: lora_multi_shrink(  # type: ignore[misc]
            x, lora_A, factor, None, blocks, MULTI_BLOCK_M, parts=n
        )
    chosen = multi_decode_config(M, N, K, R, 2, 132)
    for c in tiles or ([chosen] if chosen is not None else []):

        def whole(_: int, c: LaunchConfig = c) -> torch.Tensor:
            multi_gemm.multi_decode_config = lambda *_: c
            launch.clear_plans()  # while the graph is captured; a replay runs none of this
            return fastlora.lora_linear_multi(x, weight, stack, routing)

        error = float((whole(0).double() - exact).norm() / exact.norm())
        if not error < 0.01:
            raise RuntimeError(f"{c}: relative error {error:.2g}")
        calls[f"product {c}"] = lambda _, c=c: lora_multi_decode(  # type: ignore[misc]
            x, weight, s, lora_B, None, routing.ids, c
        )
        calls[f"whole {c}"] = whole
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", help="where to write the medians")
    parser.add_argument("--tiles", nargs="*", type=tiles_of, default=[])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_decode needs a CUDA GPU")
    clock, found = CudaClock(torch.device("cuda", 0)), {}
    for shape in SERVE_TABLE:
        with torch.no_grad():
            calls = calls_of(*shape, args.tiles)
            graphs = {name: clock.capture(call, CALLS) for name, call in calls.items()}
        samples = time_graphs(clock, graphs, repeats=12)
        found[str(shape)] = {n: 1e3 * statistics.median(s.device_ms) for n, s in samples.items()}
        print(shape)
        for name, us in found[str(shape)].items():
            print(f"  {us:7.2f} us  {name}")
    if args.json:
        device = torch.cuda.get_device_name()
        Path(args.json).write_text(json.dumps({"device": device, "us": found}, indent=1))


if __name__ == "__main__":
    main()
