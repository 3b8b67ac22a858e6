"""Decode with another LoRA adapter in each row of a batch, on a Llama that is cut over the ranks.

Two processes on the CPU (gloo), checked against one process:

    torchrun --nproc-per-node 2 examples/serve_tensor_parallel.py --check

Two GPUs (NCCL), four layers of Llama-3.1-8B's sizes:

    torchrun --nproc-per-node 2 examples/serve_tensor_parallel.py --size llama-3.1-8b --layers 4 \
        --rows 64 --adapters 64 --rank 16 --dtype bfloat16 --check

Weights, adapters and prompts are random. Each rank has its heads, its part of the MLP and of the output
embedding, its slices of all adapters in a bank of its own, and the whole input embedding. A step is one
token for each row: two all-reduces a layer, and a small one for the best tokens of all ranks.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers
import triton
from finetune_distributed import (
    SIZES,
    device_name,
    everywhere,
    peak_mib,
    process_group,
    synchronize,
)
from parallel_decoder import Decoder
from torch import Tensor

import fastlora

# Of the norm of a row's logits. A bf16 sum over ranks rounds once more than one product does.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# With less, a wrong adapter could pass the check.
LEAST_EFFECT = 2.0
REPEATS = 5
# What is checked: steps, and assignments of adapters to rows, the second after a graph was captured.
CHECKED = 4
SHIFTS = (0, 1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lora", choices=("fastlora", "none"), default="fastlora", help="none: the frozen model"
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--layers", type=int, help="decoder layers instead of the size's own")
    parser.add_argument("--rows", type=int, default=8, help="sequences that decode together")
    parser.add_argument("--adapters", type=int, default=4, help="adapters in the bank")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--prompt", type=int, default=16, help="cached tokens when timing starts")
    parser.add_argument("--steps", type=int, default=32, help="timed tokens of each row")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cpu", action="store_true", help="stay off the GPUs")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument(
        "--check", action="store_true", help="compare with one process; exit 1 if off"
    )
    parser.add_argument("--json", help="where rank 0 writes the figures")
    args = parser.parse_args()
    for name, least in (("rows", 2), ("adapters", 1), ("rank", 1), ("prompt", 1), ("steps", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    return args


def requests(args: argparse.Namespace, shift: int = 0) -> list[str | None]:
    """An adapter for each row; each eighth row has none."""
    names = (f"adapter-{(row + shift) % args.adapters}" for row in range(args.rows))
    return [None if row % 8 == 0 else name for row, name in enumerate(names)]


@dataclass
class Timing:
    """What one decoder measured on this rank."""

    seconds: list[float]
    """A step's, by repeat."""
    graph: bool
    why_no_graph: str
    peak_mib: float
    collectives: float
    """Their share of the time of the profiled steps."""


def measure(decoder: Decoder, prompt: Tensor) -> Timing:
    """Times of a step; leaves the decoder with its graph, if it has one."""
    args, device, sharded = decoder.args, decoder.device, decoder.sharded
    release_memory(
        device
    )  # the peak is that of serving: a whole model stood here before it was cut
    with decoder.using(requests(args)):
        decoder.start(prompt[:3])  # compiles, and connects the ranks
        why = "--eager" if args.eager else "no GPU" if device.type == "cpu" else ""
        if not why:
            synchronize(device)
            why = decoder.capture()
            why = next(filter(None, everywhere(why)), "") if sharded else why
            if why:  # graphs of some ranks alone would wait for the others
                decoder.close()
        decoder.start(prompt)
        seconds = []
        for _ in range(REPEATS):
            decoder.position.fill_(len(prompt))
            synchronize(device)
            if sharded:
                dist.barrier()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(args.steps):
                decoder.step()
            synchronize(device)
            seconds.append((time.perf_counter() - start) / args.steps)
        decoder.position.fill_(len(prompt))
        share = collectives_share(decoder) if sharded else 0.0
    return Timing(seconds, decoder.graph is not None, why, peak_mib(device), share)


