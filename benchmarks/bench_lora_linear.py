"""pytest-benchmark over the cases of ``python -m fastlora bench``.

Run it with ``pytest benchmarks/bench_lora_linear.py``; without a CUDA GPU the cases are tiny and
only show that every provider runs. Every provider is checked against the reference first.
"""

from __future__ import annotations

import pytest
import torch

from fastlora.cli import bench
from fastlora.cli.cases import Case, default_cases, make_problem
from fastlora.cli.providers import PROVIDERS, available

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = default_cases(tokens=32, dtype=torch.float32, shapes=((48, 64),), rank=4)
CASES = default_cases() if DEVICE.type == "cuda" else TINY


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "compile"])
@pytest.mark.parametrize("what", ["forward", "step"])
def test_lora_linear(benchmark, case: Case, name: str, what: str) -> None:
    """Time one provider on one case, a device sync after each call."""
    chosen, left_out = available((name,))
    if left_out:
        pytest.skip(left_out[0])
    provider, problem = chosen[0], make_problem(case, DEVICE)
    p = case.p if provider.same_mask else 0.0
    wanted = bench.wanted_outputs(problem, p, seed=0)
    errors = bench.layer_errors(problem, provider.make(problem, p), wanted, seed=0)
    assert max(errors.values()) <= bench.TOLERANCE[case.dtype], errors

    layer = provider.make(problem, case.p)
    make_call = bench.layer_forward if what == "forward" else bench.layer_step
    call = make_call(problem, layer)

    def timed() -> None:
        call(0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(case=str(case), provider=provider.label)
    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
