"""Which path a call takes, and why: one pure decision, shown to users by `fastlora.explain`."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.kernels.config import MAX_RANK
from fastlora.kernels.config_multi import ROUTE_ROWS

try:
    from fastlora.kernels.common import INTERPRETED

    _TRITON_PROBLEM = ""
except ImportError as error:  # no Triton on this platform, or one without what the kernels need
    INTERPRETED = False
    _TRITON_PROBLEM = f"Triton cannot be used: {error}"

HAS_TRITON = not _TRITON_PROBLEM
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TRACER = torch._C._TorchDispatchModeKey.PROXY


class _Forced(threading.local):
    """What `force` asks of this thread: a plain attribute, which torch.compile can guard on."""

    def __init__(self) -> None:
        self.path: str | None = None


_forced = _Forced()


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


def decide(call: Call) -> Decision:
    """Fused or eager, and why; pure.

    Args:
        call (Call): device, dtypes and shapes of the call.

    Returns:
        Decision: the path and its reason.
    """
    problem = _machine_problem(call) or _size_problem(call.M, call.K, call.N, call.R)
    if problem:
        return Decision("eager", problem)
    return Decision("fused", f"{_fused_words(call)}, rank {call.R}")


def _fused_words(call: Call) -> str:
    if call.interpreted:
        return "the kernels run in Triton's interpreter (TRITON_INTERPRET=1)"
    return f"CUDA capability {call.capability}, {call.x_dtype}"


def _machine_problem(call: Call) -> str:
    """Why the kernels cannot run on this device with these dtypes, whatever the sizes; "" if they can."""
    if call.triton_problem:
        return call.triton_problem
    if call.device_type != "cuda" and not (call.device_type == "cpu" and call.interpreted):
        return f"the kernels run on CUDA GPUs, the tensors are on {call.device_type}"
    if call.device_type == "cuda":
        if call.capability is None:
            return "not an NVIDIA GPU: the kernels have not been tried on it"
        if call.capability < (8, 0):
            major, minor = call.capability
            return f"compute capability {major}.{minor} is older than 8.0"
    if call.x_dtype not in FUSED_DTYPES:
        return f"x is {call.x_dtype}; the kernels take bfloat16, float16 and float32"
    if call.weight_dtype != call.x_dtype:
        return f"weight is {call.weight_dtype} and x is {call.x_dtype}"
    for dtype in call.adapter_dtypes:
        if dtype not in (call.x_dtype, torch.float32):
            return f"an adapter is {dtype} beside {call.x_dtype} x"
    return ""


def _size_problem(M: int, K: int, N: int, R: int) -> str:
    if R > MAX_RANK:
        return f"rank {R} is above {MAX_RANK}"
    if M == 0 or K == 0 or N == 0:
        return f"a dimension is empty: M={M}, K={K}, N={N}"
    return ""


@functools.lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@functools.lru_cache(maxsize=4096)
def _cached(
    of: Callable[[Call], str], device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> str:
    x_dtype, weight_dtype, *adapter_dtypes = dtypes
    return of(
        Call(
            device_type=device.type,
            capability=_capability(device),
            x_dtype=x_dtype,
            weight_dtype=weight_dtype,
            adapter_dtypes=tuple(adapter_dtypes),
            M=1,
            K=1,
            N=1,
            R=1,
            interpreted=INTERPRETED,
            triton_problem=_TRITON_PROBLEM,
        )
    )


# torch.compile calls these two while tracing: what they ask the machine for cannot be traced.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _this_machines_problem(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    return _cached(_machine_problem, device, dtypes)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _this_machines_words(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    return _cached(_fused_words, device, dtypes)


def problem_for(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
) -> str:
    """Why the kernels cannot take these tensors; empty when they can.

    Args:
        x (Tensor): ``(..., K)``.
        weight (Tensor): ``[N, K]``.
        lora_A (Tensor): ``[R, K]``, or a stack of them.
        lora_B (Tensor): ``[N, R]``, likewise.
        bias (Tensor | None): ``[N]``. Default: ``None``.
        dtype (torch.dtype | None): what x and weight will be cast to, where not as they are. Default:
            ``None``.
        rank (int | None): the rank of the product, where ``lora_A`` is one part of it. Default: ``None``.

    Returns:
        str: the reason for the eager path, or ``""`` for the fused one.
    """
    problem = _callers_problem()
    if problem:
        return problem
    for t in (x, weight, lora_A, lora_B, bias):
        if t is not None and type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return "a tensor is of a subclass, which the kernels cannot look into"
    dtypes = (dtype or x.dtype, dtype or weight.dtype, lora_A.dtype, lora_B.dtype)
    N, K = weight.shape
    return _this_machines_problem(x.device, dtypes) or _size_problem(
        x.shape[:-1].numel(), K, N, lora_A.shape[-2] if rank is None else rank
    )


def decide_for(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
) -> Decision:
    """The decision for these tensors on this machine.

    Args:
        x (Tensor): ``(..., K)``.
        weight (Tensor): ``[N, K]``.
        lora_A (Tensor): ``[R, K]``, or a stack of them.
        lora_B (Tensor): ``[N, R]``, likewise.
        bias (Tensor | None): as `problem_for`. Default: ``None``.
        dtype (torch.dtype | None): as `problem_for`. Default: ``None``.
        rank (int | None): as `problem_for`. Default: ``None``.

    Returns:
        Decision: the path and its reason.
    """
    problem = problem_for(x, weight, lora_A, lora_B, bias=bias, dtype=dtype, rank=rank)
    if problem:
        return Decision("eager", problem)
    dtypes = (dtype or x.dtype, dtype or weight.dtype, lora_A.dtype, lora_B.dtype)
    words = _this_machines_words(x.device, dtypes)
    return Decision("fused", f"{words}, rank {lora_A.shape[-2] if rank is None else rank}")


def decide_embedding_for(ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Decision:
    """The decision for an embedding with these tensors on this machine.

    Args:
        ids (Tensor): any shape.
        weight (Tensor): ``[V, N]``.
        lora_A (Tensor): ``[R, V]``.
        lora_B (Tensor): ``[N, R]``.

    Returns:
        Decision: the path and its reason.
    """
    problem = embedding_problem_for(ids, weight, lora_A, lora_B)
    return Decision("eager", problem) if problem else decide_for(weight, weight, lora_A, lora_B)


def embedding_problem_for(
    ids: Tensor | None, weight: Tensor, lora_A: Tensor, lora_B: Tensor
) -> str:
    """Why the kernels cannot take these tensors of an embedding; empty when they can.

    Args:
        ids (Tensor | None): any shape; ``None`` asks about the tables alone.
        weight (Tensor): ``[V, N]``.
        lora_A (Tensor): ``[R, V]``.
        lora_B (Tensor): ``[N, R]``.

    Returns:
        str: the reason for the eager path, or ``""`` for the fused one.
    """
    problem = problem_for(weight, weight, lora_A, lora_B)
    if problem:  # of the table, which stands where a linear has x
        return str(_of_a_table(problem))
    if ids is None:
        return ""
    if type(ids) is not Tensor:
        return "ids are of a subclass, which the kernels cannot look into"
    if ids.numel() == 0:
        return "a dimension is empty: there are no ids"
    return ""


def kernels_can_route(ids: Tensor) -> bool:
    """Whether the kernels make the routing of these ids; on the CPU torch does, interpreter or not.

    Args:
        ids (Tensor): ``[M]``.
    """
    return (
        ids.is_cuda
        and type(ids) is Tensor
        and not torch.compiler.is_compiling()
        and 0 < ids.shape[0] <= ROUTE_ROWS
        and not _callers_problem()
        and not _this_machines_problem(ids.device, (torch.float32, torch.float32))
    )


def is_forced() -> bool:
    """Whether this thread's calls run eager, whatever their tensors are; not for torch.compile to trace."""
    return (
        _forced.path == "eager"
        or torch._C._get_dispatch_mode(_TRACER) is not None
        or torch._C._get_tracing_state() is not None
    )


def _callers_problem() -> str:
    """Why this thread's calls run eager, whatever their tensors are; "" where nothing asks for that."""
    if _forced.path == "eager":
        return "fastlora.dispatch.force('eager') is active"
    if not torch.compiler.is_compiling() and is_forced():
        return "make_fx or torch.jit is tracing, which does not see the kernels"
    return ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _of_a_table(problem: str) -> str:
    return re.sub(r"\bx\b", "weight", problem)


@contextlib.contextmanager
def force(path: str) -> Iterator[None]:
    """Run every call of this thread inside the block on ``path``: only ``"eager"`` can be forced.

    Args:
        path (str): ``"eager"``.

    Raises:
        ValueError: for any other path; a fused call cannot be forced where kernels do not run.
    """
    if path != "eager":
        raise ValueError(f"path must be 'eager', got {path!r}")
    before, _forced.path = _forced.path, path
    try:
        yield
    finally:
        _forced.path = before
