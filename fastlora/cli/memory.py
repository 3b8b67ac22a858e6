"""Peak memory of a block of code: allocated on a GPU, resident in the process on a CPU."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

import torch

_STATM = Path("/proc/self/statm")
_INTERVAL_S = 0.01


class PeakMemory:
    """Context manager that fills ``peak_bytes``.

    On CUDA it is the peak of torch's allocator. On a CPU it is the largest resident size of the
    whole process, sampled every 10 ms, and 0 where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        """Watch ``device``."""
        self.device = device
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        """Start from what is allocated now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _STATM.exists():
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the peak."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            self.peak_bytes = max(self.peak_bytes, int(_STATM.read_text().split()[1]) * page)
            if self._stop.wait(_INTERVAL_S):
                return
