"""Run every kernel at small odd shapes, forward and backward, for a sanitizer to watch.

``compute-sanitizer --tool memcheck --report-api-errors no python tests/sanitize.py`` (a kernel's parameters
are asked for until the driver says that there is no more, which is an error to it), likewise ``racecheck``;
``initcheck`` with ``--pointers``, for it takes what TMA has written for unwritten. Run it once without a
sanitizer, so that the kernels are in Triton's cache. Each tensor is an allocation of its own, so that a read
past the end of one is not a read of its neighbour. Exits with 1 if a kernel of this GPU has not run.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import importlib.util
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read when torch starts

import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from triton.runtime import KernelInterface

if importlib.util.find_spec("fastlora") is None:  # a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import fastlora
import fastlora.kernels
from fastlora.kernels import common, launch
from fastlora.kernels.common import device_properties
from fastlora.kernels.config import LaunchConfig
from fastlora.kernels.lora_expand import lora_expand
from fastlora.kernels.lora_grad_ab import lora_grad_ab
from fastlora.kernels.lora_grad_ab_tma import lora_grad_ab_ds
from fastlora.kernels.lora_grad_x import lora_grad_x
from fastlora.kernels.lora_merge import lora_merge
from fastlora.kernels.lora_merge_many import lora_merge_many
from fastlora.kernels.lora_one_pass import lora_one_pass
from fastlora.kernels.lora_shrink import lora_shrink
from fastlora.kernels.multi_add import lora_multi_add
from fastlora.kernels.multi_decode import lora_multi_decode
from fastlora.kernels.route_rows import lora_route_rows
from fastlora.kernels.route_tables import lora_route_tables
from fastlora.routing_ops import TABLES, table_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# M, K, N, R: TMA can describe the first; of the second nothing is a multiple of anything.
DENSE, ODD = (262, 72, 136, 8), (261, 67, 45, 3)
SETTINGS = [
    # dtype, dtype of the adapters, TF32, shape, dropout_p
    (BF16, BF16, False, DENSE, 0.0),
    (BF16, BF16, False, DENSE, 0.3),
    (BF16, F32, False, ODD, 0.0),
    (BF16, F32, False, ODD, 0.3),
    (F16, F16, False, DENSE, 0.3),
    (F16, F16, False, ODD, 0.0),
    (F32, F32, True, DENSE, 0.3),
    (F32, F32, False, DENSE, 0.0),
    (F32, F32, False, ODD, 0.3),
]


def kernel_names() -> set[str]:
    """Every kernel that is launched: the jitted functions of `fastlora.kernels` named ``*_kernel``."""
    return {
        name
        for module in pkgutil.iter_modules(fastlora.kernels.__path__)
        for name, value in vars(importlib.import_module(f"fastlora.kernels.{module.name}")).items()
        if name.startswith("_") and name.endswith("_kernel") and isinstance(value, KernelInterface)
    }


def counting(counts: collections.Counter[str]) -> Callable[..., None]:
    """`Launch.__call__` that counts what it launches."""
    plain = launch.Launch.__call__

    def call(self: launch.Launch, *args: Any) -> None:
        counts[self._kernel.__name__] += 1
        plain(self, *args)

    return call


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).div_(shape[-1] ** 0.5).to(dtype)


def step(call: Callable[[], Tensor], *leaves: Tensor) -> None:
    """Forward and backward; all of it must be finite."""
    for t in leaves:
        t.requires_grad_()
    y = call()
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for t in (y, *grads):
        if not bool(torch.isfinite(t).all()):
            raise RuntimeError(f"not finite: {call.__qualname__}")


def calls(
    dtype: torch.dtype, adapter: torch.dtype, shape: tuple[int, int, int, int], p: float
) -> Iterator[Callable[[], None]]:
    """One call of every op at a shape."""
    M, K, N, R = shape
    x, weight, bias = draw(M, K, dtype=dtype), draw(N, K, dtype=dtype), draw(N, dtype=dtype)
    a, b = draw(R, K, dtype=adapter), draw(N, R, dtype=adapter)
    scaling, seed = torch.tensor(1.5, device=DEVICE), torch.tensor(7, device=DEVICE)

    def linear() -> None:
        step(
            lambda: fastlora.lora_linear(
                x, weight, a, b, bias=bias, scaling=scaling, dropout_p=p
            ),
            x, a, b, bias,
        )  # fmt: skip
        with torch.no_grad():  # another layout of x
            fastlora.lora_linear(x.t().contiguous().t(), weight, a, b, scaling=2.0)

    def few_rows() -> None:
        for rows in (5, 37):
            few = x[:rows].clone()
            step(
                lambda: fastlora.lora_linear(few, weight, a, b, bias=bias, scaling=scaling, dropout_p=p),  # noqa: B023
                few, a, b,
            )  # fmt: skip
        with torch.no_grad():  # a sum over K in parts
            wide, deep = draw(20, 1032, dtype=dtype), draw(R, 1032, dtype=adapter)
            made, mask = lora_shrink(wide, deep, 2.0, p, seed)
            lora_expand(made, deep.t(), mask)

    def one_pass() -> None:
        """The launches whose programs wait for one another."""
        if dtype is F32 or not common.has_tma(device_properties(x.device)[0]):
            return
        rows, wide, dy = (draw(*size, dtype=dtype) for size in ((300, 328), (392, 328), (300, 392)))
        down, up = draw(R, 328, dtype=adapter), draw(392, R, dtype=adapter)
        y, s = lora_one_pass(rows, wide, down, up, scaling, draw(392, dtype=dtype))
        mask = (
            lora_shrink(rows, down, scaling, p, torch.tensor(5, device=DEVICE))[1]
            if p > 0
            else None
        )
        ds, *grads, ready = lora_grad_ab_ds(rows, mask, dy, s, up, adapter, scaling)
        dx = lora_grad_x(dy, wide, ds, down.to(dtype), mask, ready=ready)
        if mask is None:
            grads += lora_grad_ab(rows, ds, None, dy, s, adapter, adapter)
        if not all(bool(torch.isfinite(t).all()) for t in (y, s, dx, ds, *grads)):
            raise RuntimeError("not finite: one_pass")

    def multi() -> None:
        stack = draw(3, R, K, dtype=adapter), draw(3, N, R, dtype=adapter)
        ids = torch.arange(M, device=DEVICE) % 4 - 1
        step(
            lambda: fastlora.lora_linear_multi(x, weight, stack, ids, bias=bias, dropout_p=p),
            x, *stack,
        )  # fmt: skip
        with torch.no_grad():  # as in decoding: s comes in parts
            c = LaunchConfig(16, 32, 64, num_warps=4, num_stages=3)
            few, wide = draw(20, 1032, dtype=dtype), draw(N, 1032, dtype=dtype)
            for x_few in (few, draw(70, 1032, dtype=dtype)):
                fastlora.lora_linear_multi(
                    x_few, wide, (draw(3, R, 1032, dtype=adapter), stack[1]), ids[: len(x_few)]
                )
            for rows in (5, 20):  # fewer, and more than one launch does it for
                s = draw(2, rows, R, dtype=torch.float32)
                routing = fastlora.route(ids[:rows], 3)
                lora_multi_decode(few[:rows], wide, s, stack[1], None, routing.ids, c, bias)
                y = draw(rows, N, dtype=dtype)
                lora_multi_add(y, s, stack[1], None, (routing.order, routing.sorted_ids))

    def routing() -> None:
        if dtype is not BF16:
            return
        many = (2100,) if DEVICE == "cuda" else ()  # more than one step of a table
        for rows in (1, 37, *many):
            given = torch.arange(rows * 2, device=DEVICE).view(rows, 2)[:, 1] % 4 - 1
            ids, order, sorted_ids = made = tuple(  # type: ignore[misc]
                torch.empty(rows, dtype=torch.int32, device=DEVICE) for _ in range(3)
            )
            valid = lora_route_rows(given, 3, made)
            tables = [
                torch.empty(table_shape(*key, rows, 3), dtype=torch.int32, device=DEVICE)
                for key in TABLES
            ]
            lora_route_tables(TABLES, ids, sorted_ids, 3, tables)
            if not bool(valid) or not torch.equal(given[order.long()].int(), sorted_ids):
                raise RuntimeError("not sorted: routing")

    def merged() -> None:
        step(
            lambda: fastlora.lora_merged_linear(
                x, weight, draw(2 * R, K, dtype=adapter), b[: N - N // 3],
                widths=(N // 3, N // 3, N - 2 * (N // 3)), enable_lora=(True, False, True),
                bias=bias, dropout_p=p,
            ),
            x, b,
        )  # fmt: skip
        wide = draw(512, K, dtype=dtype)  # no tile of this one meets a border
        step(
            lambda: fastlora.lora_merged_linear(
                x, wide, a, draw(256, R, dtype=adapter), widths=(256, 256), enable_lora=(False, True)
            ),
            x, a,
        )  # fmt: skip

    def embedding() -> None:
        ids = torch.arange(M, device=DEVICE) * 7 % K
        table = draw(K, N, dtype=dtype)
        step(lambda: fastlora.lora_embedding(ids, table, a, b, scaling=scaling), a, b)

    def dora() -> None:
        magnitude = torch.rand(N, device=DEVICE) + 0.5
        step(
            lambda: fastlora.dora_linear(x, weight, a, b, magnitude, dropout_p=p),
            x,
            a,
            b,
            magnitude,
        )

    def merge() -> None:
        lora_merge(weight, a.detach(), b.detach(), 0.5, out=torch.empty_like(weight))
        turned = weight.t().contiguous().t()
        lora_merge(turned, a.detach(), b.detach(), 0.5, out=turned)
        outs = [torch.empty_like(weight) for _ in range(3)]
        lora_merge_many([[(weight, out, a.detach(), b.detach(), 0.5) for out in outs]])

    yield from (linear, few_rows, one_pass, multi, routing, merged, embedding, dora, merge)


def run(word: str = "") -> collections.Counter[str]:
    """Run the ops whose name holds ``word``; how often each kernel was launched."""
    counts: collections.Counter[str] = collections.Counter()
    plain, allowed = launch.Launch.__call__, torch.backends.cuda.matmul.allow_tf32
    launch.Launch.__call__ = counting(counts)  # type: ignore[method-assign]
    try:
        for dtype, adapter, tf32, shape, p in SETTINGS:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for call in calls(dtype, adapter, shape, p):
                if word in call.__name__:
                    call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    finally:
        launch.Launch.__call__ = plain  # type: ignore[method-assign]
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return counts


def without_tma() -> None:
    """Have every op take its pointer kernel, and cuBLAS make products in fp32, which it does without."""
    for module in pkgutil.iter_modules(fastlora.kernels.__path__):
        importlib.import_module(f"fastlora.kernels.{module.name}").__dict__.update(
            has_tma=lambda major: False
        )
    plain: Callable[[Tensor, Tensor], Tensor] = torch.mm

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        return plain(a.float(), b.float()).to(out_dtype or a.dtype)

    def addmm_(self: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.copy_(self.float() + plain(a.float(), b.float()))

    torch.mm = mm  # type: ignore[assignment]
    Tensor.addmm_ = addmm_  # type: ignore[assignment, method-assign]


def missing(counts: collections.Counter[str]) -> list[str]:
    """The kernels that this device has and that did not run."""
    major = device_properties(torch.device(DEVICE, 0 if DEVICE == "cuda" else None))[0]
    expected = kernel_names()
    if not common.has_tma(major):
        # What a GPU without TMA cannot run.
        by_tma = {"_lora_grad_x_dropout_kernel", "_lora_multi_gemm_ring_kernel"}
        expected = {n for n in expected if "tma" not in n} - by_tma
    return sorted(expected - counts.keys())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("word", nargs="?", default="", help="only the ops whose name holds it")
    parser.add_argument("--pointers", action="store_true", help="no kernel that uses TMA")
    arguments = parser.parse_args()
    if arguments.pointers:
        without_tma()
    start = time.perf_counter()
    counts = run(arguments.word)
    seconds = time.perf_counter() - start
    for name, count in sorted(counts.items()):
        print(f"{count:5} {name}")
    left = [] if arguments.word else missing(counts)
    print(f"{len(counts)} kernels, {counts.total()} launches on {DEVICE} in {seconds:.1f} s")
    if left:
        print("not run:", *left)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
