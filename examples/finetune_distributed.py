"""LoRA training of a Llama with random weights under DDP, FSDP2 or tensor parallelism.

Two processes on the CPU (gloo), checked against one process:

    torchrun --nproc-per-node 2 examples/finetune_distributed.py --mode tp --check

Two GPUs (NCCL), four layers of Llama-3.1-8B's sizes:

    torchrun --nproc-per-node 2 examples/finetune_distributed.py --mode fsdp2 \
        --size llama-3.1-8b --layers 4 --dtype bfloat16 --batch 8 --seq 2048 --steps 20
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastlora
from fastlora.distributed import ColwiseLoRA, RowwiseLoRA

T = TypeVar("T")

SIZES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 256,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
    },
}
COLWISE = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
ROWWISE = ("self_attn.o_proj", "mlp.down_proj")
# Of the loss of one process. A bf16 sum over ranks rounds once more than one product does.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-3}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("ddp", "fsdp2", "tp", "single"), default="ddp")
    parser.add_argument("--lora", choices=("fastlora", "peft"), default="fastlora")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--layers", type=int, help="decoder layers instead of the size's own")
    parser.add_argument("--batch", type=int, default=4, help="sequences of all ranks together")
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="first steps, left out of the timing")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--adapter-dtype", choices=("float32", "bfloat16"), help="default: --dtype")
    parser.add_argument("--cpu", action="store_true", help="stay off the GPUs")
    parser.add_argument(
        "--check", action="store_true", help="compare with one process; exit 1 if off"
    )
    parser.add_argument("--profile", action="store_true", help="share of a step in communication")
    parser.add_argument("--json", help="where rank 0 writes the figures")
    args = parser.parse_args()
    if args.check and args.dropout > 0:
        parser.error("--check needs --dropout 0: rows and slices draw masks of their own")
    if not 0 <= args.warmup < args.steps:
        parser.error(f"--warmup must be from 0 to below --steps, got {args.warmup}")
    return args


def build(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The same model on every rank, with adapters on all seven linears of a layer."""
    torch.manual_seed(0)
    sizes = dict(SIZES[args.size])
    sizes["num_hidden_layers"] = args.layers or sizes["num_hidden_layers"]
    config = transformers.LlamaConfig(**sizes, use_cache=False, max_position_embeddings=args.seq)
    dtype = getattr(torch, args.dtype)
    adapter_dtype = getattr(torch, args.adapter_dtype or args.dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if args.lora == "peft":
        import peft

        peft_config = peft.LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            lora_dropout=args.dropout,
            target_modules=list(COLWISE + ROWWISE),
        )
        wide = adapter_dtype == torch.float32
        model = peft.get_peft_model(model, peft_config, autocast_adapter_dtype=wide)
    else:
        fastlora.inject(
            model,
            COLWISE + ROWWISE,
            r=args.rank,
            lora_alpha=2 * args.rank,
            lora_dropout=args.dropout,
            adapter_dtype=adapter_dtype,
        )
    return model.train()


def decoder(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if type(m).__name__ == "LlamaModel")


def tensor_parallel_plan(lora: str) -> dict[str, object]:
    """Styles by module name, below the decoder."""
    if lora == "fastlora":
        plan = {f"layers.*.{name}": ColwiseLoRA() for name in COLWISE}
        return plan | {f"layers.*.{name}": RowwiseLoRA() for name in ROWWISE}
    # PEFT's parts one by one, with torch's styles. What is not named stays replicated: it sees whole
    # inputs and whole gradients on every rank.
    plan = {}
    for name in COLWISE:
        plan[f"layers.*.{name}.base_layer"] = ColwiseParallel()
        plan[f"layers.*.{name}.lora_B.default"] = ColwiseParallel()
    for name in ROWWISE:
        plan[f"layers.*.{name}.base_layer"] = RowwiseParallel()
        plan[f"layers.*.{name}.lora_A.default"] = RowwiseParallel()
    return plan


def wrap(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    if args.mode == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)
    if args.mode == "fsdp2":
        policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, args.dtype), reduce_dtype=torch.float32
        )
        for layer in decoder(model).layers:
            fully_shard(layer, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)
    if args.mode == "tp":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        parallelize_module(decoder(model), mesh, tensor_parallel_plan(args.lora))
    return model