def collectives_share(decoder: Decoder) -> float:
    """Time in collectives, waiting for other ranks included, over the time of a few steps."""
    device = decoder.device
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    synchronize(device)
    dist.barrier()
    with torch.profiler.profile(activities=kinds) as profile:
        dist.barrier()  # starting the profiler takes each rank another time
        synchronize(device)
        start = time.perf_counter()
        with torch.profiler.record_function("steps"):
            for _ in range(min(decoder.args.steps, 8)):
                decoder.step()
            synchronize(device)
        total = time.perf_counter() - start
    # NCCL's collectives are kernels on the GPU; gloo's are ranges on threads of its own. The barrier's
    # are not among the steps'.
    events = profile.events()
    begin = min(e.time_range.start for e in events if e.name == "steps")
    prefix = "ncclDevKernel" if on_gpu else "gloo:"
    ranges = [e.time_range for e in events if e.name.startswith(prefix)]
    spent = sum(span.elapsed_us() for span in ranges if span.start >= begin)
    return spent / 1e6 / total


def trajectory(
    decoder: Decoder, names: list[str | None], prompt: Tensor, follow: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Whole logits of the prompt's last token and of steps after it, and the tokens between them.

    With ``follow`` the steps take its tokens, not those that the logits choose.
    """
    logits, tokens = [], []
    count = min(CHECKED, decoder.args.steps + 1)
    with decoder.using(names):
        decoder.start(prompt)
        for i in range(count):
            logits.append(whole(decoder.logits, decoder.sharded).cpu())
            chosen = logits[-1].gather(1, decoder.tokens.cpu())
            if not torch.equal(chosen, logits[-1].amax(1, keepdim=True)):
                raise SystemExit("a step did not choose the tokens of the largest logits")
            if follow is not None:
                decoder.tokens.copy_(follow[i])
            tokens.append(decoder.tokens.clone())
            if i + 1 < count:
                decoder.step()
    return logits, torch.stack(tokens)


def whole(logits: Tensor, sharded: bool) -> Tensor:
    if not sharded:
        return logits.clone()
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, logits.contiguous())
    return torch.cat(parts, dim=-1)


def distances(got: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Of each row the largest distance of its logits, relative to their norm."""
    pairs = [(a.float(), b.float()) for a, b in zip(got, expected, strict=True)]
    return torch.stack([(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in pairs]).amax(0)


@dataclass
class Expected:
    """What one process gives for the mixtures of adapters that are checked."""

    logits: list[list[Tensor]]
    tokens: list[Tensor]
    effect: float
    """Of the row that its adapter changes least: how far from the frozen model."""


def one_process(
    args: argparse.Namespace, device: torch.device, prompt: Tensor
) -> tuple[Timing, Expected | None]:
    decoder = Decoder(args, device, sharded=False)
    timing = measure(decoder, prompt)
    expected = None
    if args.check:
        mixtures = [requests(args, shift) for shift in SHIFTS]
        runs = [trajectory(decoder, names, prompt, None) for names in mixtures]
        effect = float("inf")
        for names, (logits, tokens) in zip(mixtures, runs, strict=True):
            frozen, _ = trajectory(decoder, [None] * args.rows, prompt, tokens)
            adapted = torch.tensor([name is not None for name in names])
            effect = min(effect, float(distances(logits, frozen)[adapted].min()))
        expected = Expected([r[0] for r in runs], [r[1] for r in runs], effect)
    decoder.close()
    del decoder
    release_memory(device)
    return timing, expected


def compare(decoder: Decoder, prompt: Tensor, expected: Expected | None) -> float:
    """The largest relative distance of a row's logits from one process; on rank 0, which knows those."""
    args, worst = decoder.args, 0.0
    for i, shift in enumerate(SHIFTS):
        count = min(CHECKED, args.steps + 1)
        follow = torch.empty(count, args.rows, 1, dtype=torch.int64, device=decoder.device)
        if expected is not None:
            follow.copy_(expected.tokens[i])
        dist.broadcast(follow, src=0)
        logits, _ = trajectory(decoder, requests(args, shift), prompt, follow)
        if expected is not None:
            found = distances(logits, expected.logits[i]).max()
            worst = max(worst, float(found.nan_to_num(nan=float("inf"))))
    return worst


def run(args: argparse.Namespace, device: torch.device) -> bool:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    heads = SIZES[args.size]["num_key_value_heads"]
    if heads % ranks:
        raise SystemExit(f"the ranks must divide the {heads} key/value heads, got {ranks} ranks")
    generator = torch.Generator().manual_seed(1)
    shape = (args.prompt, args.rows, 1)
    prompt = torch.randint(SIZES[args.size]["vocab_size"], shape, generator=generator).to(device)

    alone, expected = None, None
    if rank == 0:
        alone, expected = one_process(args, device, prompt)
    dist.barrier()
    decoder = Decoder(args, device, sharded=True)
    timing = measure(decoder, prompt)
    timings = everywhere(timing)
    error = compare(decoder, prompt, expected) if args.check else None
    decoder.close()

    equal = True
    if alone is not None:
        equal = report(args, device, alone, timings, expected, error)
    verdicts = [equal]
    dist.broadcast_object_list(verdicts, src=0)
    return verdicts[0]


def report(
    args: argparse.Namespace,
    device: torch.device,
    alone: Timing,
    timings: list[Timing],
    expected: Expected | None,
    error: float | None,
) -> bool:
    """Print the figures, write them, and say whether the ranks equal one process."""
    one, all_ranks = throughput(args, [alone]), throughput(args, timings)
    figures = {
        "args": vars(args),
        "ranks": len(timings),
        "device": device_name(device),
        "versions": versions(device),
        "distinct_adapters_of_a_batch": len(set(requests(args)) - {None}),
        **all_ranks,
        "collectives_share": [t.collectives for t in timings],
        "one_process": one,
        "speedup": one["ms_per_step"] / all_ranks["ms_per_step"],
    }
    print(f"{args.lora}, {len(timings)} x {device_name(device)}, torch {torch.__version__}")
    print(f"{args.rows} rows, {args.adapters} adapters of rank {args.rank}")
    kind = "allocated" if device.type == "cuda" else "resident, the whole process"
    for of in (one, all_ranks):
        how = "CUDA graph" if of["cuda_graph"] else f"eager: {of['why_no_cuda_graph']}"
        peaks = ", ".join(f"{peak:,.0f} MiB" for peak in of["peak_mib"])
        print(
            f"{len(of['peak_mib'])} process(es): {of['ms_per_step']:.3f} ms a step, "
            f"{of['tokens_per_second']:,.0f} tokens/s ({how}); peak memory ({kind}): {peaks}"
        )
    shares = ", ".join(f"{100 * t.collectives:.0f} %" for t in timings)
    print(f"speed-up: {figures['speedup']:.2f}; collectives, by rank: {shares} of a step's time")
    equal = True
    if error is not None and expected is not None:
        tolerance = TOLERANCES[getattr(torch, args.dtype)]
        told = args.lora == "none" or expected.effect >= LEAST_EFFECT * tolerance
        equal = error <= tolerance and told
        print(
            f"{'equal to' if error <= tolerance else 'DIFFERENT from'} one process: logits of a row "
            f"differ by at most {error:.2g} of their norm, tolerance {tolerance:.2g}; an adapter "
            f"changes its row by {expected.effect:.2g} or more"
            + ("" if told else ": TOO LITTLE, a wrong adapter could pass")
        )
        figures |= {
            "equal": equal,
            "largest_relative_error": error,
            "tolerance": tolerance,
            "least_effect_of_an_adapter": expected.effect,
        }
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
    return equal


def release_memory(device: torch.device) -> None:
    gc.collect()  # a served model and its bank are a cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def throughput(args: argparse.Namespace, timings: list[Timing]) -> dict[str, Any]:
    """Figures of the ranks that computed together; the slowest sets the pace."""
    step = max(statistics.median(t.seconds) for t in timings)
    return {
        "tokens_per_second": args.rows / step,
        "ms_per_step": 1e3 * step,
        "ms_per_step_by_rank": [[1e3 * s for s in t.seconds] for t in timings],
        "cuda_graph": timings[0].graph,
        "why_no_cuda_graph": timings[0].why_no_graph,
        "peak_mib": [t.peak_mib for t in timings],
    }


def versions(device: torch.device) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "fastlora": fastlora.__version__,
    }
    if device.type == "cuda":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def main() -> None:
    args = parse_args()
    with process_group(args.cpu) as device:
        equal = run(args, device)
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
