"""Which path a call takes, and why: one pure decision, shown to users by `fastlora.explain`."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.kernels.config import MAX_RANK

try:
    from fastlora.kernels.common import INTERPRETED

    _TRITON_PROBLEM = ""
except ImportError as error:  # no Triton on this platform, or one without what the kernels need
    INTERPRETED = False
    _TRITON_PROBLEM = f"Triton cannot be used: {error}"

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastlora_path", default=None)


@dataclass(frozen=True)
class Decision:
    """The path of a call, ``"fused"`` or ``"eager"``, and the reason in words."""

    path: str
    reason: str

    @property
    def fused(self) -> bool:
        """Whether the Triton kernels run."""
        return self.path == "fused"

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Call:
    """What a decision depends on: no tensors, so that it can be asked about any machine."""

    device_type: str
    capability: tuple[int, int] | None
    x_dtype: torch.dtype
    weight_dtype: torch.dtype
    adapter_dtypes: tuple[torch.dtype, ...]
    M: int
    K: int
    N: int
    R: int
    interpreted: bool = False
    triton_problem: str = ""
    subject: str = "x"  # what the reason calls the tensor of x_dtype


def decide(call: Call) -> Decision:
    """Fused or eager, and why; pure.

    Args:
        call (Call): device, dtypes and shapes of the call.

    Returns:
        Decision: the path and its reason.
    """
    eager = functools.partial(Decision, "eager")
    if call.triton_problem:
        return eager(call.triton_problem)
    if call.device_type != "cuda" and not (call.device_type == "cpu" and call.interpreted):
        return eager(f"the kernels run on CUDA GPUs, the tensors are on {call.device_type}")
    if call.device_type == "cuda":
        if call.capability is None:
            return eager("not an NVIDIA GPU: the kernels have not been tried on it")
        if call.capability < (8, 0):
            major, minor = call.capability
            return eager(f"compute capability {major}.{minor} is older than 8.0")
    if call.x_dtype not in FUSED_DTYPES:
        return eager(
            f"{call.subject} is {call.x_dtype}; the kernels take bfloat16, float16 and float32"
        )
    if call.weight_dtype != call.x_dtype:
        return eager(f"weight is {call.weight_dtype} and x is {call.x_dtype}")
    for dtype in call.adapter_dtypes:
        if dtype not in (call.x_dtype, torch.float32):
            return eager(f"an adapter is {dtype} beside {call.x_dtype} {call.subject}")
    if call.R > MAX_RANK:
        return eager(f"rank {call.R} is above {MAX_RANK}")
    if 0 in (call.M, call.K, call.N):
        return eager(f"a dimension is empty: M={call.M}, K={call.K}, N={call.N}")
    if call.interpreted:
        return Decision("fused", "the kernels run in Triton's interpreter (TRITON_INTERPRET=1)")
    return Decision("fused", f"CUDA capability {call.capability}, {call.x_dtype}, rank {call.R}")


@functools.lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@functools.lru_cache(maxsize=4096)
def _decide_cached(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    M: int,
    K: int,
    N: int,
    R: int,
    subject: str = "x",
) -> Decision:
    x_dtype, weight_dtype, *adapter_dtypes = dtypes
    return decide(
        Call(
            device_type=device.type,
            capability=_capability(device),
            x_dtype=x_dtype,
            weight_dtype=weight_dtype,
            adapter_dtypes=tuple(adapter_dtypes),
            M=M,
            K=K,
            N=N,
            R=R,
            interpreted=INTERPRETED,
            triton_problem=_TRITON_PROBLEM,
            subject=subject,
        )
    )


def decide_for(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Decision:
    """The decision for these tensors on this machine.

    Args:
        x (Tensor): ``(..., K)``.
        weight (Tensor): ``[N, K]``.
        lora_A (Tensor): ``[R, K]``, or a stack of them.
        lora_B (Tensor): ``[N, R]``, likewise.

    Returns:
        Decision: the path and its reason.
    """
    refused = _refused(x, weight, lora_A, lora_B)
    if refused is not None:
        return refused
    # Of the number of rows only zero matters: batches of any length share an entry of the cache.
    dtypes = (x.dtype, weight.dtype, lora_A.dtype, lora_B.dtype)
    M, (N, K) = min(x.numel(), 1), weight.shape
    return _decide_cached(x.device, dtypes, M, K, N, lora_A.shape[-2])


def decide_embedding_for(ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Decision:
    """The decision for an embedding with these tensors on this machine.

    Args:
        ids (Tensor): any shape; M is their number.
        weight (Tensor): ``[V, N]``; V takes the place of K.
        lora_A (Tensor): ``[R, V]``.
        lora_B (Tensor): ``[N, R]``.

    Returns:
        Decision: the path and its reason.
    """
    refused = _refused(ids, weight, lora_A, lora_B)
    if refused is not None:
        return refused
    dtypes = (weight.dtype, weight.dtype, lora_A.dtype, lora_B.dtype)
    M, (V, N) = min(ids.numel(), 1), weight.shape
    return _decide_cached(weight.device, dtypes, M, V, N, lora_A.shape[0], "weight")


def _refused(*tensors: Tensor) -> Decision | None:
    """The decision where it does not depend on shapes, dtypes or the device."""
    if _forced.get() == "eager":
        return Decision("eager", "fastlora.dispatch.force('eager') is active")
    for t in tensors:
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return Decision(
                "eager", "a tensor is of a subclass, which the kernels cannot look into"
            )
    return None


@contextlib.contextmanager
def force(path: str) -> Iterator[None]:
    """Run every call inside the block on ``path``: only ``"eager"`` can be forced.

    Args:
        path (str): ``"eager"``.

    Raises:
        ValueError: for any other path; a fused call cannot be forced where kernels do not run.
    """
    if path != "eager":
        raise ValueError(f"path must be 'eager', got {path!r}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)