def optimizer_for(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW, with DTensors in a group of their own: its fused loops take no mixture."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [[p for p in parameters if isinstance(p, DTensor) is kind] for kind in (True, False)]
    return torch.optim.AdamW([{"params": group} for group in groups if group], lr=lr)


def batches(args: argparse.Namespace, device: torch.device) -> list[torch.Tensor]:
    """A few fixed batches, in turn, so that the loss falls."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, args.batch, args.seq)
    tokens = torch.randint(SIZES[args.size]["vocab_size"], shape, generator=generator)
    return list(tokens.to(device))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(
    model: nn.Module, data: list[torch.Tensor], args: argparse.Namespace, device: torch.device
) -> tuple[list[float], list[float]]:
    """The loss and the seconds of each step."""
    optimizer = optimizer_for(model, args.lr)
    losses, seconds = [], []
    for step in range(args.steps):
        tokens = data[step % len(data)]
        synchronize(device)
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.detach())
    return [float(loss) for loss in losses], seconds


def communication_share(model: nn.Module, tokens: torch.Tensor, device: torch.device) -> float:
    """Time in collectives over the time of one forward and backward, overlapped or not."""
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    synchronize(device)
    with torch.profiler.profile(activities=kinds) as profile:
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        synchronize(device)
        total = time.perf_counter() - start
    # NCCL's collectives are kernels on the GPU; gloo's are ranges on threads of its own.
    events = profile.key_averages()
    if on_gpu:
        spent = sum(e.self_device_time_total for e in events if e.key.startswith("ncclDevKernel"))
    else:
        spent = sum(e.cpu_time_total for e in events if e.key.startswith("gloo:"))
    return spent / 1e6 / total


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def everywhere(value: T) -> list[T]:
    """The values of all ranks, on every rank."""
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run(args: argparse.Namespace, device: torch.device) -> bool:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data_parallel = args.mode in ("ddp", "fsdp2")
    if data_parallel and args.batch % ranks:
        raise SystemExit(f"--batch must be divisible by the {ranks} ranks, got {args.batch}")
    if args.mode == "single" and ranks > 1:
        raise SystemExit(f"--mode single runs in one process, got {ranks}")
    data = batches(args, device)
    expected: list[float] = []
    if args.check and rank == 0:
        expected = train(build(args, device), data, args, device)[0]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.barrier()
    model = wrap(build(args, device), args, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(
            device
        )  # the whole model stood here before it was sharded
    # Dropout: rows of their own have masks of their own; a tensor parallel group shares one seed.
    torch.manual_seed(1 + (rank if data_parallel else 0))
    if data_parallel:
        data = [tokens.chunk(ranks)[rank] for tokens in data]
    losses, seconds = train(model, data, args, device)
    if data_parallel:
        losses = [statistics.fmean(step) for step in zip(*everywhere(losses), strict=True)]
    peaks = everywhere(peak_mib(device))
    timed = seconds[args.warmup :]
    step = max(everywhere(statistics.median(timed)))
    share = communication_share(model, data[0], device) if args.profile else None

    difference = max((abs(a - b) for a, b in zip(losses, expected, strict=False)), default=None)
    tolerance = TOLERANCES[getattr(torch, args.dtype)] * max(1.0, max(map(abs, losses)))
    equal = difference is None or difference <= tolerance
    if rank == 0:
        print(
            f"{args.mode}, {args.lora}, {ranks} x {device_name(device)}, torch {torch.__version__}"
        )
        print("loss: " + " ".join(f"{loss:.4f}" for loss in losses))
        print(f"step: {1e3 * step:.1f} ms, {args.batch * args.seq / step:,.0f} tokens/s")
        kind = "allocated" if device.type == "cuda" else "resident, the whole process"
        print(f"peak memory a rank ({kind}): " + ", ".join(f"{peak:,.0f} MiB" for peak in peaks))
        if share is not None:
            print(f"communication: {100 * share:.0f} % of the time of a forward and backward")
        if difference is not None:
            verdict = "equal to" if equal else "DIFFERENT from"
            print(
                f"{verdict} one process: losses differ by at most {difference:.2g}, "
                f"tolerance {tolerance:.2g}"
            )
        if args.json:
            figures = {
                "args": vars(args),
                "ranks": ranks,
                "device": device_name(device),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "fastlora": fastlora.__version__,
                "losses": losses,
                "losses_of_one_process": expected,
                "seconds": seconds,
                "tokens_per_second": args.batch * args.seq / step,
                "peak_mib": peaks,
                "communication_share": share,
            }
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(figures, file, indent=2)
    verdicts = [equal]
    dist.broadcast_object_list(verdicts, src=0)
    return verdicts[0]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})"


@contextlib.contextmanager
def process_group(cpu: bool) -> Iterator[torch.device]:
    """This rank's device, in a group of the ranks that torchrun started; without it, one process."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    on_gpu = torch.cuda.is_available() and not cpu
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
        # A device mesh keeps gloo's threads past the group. One that has yet to drop the tensors of the
        # last collective wants the GIL for it, and ends the process if Python is gone: let it have it.
        time.sleep(0.2)


def main() -> None:
    args = parse_args()
    with process_group(args.cpu) as device:
        equal = run(args, device)
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
