"""Every kernel compiles for sm_80 and sm_90, some for newer GPUs too, on any machine.

`compile_kernels.py` runs the launchers for it, in a process of its own: the other tests run kernels
in Triton's interpreter, which is chosen when a kernel is decorated. An empty cache makes it honest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
# Shared memory that one program may have, in bytes.
SMALLEST_SHARED = 101_376  # sm_86, sm_89, sm_120: the pointer kernels run there too
SHARED = {80: 166_912, 90: 232_448, 100: 232_448, 120: SMALLEST_SHARED}
FULLY_COVERED = (80, 90)
VECTORS = ("LDG.E.128", "STG.E.128")
GEMMS = {
    "_lora_forward_tma_kernel",
    "_lora_forward_sliced_tma_kernel",
    "_lora_one_pass_tma_kernel",
    "_lora_grad_x_tma_kernel",
    "_lora_grad_x_dropout_kernel",
    "_lora_multi_gemm_tma_kernel",
    "_lora_multi_gemm_ring_kernel",
}
HOPPER = GEMMS | {"_lora_grad_ab_tma_kernel"}
OPS_OF_GEMMS = (
    *("forward", "dora_forward", "sliced", "grad_x", "grad_x_ready", "one_pass"),
    *("multi_forward", "multi_grad_x"),
)
OPS = (
    *("shrink", "forward", "grad_b", "grad_x", "grad_a", "grad_ab", "expand"),
    *("multi_shrink", "multi_forward", "multi_grad_x", "multi_grad"),
    *("embedding", "sliced", "merge", "merge_many", "dora_norm", "dora_grad"),
)
NO_PRODUCT = {
    *("_sum_splits_kernel", "_lora_multi_add_kernel", "_lora_embedding_grad_a_kernel"),
    *("_dora_grad_kernel", "_lora_multi_shrink_rows_kernel"),
    *("_lora_route_rows_kernel", "_lora_route_tables_kernel"),
}
ONE_STEP = {
    *("_lora_merge_kernel", "_lora_merge_many_kernel", "_lora_expand_kernel"),
    "_lora_multi_add_blocks_kernel",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the script found: it runs once for all workers of xdist, which wait for the first of them."""
    import fcntl  # not on Windows, where Triton is not either

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    found = folder / "compiled.json"
    with (folder / "compiled.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            found.write_text(compile_in_a_process(tmp_path_factory.mktemp("triton")))
    return json.loads(found.read_text())


def compile_in_a_process(cache):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), "--json"],
        env=env,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def rows(compiled):
    assert len(compiled["rows"]) >= 100
    return compiled["rows"]


@pytest.fixture(scope="module")
def products(rows):
    """The rows with a matrix product, on the architectures whose instructions are checked."""
    return [r for r in rows if r["kernel"] not in NO_PRODUCT and r["arch"] in FULLY_COVERED]


def allowed_spills(row) -> int:
    """How many instructions may touch spilled registers.

    None where speed is promised: 16-bit, ranks up to 64, aligned sizes. Beyond that a kernel at 255
    registers spills a few or not from one ptxas to the next; sizes that no vector load fits, and fp32
    without tensor cores, hold an address or a product an element. Between the loops that have the products,
    a product over a tile's several adapters spills where they have a table of ranks, and, a few, what gathers
    sorted rows: tiles with one adapter or two, which go by TMA, do not come there.
    """
    if row["ranks"] and row["kernel"].startswith("_lora_multi_gemm"):
        return 600
    if row["kernel"] == "_lora_multi_gemm_ring_kernel" and row["R"] <= 64:
        return 32
    if row["K"] % 8 != 0 or row["dtype"] == "ieee":
        return 300
    return 0 if row["dtype"] in ("bf16", "fp16") and row["R"] <= 64 else 128


def without(rows, holds, *keys):
    """Name the rows for which ``holds`` is false, with what they have under ``keys``."""
    return [
        (row["case"], row["kernel"], *(row[key] for key in keys)) for row in rows if not holds(row)
    ]


def test_every_case_compiles(compiled):
    assert not without(compiled["failed"], lambda row: False, "error")


def test_every_kernel_is_compiled(compiled):
    for arch in FULLY_COVERED:
        kernels = {row["kernel"] for row in compiled["rows"] if row["arch"] == arch}
        wanted = set(compiled["kernels"])
        assert kernels == (wanted if arch == 90 else wanted - HOPPER)


@pytest.mark.parametrize("arch", FULLY_COVERED)
def test_every_dtype_is_compiled(rows, arch):
    # Cases of other names are launches of the same kernels beside one another.
    dtypes = {(r["op"], r["dtype"]) for r in rows if r["arch"] == arch and r["op"] in OPS}
    assert dtypes == {
        (op, dtype)
        for op in OPS
        for dtype in ("bf16", "fp16", "tf32", "ieee")
        if dtype != "tf32" or not op.startswith("merge")  # fp32 is always merged exactly
    }


