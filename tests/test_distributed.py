"""DDP, FSDP2 and tensor parallelism: two gloo processes against one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RANKS = 2
TIMEOUT = 120


def launch(arguments, logs, ranks=RANKS):
    """Run a script in `ranks` processes, as torchrun would; give their outputs, all of them on failure.

    torchrun itself costs another interpreter with torch, and seconds to notice a failed rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    files = [(logs / f"rank{rank}.log").open("w+", encoding="utf-8") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        for rank, file in enumerate(files)
    ]
    try:
        deadline = time.monotonic() + TIMEOUT
        # One that failed leaves the others waiting for it: no need to wait as long as they do.
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.poll() for p in processes):
                time.sleep(1)
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outputs = []
    for file in files:
        with file:
            file.seek(0)
            outputs.append(file.read())
    codes = [process.returncode for process in processes]
    assert codes == [0] * ranks, "\n".join(
        f"rank {rank} ended with {code}:\n{output}"
        for rank, (code, output) in enumerate(zip(codes, outputs, strict=True))
    )
    return outputs


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "tp"])
def test_two_processes_equal_one(mode, tmp_path):
    outputs = launch([HERE / "distributed_checks.py", mode, tmp_path], tmp_path)
    assert len(outputs) == RANKS
