"""What two processes compute against one. test_distributed.py runs it with gloo on the CPU.

On two GPUs with NCCL: ``torchrun --nproc-per-node 2 tests/distributed_checks.py FOLDER --nccl``.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import os
import time
import traceback
from pathlib import Path

import distributed_data
import distributed_tensor
import torch
import torch.distributed as dist
from distributed_cases import FSDP2_RUNS

CHECKS = [
    function
    for module in (distributed_data, distributed_tensor)
    for function in vars(module).values()
    if inspect.isfunction(function)
    and function.__module__ == module.__name__
    and list(inspect.signature(function).parameters) == ["folder"]
]
"""Every function of these modules that takes a folder, in their order."""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="for the files that checks write; of both ranks")
    parser.add_argument("-k", default="", help="only the checks whose name contains this")
    parser.add_argument("--nccl", action="store_true", help="on GPUs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them. A rank that fails leaves
    # the other waiting, which then fails too instead of hanging.
    limit = datetime.timedelta(seconds=60)
    if args.nccl:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device("cuda")
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=limit)
    else:
        dist.init_process_group("gloo", timeout=limit)
    for check in CHECKS:
        if args.k not in check.__name__:
            continue
        print(check.__name__, flush=True)
        if "fsdp2" in check.__name__ and not FSDP2_RUNS:
            continue
        try:
            check(args.folder / check.__name__)
        except BaseException:
            traceback.print_exc()
            raise SystemExit(f"failed: {check.__name__} on rank {dist.get_rank()}") from None
        dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.2)  # for gloo's threads, as in examples/finetune_distributed.py


if __name__ == "__main__":
    main()