def test_spills_are_within_the_stated_limits(rows):
    covered = [row for row in rows if row["arch"] in FULLY_COVERED]
    assert not without(covered, lambda row: row["spills"] <= allowed_spills(row), "spills")


@pytest.mark.parametrize("arch", SHARED)
def test_shared_memory_fits(rows, arch):
    of_arch = [row for row in rows if row["arch"] == arch]
    assert not without(of_arch, lambda row: row["shared"] <= SHARED[arch], "shared")


def test_pointer_kernels_fit_every_gpu_since_sm80(rows):
    ampere = [row for row in rows if row["arch"] == 80]
    assert not without(ampere, lambda row: row["shared"] <= SMALLEST_SHARED, "shared")


def test_products_run_on_tensor_cores(products):
    exact = {
        ("merge", True),
        ("merge_many", True),
    }  # fp32 adapters are merged without rounding their products
    tensor = [
        row
        for row in products
        if row["dtype"] != "ieee" and (row["op"], row["fp32_adapters"]) not in exact
    ]
    assert not without(tensor, lambda row: row["counts"]["HMMA"] or row["counts"]["HGMMA"])
    assert not without(tensor, lambda row: row["arch"] == 90 or not row["counts"]["HGMMA"])


def test_addresses_from_a_table_are_read_by_vectors_too(rows):
    counts = {
        (row["op"], *(row[key] for key in ("arch", "dtype", "R", "K", "fp32_adapters"))): row[
            "counts"
        ]
        for row in rows
        if row["op"] in ("merge", "merge_many")
    }
    tables = {key[1:]: found for key, found in counts.items() if key[0] == "merge_many"}
    assert len(tables) == len(counts) / 2
    for key, found in tables.items():
        for name in VECTORS:
            assert found[name] == counts[("merge", *key)][name], (key, name)
    assert any(found[name] for found in tables.values() for name in VECTORS)


def test_fp32_without_tf32_is_exact_fma(products):
    ieee = [row for row in products if row["dtype"] == "ieee"]
    assert not without(ieee, lambda row: row["counts"]["FFMA"] >= 128)
    assert not without(ieee, lambda row: not (row["counts"]["HMMA"] or row["counts"]["HGMMA"]))


def test_aligned_gemms_of_hopper_use_wgmma_and_tma(rows):
    wanted = [
        row
        for row in rows
        if row["arch"] == 90
        and row["op"] in OPS_OF_GEMMS
        and row["dtype"] != "ieee"
        and row["M"] > 256
        and row["K"] % 8 == 0
    ]
    assert {row["kernel"] for row in wanted} == GEMMS
    for name in ("HGMMA", "UTMALDG", "UTMASTG"):
        assert not without(wanted, lambda row, name=name: row["counts"][name] > 0)


def test_loads_are_pipelined(products):
    # cp.async or TMA; loads that fit no vector of 4 bytes cannot be, and are left out.
    # Where one step takes most ranks, there is no loop to pipeline.
    aligned = [row for row in products if row["K"] % 8 == 0 and row["kernel"] not in ONE_STEP]
    assert not without(aligned, lambda row: row["counts"]["LDGSTS"] + row["counts"]["UTMALDG"] > 0)


def test_no_wgmma_reads_a_changed_operand_from_registers(rows):
    # ptxas before 13.3 can miscompile that inside a pipelined loop (triton#9433).
    changed = [row for row in rows if row["dropout"] or row["kernel"] == "_lora_shrink_kernel"]
    assert not without(changed, lambda row: row["register_wgmma"] == 0, "register_wgmma")


def test_no_wgmma_of_a_gemm_is_serialized(rows):
    gemms = [row for row in rows if row["kernel"] in HOPPER and row["dtype"] in ("bf16", "fp16")]
    assert {row["kernel"] for row in gemms} == HOPPER
    assert not without(gemms, lambda row: not row["serialized"])


def test_programs_of_da_and_db_fit_beside_dx(rows):
    """On an SM of 64 K registers and 227 KB, of which each program takes 1 for itself."""
    found = {
        (row["op"], row["N"], row["dropout"]): row
        for row in rows
        if row["R"] == 16 and row["M"] > 1024 and row["op"] in ("grad_x_ready", "grad_ab_ds")
    }
    for N, dropout, programs in ((4096, False, 1), (14336, False, 2), (4096, True, 1)):
        dx, beside = found["grad_x_ready", 4096, dropout], found["grad_ab_ds", N, dropout]
        assert programs * (beside["shared"] + 1024) <= SHARED[90] - dx["shared"], N
        taken = [-(-row["registers"] // 8) * 8 for row in (dx, beside)]
        assert taken[0] * 256 + programs * taken[1] * 128 <= 65_536, N
