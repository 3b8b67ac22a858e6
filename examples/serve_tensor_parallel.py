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
import contextlib
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
from torch import Tensor, nn

import fastlora
from fastlora.distributed import shard_adapter, shard_linears

COLWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
ROWWISE = ("o_proj", "down_proj")
ADAPTED = (*COLWISE[:-1], *ROWWISE)
# Of the norm of a row's logits. A bf16 sum over ranks rounds once more than one product does.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# With less, a wrong adapter could pass the check.
LEAST_EFFECT = 2.0
REPEATS = 5
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


def build_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The same whole model on every rank."""
    torch.manual_seed(0)
    sizes = dict(SIZES[args.size])
    sizes["num_hidden_layers"] = args.layers or sizes["num_hidden_layers"]
    length = args.prompt + args.steps
    config = transformers.LlamaConfig(**sizes, use_cache=False, max_position_embeddings=length)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with device:
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def adapter(
    index: int, shapes: dict[str, torch.Size], rank: int, like: Tensor
) -> dict[str, Tensor]:
    """Adapter number ``index``, whole, named as PEFT names it; the same on every rank."""
    generator = torch.Generator(like.device).manual_seed(1000 + index)
    options = {"generator": generator, "device": like.device, "dtype": like.dtype}
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        lora_a = torch.randn(rank, in_features, **options) / in_features**0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a
        lora_b = 0.05 * torch.randn(out_features, rank, **options)
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b
    return tensors


def requests(args: argparse.Namespace, shift: int = 0) -> list[str | None]:
    """An adapter for each row; each eighth row has none. A shift is what a captured graph must follow."""
    names = (f"adapter-{(row + shift) % args.adapters}" for row in range(args.rows))
    return [None if row % 8 == 0 else name for row, name in enumerate(names)]


class Cache:
    """Keys and values of one rank's heads at fixed addresses: a graph can replay its updates."""

    def __init__(self, layers: int, shape: tuple[int, ...], position: Tensor, like: Tensor) -> None:
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.position = position

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.position, keys)
        self.values[layer].index_copy_(2, self.position, values)
        return self.keys[layer], self.values[layer]


class Decoder:
    """Greedy decoding of all rows, in one process or cut over the ranks."""

    def __init__(self, args: argparse.Namespace, device: torch.device, sharded: bool) -> None:
        self.args, self.device, self.sharded = args, device, sharded
        self.ranks = dist.get_world_size() if sharded else 1
        model = build_model(args, device)
        modules = dict(model.named_modules())
        shapes = {n: m.weight.shape for n, m in modules.items() if n.endswith(ADAPTED)}
        if sharded:
            shard_linears(model, COLWISE, ROWWISE)
        self.model = model
        self.bank = self._bank(shapes) if args.lora == "fastlora" else None
        config = model.config
        heads = config.num_key_value_heads // self.ranks
        head_dim = config.hidden_size // config.num_attention_heads
        length = args.prompt + args.steps
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.columns = torch.arange(length, device=device)
        self.tokens = torch.zeros(args.rows, 1, dtype=torch.int64, device=device)
        shape = (args.rows, heads, length, head_dim)
        self.cache = Cache(config.num_hidden_layers, shape, self.position, model.lm_head.weight)
        self.logits = torch.empty(0)
        ids = torch.full((args.rows,), -1, dtype=torch.int32, device=device)
        self.routing = fastlora.route(ids, args.adapters)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _bank(self, shapes: dict[str, torch.Size]) -> fastlora.AdapterBank:
        args = self.args
        bank = fastlora.AdapterBank(
            self.model, slots=args.adapters, max_rank=args.rank, target_modules=ADAPTED
        )
        for index in range(args.adapters):
            tensors = adapter(index, shapes, args.rank, self.model.lm_head.weight)
            if self.sharded:
                tensors = shard_adapter(tensors, COLWISE, ROWWISE)
            bank.add(f"adapter-{index}", tensors, config={"lora_alpha": 2 * args.rank})
        fastlora.serve(self.model, bank)
        return bank

    @contextlib.contextmanager
    def using(self, names: list[str | None]):
        """Hold the adapters of the rows; the tables of the routing keep their addresses."""
        if self.bank is None:
            yield
            return
        with self.bank.use(names) as ids:
            self.routing.update_(ids)
            yield

    @torch.no_grad()
    def eager_step(self) -> None:
        """One token for each row, with no work on the host that a graph could not replay."""
        adapters = {"adapter_ids": self.routing} if self.bank is not None else {}
        output = self.model(
            input_ids=self.tokens,
            attention_mask=(self.columns <= self.position).view(1, 1, 1, -1),
            position_ids=self.position.view(1, 1),
            past_key_values=self.cache,
            use_cache=False,
            **adapters,
        )
        self.logits = output.logits[:, -1]
        self.tokens.copy_(self._best_tokens(self.logits))
        self.position += 1

    def _best_tokens(self, logits: Tensor) -> Tensor:
        """The largest logit's token; of a cut vocabulary, the best of each rank's best."""
        values, tokens = logits.max(-1, keepdim=True)
        if not self.sharded:
            return tokens
        rank = dist.get_rank()
        tokens = tokens + rank * logits.shape[-1]
        # As fp32, which holds any token's number below 2**24, in one collective.
        best = torch.zeros(self.ranks, 2, *values.shape, device=self.device)
        best[rank, 0], best[rank, 1] = values, tokens
        dist.all_reduce(best)
        values, tokens = best.unbind(1)
        return tokens.gather(0, values.argmax(0, keepdim=True))[0].long()

    def step(self) -> None:
        if self.graph is None:
            self.eager_step()
        else:
            self.graph.replay()

    def capture(self) -> str:
        """Capture a step, or say why not: everything has run before, compiled and connected."""
        try:
            graph = torch.cuda.CUDAGraph()
            # thread_local: NCCL's watchdog may ask for events meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.eager_step()
        except RuntimeError as error:
            return str(error).splitlines()[0] or type(error).__name__
        self.graph = graph
        return ""

    def start(self, prompt: Tensor) -> None:
        """Feed the prompt ``[length, rows, 1]``, a token a step, to an empty cache."""
        self.position.zero_()
        for tokens in prompt:
            self.tokens.copy_(tokens)
            self.step()

    def close(self) -> None:
        if self.graph is not None:
            self.graph.reset()  # NCCL keeps a communicator that a graph still holds
            self.graph = None


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
