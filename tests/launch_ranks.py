"""Several gloo processes on this machine, for the tests of torch.distributed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RANKS = 2
TIMEOUT = 240


def launch(arguments, logs, interpret=True, ranks=RANKS):
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
        "TRITON_INTERPRET": "1" if interpret else "0",
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
    start = time.monotonic()
    try:
        # One that failed leaves the others waiting for it: no need to wait as long as they do.
        while any(p.poll() is None for p in processes) and time.monotonic() - start < TIMEOUT:
            if any(p.poll() for p in processes):
                time.sleep(1)
                break
            time.sleep(0.05)
    finally:
        waited = time.monotonic() - start
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
        f"rank {rank} ended with {code} (-9: killed after {waited:.0f} s):\n{output}"
        for rank, (code, output) in enumerate(zip(codes, outputs, strict=True))
    )
    return outputs
