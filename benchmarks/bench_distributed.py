"""Every mode of examples/finetune_distributed.py in one launch: DDP, FSDP2 and TP, fastlora and PEFT.

``torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --json FILE [options of the example]``. Each run
is checked against one process, whose own speed and memory are kept for the scaling. Options that are not
given take four layers of Llama-3.1-8B, bf16, 4 sequences of 2048 tokens in all.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT / "examples"),
    *([] if importlib.util.find_spec("fastlora") else [str(ROOT)]),
]

import finetune_distributed as example  # noqa: E402 - from the folder that was just added

RUNS = [(mode, lora) for mode in ("ddp", "fsdp2", "tp") for lora in ("fastlora", "peft")]
DEFAULTS = {
    "--size": "llama-3.1-8b", "--layers": "4", "--dtype": "bfloat16", "--batch": "4", "--seq": "2048",
    "--steps": "14", "--warmup": "4", "--rank": "16", "--lr": "1e-3",
}  # fmt: skip


def one_process(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds a step and peak MiB of the whole model on rank 0 alone."""
    model = example.build(args, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _, seconds = example.train(model, example.batches(args, device), args, device)
    return {"seconds": seconds, "peak_mib": example.peak_mib(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", required=True, help="where rank 0 writes the figures")
    own, rest = parser.parse_known_args()
    results = []
    with example.process_group(cpu=False) as device, tempfile.TemporaryDirectory() as folder:
        for mode, lora in RUNS:
            figures = Path(folder, "figures.json")
            options = [
                "--mode",
                mode,
                "--lora",
                lora,
                "--check",
                "--profile",
                "--json",
                str(figures),
            ]
            sys.argv[1:] = [*itertools.chain(*DEFAULTS.items()), *rest, *options]
            args = example.parse_args()
            alone = one_process(args, device) if dist.get_rank() == 0 else None
            equal = example.run(args, device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if dist.get_rank() == 0:
                made = json.loads(figures.read_text(encoding="utf-8"))
                results.append({"equal_to_one_process": equal, "one_process": alone, **made})
                Path(own.json).write_text(json.dumps({"runs": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
