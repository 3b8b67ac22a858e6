"""Compile every kernel for real GPUs on a machine that may have none, and say what came out.

``python tests/compile_kernels.py [WORD]`` prints a table (of the cases whose name holds WORD), with
``--json`` for `test_compile.py`, and exits with 1 if one could not be compiled. The launchers themselves run,
on meta tensors, with a Triton driver that names the target and launches nothing; so arguments, their
specialisation and the launch configurations are those of a real call, and nothing is repeated here.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_cases import Case, cases
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

NUM_SMS = {80: 108, 90: 132, 100: 148, 120: 170}  # A100, H100, B200, RTX 5090
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "ieee": torch.float32,
}
INSTRUCTIONS = (
    *("HGMMA", "HMMA", "FFMA", "UTMALDG", "UTMASTG", "LDGSTS", "STL", "LDL"),
    *("LDG.E.128", "STG.E.128"),
)
WORKERS = max(2, (os.cpu_count() or 2) // 2)  # the other tests want cores too


class NoGPUDriver:
    """What `JITFunction.run` asks of a driver before a launch; one device id per architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """Name the architecture to compile for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Name the device, the key of Triton's cache in memory."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """Name the stream, which nothing is launched on."""
        return 0


def kernel_modules() -> dict[str, Any]:
    """Import every file of kernels/, so that a new one cannot be forgotten."""
    package = importlib.import_module("fastlora.kernels")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return {name: importlib.import_module(f"fastlora.kernels.{name}") for name in names}


def kernel_names() -> list[str]:
    """Every kernel of the library: each jitted function named ``_..._kernel``."""
    return sorted(
        {
            name
            for module in kernel_modules().values()
            for name, value in vars(module).items()
            if isinstance(value, triton.JITFunction) and re.fullmatch("_.*_kernel", name)
        }
    )


def call(case: Case) -> None:
    """Call the launcher of a case on meta tensors."""
    modules = kernel_modules()
    for module in modules.values():
        if hasattr(module, "device_properties"):
            module.device_properties = lambda device: (case.arch // 10, NUM_SMS[case.arch])
    modules["launch"].clear_plans()
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    new = functools.partial(torch.empty, device="meta")
    dtype = DTYPES[case.dtype]
    adapter = torch.float32 if case.fp32_adapters else dtype
    M, K, N, R = case.M, case.K, case.N, case.R
    x, dy, w = new((M, K), dtype=dtype), new((M, N), dtype=dtype), new((N, K), dtype=dtype)
    lora_A, lora_B = new((R, K), dtype=adapter), new((N, R), dtype=adapter)
    s = new((M, R), dtype=dtype)
    scaling: float | Tensor = new((), dtype=torch.float32) if case.tensor_scaling else 2.0
    p, seed, mask = 0.0, None, None
    if case.dropout:
        p, seed = 0.1, new((), dtype=torch.int64)
        mask = new((M, (K + 7) // 8), dtype=torch.uint8)

    def marks() -> Any:
        rows = -(-M // modules["config"].DS_ROWS)
        return modules["ready"].Ready(new((rows,), dtype=torch.int64), 1 << 50)

    launch: dict[str, Callable[[], object]] = {
        "shrink": lambda: modules["lora_shrink"].lora_shrink(x, lora_A, scaling, p, seed),
        "ds": lambda: modules["lora_shrink"].lora_shrink(dy, lora_B.t(), scaling),
        "shrink_group": lambda: modules["lora_shrink"].lora_shrink(
            x,
            lora_A,
            new((R,), dtype=torch.float32),
            p,
            seed,
            out=new((M, R + 3), dtype=dtype)[:, 3:],
        ),
        "forward": lambda: modules["lora_forward"].lora_forward(
            x, w, s, lora_B, new((N,), dtype=dtype) if case.bias else None
        ),
        "dora_norm": lambda: modules["dora_norm"].dora_norm(
            w, lora_A, lora_B, new((N,), dtype=adapter), scaling
        ),
        "dora_forward": lambda: modules["lora_forward"].lora_forward(
            x,
            w,
            s,
            lora_B,
            new((N,), dtype=dtype) if case.bias else None,
            new((N,), dtype=torch.float32),
            new((M, N), dtype=dtype),
        ),
        "dora_grad": lambda: modules["dora_grad"].dora_grad(
            dy, dy, new((N,), dtype=torch.float32), new((N,), dtype=torch.float32), adapter
        ),
        "grad_b": lambda: modules["lora_grad_b"].lora_grad_b(dy, s, lora_B, scaling, p),
        "shrink_beside": lambda: modules["lora_shrink"].lora_shrink(
            x, lora_A, scaling, p, seed, product_columns=N
        ),
        "expand": lambda: modules["lora_expand"].lora_expand(
            s, lora_A.t(), mask, new((K,), dtype=dtype) if case.bias else None
        ),
        "decode": lambda: modules["lora_decode"].lora_decode(
            x, w, lora_A, lora_B, scaling, new((N,), dtype=dtype) if case.bias else None
        ),
        "one_pass": lambda: modules["lora_one_pass"].lora_one_pass(
            x, w, lora_A, lora_B, scaling, new((N,), dtype=dtype) if case.bias else None
        ),
        "grad_ab_ds": lambda: modules["lora_grad_ab_tma"].lora_grad_ab_ds(
            x, mask, dy, s, lora_B, adapter, scaling
        ),
        "grad_x_ready": lambda: modules["lora_grad_x"].lora_grad_x(
            dy, w, s, lora_A, mask, ready=marks()
        ),
        "grad_x": lambda: modules["lora_grad_x"].lora_grad_x(dy, w, s, lora_A, mask),
        "grad_x_beside": lambda: modules["lora_grad_x"].lora_grad_x(
            dy, w, s, lora_A, mask, beside=True
        ),
        "grad_ab": lambda: modules["lora_grad_ab"].lora_grad_ab(
            x, s, mask, dy, s, adapter, adapter
        ),
        "grad_a": lambda: modules["lora_grad_a"].lora_grad_a(x, s, mask, adapter),
        # x is the table of K-wide rows here, and its M rows the vocabulary.
        "embedding": lambda: modules["lora_embedding"].lora_embedding(
            new((M,), dtype=torch.int64), x, new((R, M), dtype=adapter), lora_A.t(), scaling
        ),
        "embedding_grad_a": lambda: modules["lora_embedding"].lora_embedding_grad_a(
            new((M,), dtype=torch.int64), s, 4 * M, -1, adapter
        ),
        "sliced": lambda: modules["lora_forward_sliced"].lora_forward_sliced(
            x,
            w,
            new((2, M, R), dtype=dtype),
            new((N // 4 * 3, R), dtype=adapter),
            ((0, N // 2), (N - N // 4, N)),
            new((N,), dtype=dtype) if case.bias else None,
        ),
        "merge": lambda: modules["lora_merge"].lora_merge(w, lora_A, lora_B, 2.0, w),
        "merge_many": lambda: modules["lora_merge_many"].lora_merge_many(
            [[(w, w, lora_A, lora_B, 2.0)] * 4]
        ),
        **multi_launches(case, modules, new),
        **route_launches(case.M, modules, new),
    }
    launch[case.op]()


def multi_launches(
    case: Case, modules: dict[str, Any], new: Callable[..., Tensor], slots: int = 32
) -> dict[str, Callable[[], object]]:
    """The launches of the kernels for many adapters; ranks differ where adapters are fp32, too."""
    dtype = DTYPES[case.dtype]
    adapter = torch.float32 if case.fp32_adapters else dtype
    M, K, N, R = case.M, case.K, case.N, case.R
    x, dy, w = new((M, K), dtype=dtype), new((M, N), dtype=dtype), new((N, K), dtype=dtype)
    stack_a, stack_b = new((slots, R, K), dtype=adapter), new((slots, N, R), dtype=adapter)
    scaling, ids = new((slots,), dtype=torch.float32), new((M,), dtype=torch.int32)
    ranks = new((slots,), dtype=torch.int32) if case.fp32_adapters or case.ranks else None
    rows = (ids, ids, new((M // 16 + slots,), dtype=torch.int32))
    few_rows = (ids, ids, new((min(M, M // 8 + slots),), dtype=torch.int32))
    segments = (ids, ids, new((slots + 1,), dtype=torch.int32))
    bias = new((N,), dtype=dtype) if case.bias else None
    p, seed, mask = 0.0, None, None
    if case.dropout:
        p, seed = 0.1, new((), dtype=torch.int64)
        mask = new((M, (K + 7) // 8), dtype=torch.uint8)
    gemm = modules["multi_gemm"]
    slots_of_tiles = None
    if modules["config_multi"].makes_pairs(R, stack_a.element_size()):
        slots_of_tiles = new((-(-M // 128), slots), dtype=torch.int32)

    def product(x: Tensor, weight: Tensor, right: Tensor, **options: Any) -> None:
        plan = gemm.multi_gemm_tiles(x, weight, R, case.dropout > 0)
        few = plan[0] in ("decode", "add")
        s = new((4, M, R) if few else (M, R), dtype=torch.float32 if few else dtype)
        if plan[1] is None:
            y = new((x.shape[0], weight.shape[0]), dtype=dtype)
            add = modules["multi_add"].lora_multi_add
            if not modules["config_multi"].multi_reads_rows(M):
                add = modules["multi_add_blocks"].lora_multi_add_blocks
            add(y, s, right, ranks, few_rows if M > 64 else rows[:2], early=True)
            return
        if plan[0] == "decode":
            modules["multi_decode"].lora_multi_decode(
                x, weight, s, right, ranks, ids, plan[1], **options
            )
            return
        width = min(slots, plan[1].BLOCK_M)
        tiles = new((-(-M // plan[1].BLOCK_M), width), dtype=torch.int32)
        routing = (ids, tiles, ids, tiles)
        if (
            modules["config_multi"].makes_pairs(R, right.element_size())
            and options.get("mask") is None
        ):
            options["pair"] = new((2 * M, R), dtype=dtype)
        gemm.lora_multi_gemm(x, weight, s, right, ranks, routing, plan, **options)

    return {
        "multi_shrink": lambda: modules["multi_shrink"].lora_multi_shrink(
            x, stack_a, scaling, ranks, rows, 16, p, seed, tile_slots=slots_of_tiles
        ),
        "multi_shrink_rows": lambda: modules["multi_shrink_rows"].lora_multi_shrink_rows(
            x, stack_a, scaling, ranks, rows[:2], early=True
        ),
        "multi_shrink_blocks": lambda: modules["multi_shrink_blocks"].lora_multi_shrink_blocks(
            x, stack_a, scaling, ranks, few_rows, early=True
        ),
        "multi_forward": lambda: product(x, w, stack_b, bias=bias),
        "multi_grad_x": lambda: product(dy, w.t(), stack_a.transpose(1, 2), mask=mask),
        "multi_grad": lambda: modules["multi_grad"].lora_multi_grad(
            x, new((M, R), dtype=dtype), mask, ranks, segments, slots, adapter
        ),
    }


def route_launches(
    M: int, modules: dict[str, Any], new: Callable[..., Tensor], slots: int = 32
) -> dict[str, Callable[[], object]]:
    """The launches that route rows: of few rows ids are a column; tables come together or one by one."""
    ids = new((M,), dtype=torch.int32)
    given = new((M,), dtype=torch.int64) if M > 64 else new((M, 3), dtype=torch.int32)[:, 1]
    tables = importlib.import_module("fastlora.routing_ops").TABLES

    def make(*keys: tuple[str, int]) -> None:
        out = [ids] * len(keys)
        modules["route_tables"].lora_route_tables(keys, ids, ids, slots, out)

    return {
        "route_rows": lambda: modules["route_rows"].lora_route_rows(given, slots, (ids, ids, ids)),
        "route_tables": lambda: make(*tables),
        "route_blocks": lambda: make(tables[0]),
        "route_segments": lambda: make(("segments", 0)),
        "route_tiles": lambda: make(tables[-1]),
    }


def tool(name: str, *args: str) -> str:
    """Run a CUDA binary tool of Triton's own."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def inspect(kernel: Any) -> dict[str, Any]:
    """Read registers, stack, shared memory and instructions from a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = tool("cuobjdump", "-res-usage", str(cubin)), tool("nvdisasm", str(cubin))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", sass)) for name in INSTRUCTIONS}
    encodings = re.findall(
        r"ttng\.warp_group_dot .* : tensor<[^,]*, (#\S+?)[<>]", kernel.asm["ttgir"]
    )
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": counts["STL"] + counts["LDL"],
        "shared": kernel.metadata.shared,
        "register_wgmma": sum(e == "#ttg.dot_op" for e in encodings),
        "serialized": serialized(kernel),
        "counts": counts,
    }


def serialized(kernel: Any) -> bool:
    """Whether ptxas waits for every wgmma, which it says at that and which more than halves the speed."""
    if "wgmma" not in kernel.asm["ptx"]:
        return False
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        for name in (
            "ptxas",
            "ptxas_blackwell",
        ):  # the first may be too old for what Triton 3.9 writes
            ptxas = getattr(triton.knobs.nvidia, name).path
            args = [ptxas, "-v", "-arch=sm_90a", str(ptx), "-o", str(Path(folder, "out"))]
            done = subprocess.run(args, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return "are serialized" in done.stdout + done.stderr
    raise RuntimeError(done.stderr)


def compile_case(case: Case) -> list[dict[str, Any]]:
    """Compile what a case would launch: a row for every kernel, or one with an error."""
    driver.set_active(NoGPUDriver(case.arch))
    compiled: dict[str, Any] = {}
    original = triton.JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool = True, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[self.__name__] = kernel
        return kernel

    triton.JITFunction.run = record
    head = {"case": case.name, **dataclasses.asdict(case)}
    try:
        call(case)
    except Exception as error:  # a pass of Triton's that fails raises RuntimeError, ptxas its own
        return [{**head, "kernel": "?", "error": f"{type(error).__name__}: {error}"[-500:]}]
    finally:
        triton.JITFunction.run = original
    return [{**head, "kernel": name, **inspect(kernel)} for name, kernel in compiled.items()]


def compile_all(word: str = "") -> list[dict[str, Any]]:
    """Compile every case whose name holds ``word``."""
    wanted = [case for case in cases() if word in case.name]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        return [row for rows in pool.map(compile_case, wanted) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("word", nargs="?", default="", help="only cases whose name holds it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    rows = compile_all(args.word)
    if args.json:
        failed, rows = [r for r in rows if "error" in r], [r for r in rows if "error" not in r]
        print(json.dumps({"kernels": kernel_names(), "rows": rows, "failed": failed}))
        return 0
    print(f"triton {triton.__version__}")
    print(f"{'case':58} {'kernel':30} {'regs':>4} {'spill':>5} {'shared':>7}  instructions")
    for row in rows:
        if "error" in row:
            print(f"{row['case']:58} {row['error']}")
            continue
        counts = " ".join(f"{k}:{v}" for k, v in row["counts"].items() if v)
        counts += f" register-wgmma:{row['register_wgmma']}" if row["register_wgmma"] else ""
        counts += " serialized" if row["serialized"] else ""
        print(
            f"{row['case']:58} {row['kernel']:30} {row['registers']:4} {row['spills']:5} "
            f"{row['shared']:7}  {counts}"
        )
    return 1 if not rows or any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
