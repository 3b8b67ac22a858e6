"""Which path a call takes, and why: the pure decision, real tensors, and machines without kernels."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import fastlora
from fastlora import dispatch, reference
from fastlora.dispatch import Call, Decision, decide
from fastlora.kernels.config import MAX_RANK

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

GPU = Call("cuda", (9, 0), BF16, BF16, (BF16, BF16), M=128, K=64, N=32, R=16)
CPU = replace(GPU, device_type="cpu", capability=None)
FP32_CALL = replace(GPU, x_dtype=FP32, weight_dtype=FP32, adapter_dtypes=(FP32, FP32))

FUSED = {
    "hopper": GPU,
    "ampere": replace(GPU, capability=(8, 0)),
    "ada": replace(GPU, capability=(8, 9)),
    "blackwell": replace(GPU, capability=(12, 0)),
    "unknown-newer": replace(GPU, capability=(99, 0)),
    "fp16": replace(GPU, x_dtype=FP16, weight_dtype=FP16, adapter_dtypes=(FP16, FP16)),
    "fp32": FP32_CALL,
    "fp32-adapters": replace(GPU, adapter_dtypes=(FP32, FP32)),
    "one-fp32-adapter": replace(GPU, adapter_dtypes=(BF16, FP32)),
    "rank-1": replace(GPU, R=1),
    "rank-max": replace(GPU, R=MAX_RANK),
    "one-element": replace(GPU, M=1, K=1, N=1),
    "interpreted-cpu": replace(CPU, interpreted=True),
}
EAGER = {
    "cpu": (CPU, "the tensors are on cpu"),
    "mps": (replace(CPU, device_type="mps"), "the tensors are on mps"),
    "meta": (replace(CPU, device_type="meta", interpreted=True), "the tensors are on meta"),
    "no-triton": (replace(GPU, triton_problem="Triton is away"), "Triton is away"),
    "amd": (replace(GPU, capability=None), "not an NVIDIA GPU"),
    "turing": (replace(GPU, capability=(7, 5)), "capability 7.5 is older than 8.0"),
    "fp64": (replace(FP32_CALL, x_dtype=FP64, weight_dtype=FP64), "x is torch.float64"),
    "fp8": (replace(GPU, x_dtype=torch.float8_e4m3fn), "x is torch.float8_e4m3fn"),
    "weight-dtype": (replace(GPU, weight_dtype=FP32), "weight is torch.float32 and x is"),
    "first-adapter": (replace(GPU, adapter_dtypes=(FP16, BF16)), "an adapter is torch.float16"),
    "second-adapter": (replace(GPU, adapter_dtypes=(BF16, FP64)), "an adapter is torch.float64"),
    "narrow-adapter": (replace(FP32_CALL, adapter_dtypes=(BF16, FP32)), "an adapter is"),
    "rank": (replace(GPU, R=MAX_RANK + 1), f"rank {MAX_RANK + 1} is above {MAX_RANK}"),
    "no-rows": (replace(GPU, M=0), "M=0"),
    "no-inputs": (replace(GPU, K=0), "K=0"),
    "no-outputs": (replace(GPU, N=0), "N=0"),
}


def arguments(device="cpu", dtype=FP32, lead=(4,), k=16, n=8, r=4):
    shapes = ((*lead, k), (n, k), (r, k), (n, r))
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


@pytest.mark.parametrize("name", FUSED)
def test_fused(name):
    assert decide(FUSED[name]).path == "fused"


@pytest.mark.parametrize("name", EAGER)
def test_eager_and_why(name):
    call, words = EAGER[name]
    decision = decide(call)
    assert decision.path == "eager"
    assert words in decision.reason


def test_decision_reads_as_a_sentence():
    assert str(Decision("eager", "no GPU")) == "eager: no GPU"
    assert Decision("fused", "").fused
    assert not Decision("eager", "").fused


def test_explain_on_this_machine(device):
    decision = fastlora.explain(*arguments(device))
    if device == "cpu":  # conftest turns the interpreter on
        assert decision.fused
        assert "interpreter" in decision.reason
    elif torch.cuda.get_device_capability() >= (8, 0):
        assert decision.fused
        assert "rank 4" in decision.reason


def test_explain_says_by_which_kernels(device, monkeypatch):
    def reason(m, r=8, dtype=torch.bfloat16, **options):
        k, n = 64, 32
        tensors = (torch.randn(m, k), torch.randn(n, k), torch.randn(r, k), torch.randn(n, r))
        tensors = (t.to(device, dtype) for t in tensors)
        return fastlora.explain(*tensors, **options).reason

    assert "lora_decode" in reason(3)
    assert "lora_shrink" in reason(3, dropout_p=0.1) and "lora_decode" not in reason(3, r=65)
    few, fp32 = reason(200), reason(300, dtype=torch.float32)
    on_top = device == "cuda"  # cuBLAS is not what runs on a CPU
    assert ("cuBLAS" in few) == ("cuBLAS" in fp32) == on_top
    assert "lora_forward" in reason(300)
    monkeypatch.setattr("fastlora.kernels.lora_product.fits_one_pass", lambda *args: True)
    assert "lora_one_pass" in reason(300)
    assert "lora_forward" in reason(300, dropout_p=0.1)


def test_explain_counts_every_leading_dimension(device):
    assert "M=0" in fastlora.explain(*arguments(device, lead=(3, 0, 5))).reason
    assert fastlora.explain(*arguments(device, lead=())).fused
    assert "K=0" in fastlora.explain(*arguments(device, k=0)).reason


def test_explain_follows_the_dtype_of_autocast(device):
    x, weight, lora_A, lora_B = arguments(device, BF16)
    with pytest.raises(TypeError, match="weight must have the dtype of x"):
        fastlora.explain(x, weight.float(), lora_A, lora_B)
    with torch.autocast(device, BF16):
        assert fastlora.explain(x.float(), weight.float(), lora_A.float(), lora_B.float()).fused


def test_explain_raises_as_lora_linear_does(device):
    x, weight, lora_A, lora_B = arguments(device)
    with pytest.raises(ValueError, match="lora_A must be"):
        fastlora.explain(x, weight, lora_A.T, lora_B)


def test_meta_tensors_are_eager():
    x, weight, lora_A, lora_B = arguments("meta", lead=(2, 3))
    assert "meta" in fastlora.explain(x, weight, lora_A, lora_B).reason
    y = fastlora.lora_linear(x, weight, lora_A, lora_B, dropout_p=0.5)
    assert y.is_meta
    assert y.shape == (2, 3, 8)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias"])
def test_subclass_is_eager(name, device):
    class Odd(torch.Tensor):
        pass

    names = ("x", "weight", "lora_A", "lora_B")
    tensors = dict(zip(names, arguments(device), strict=True)) | {
        "bias": torch.randn(8, device=device)
    }
    plain = fastlora.lora_linear(**tensors)
    tensors[name] = tensors[name].as_subclass(Odd)
    assert "subclass" in fastlora.explain(**tensors).reason
    torch.testing.assert_close(
        fastlora.lora_linear(**tensors).as_subclass(torch.Tensor), plain, rtol=1e-4, atol=1e-4
    )
    x, weight, lora_A, lora_B, bias = tensors.values()
    group = fastlora.explain_group(x, [weight], [lora_A], [lora_B], biases=[bias])
    assert "subclass" in group.reason


def test_parameters_are_no_subclass(device):
    x, *rest = arguments(device)
    assert fastlora.explain(x, *(torch.nn.Parameter(t) for t in rest)).fused


def test_force_eager_runs_the_reference(device, monkeypatch):
    calls = []
    original = reference.lora_linear
    monkeypatch.setattr(
        reference, "lora_linear", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    tensors = arguments(device)
    with dispatch.force("eager"):
        assert "force('eager')" in fastlora.explain(*tensors).reason
        y = fastlora.lora_linear(*tensors)
    assert calls == [1]
    torch.testing.assert_close(y, original(*tensors))
    fastlora.lora_linear(*tensors)
    assert calls == [1]


def test_force_nests(device):
    tensors = arguments(device)
    with dispatch.force("eager"):
        with dispatch.force("eager"):
            assert not fastlora.explain(*tensors).fused
        assert not fastlora.explain(*tensors).fused
    assert fastlora.explain(*tensors).fused


def test_force_ends_with_an_error(device):
    tensors = arguments(device)
    with pytest.raises(RuntimeError, match="inside"), dispatch.force("eager"):
        raise RuntimeError("inside")
    assert fastlora.explain(*tensors).fused


@pytest.mark.parametrize("path", ["fused", "Eager", ""])
def test_force_takes_no_other_path(path):
    with pytest.raises(ValueError, match="'eager'"), dispatch.force(path):
        pass


def test_force_stays_in_its_thread(device):
    tensors, seen = arguments(device), []
    with dispatch.force("eager"):
        thread = threading.Thread(target=lambda: seen.append(fastlora.explain(*tensors).fused))
        thread.start()
        thread.join()
    assert seen == [True]


COMPARE = """
import torch, fastlora
x, w, a, b = (torch.randn(s, requires_grad=True) for s in ((4, 16), (8, 16), (2, 16), (8, 2)))
print(fastlora.explain(x, w, a, b))
torch.manual_seed(3)
y = fastlora.lora_linear(x, w, a, b, scaling=0.5, dropout_p=0.5)
torch.manual_seed(3)
expected = fastlora.reference.lora_linear(x, w, a, b, scaling=0.5, dropout_p=0.5)
assert torch.equal(y, expected)
for pair in zip(*(torch.autograd.grad(t.sum(), (x, w, a, b)) for t in (y, expected))):
    assert torch.equal(*pair)
"""

NO_TRITON = "import sys; sys.modules['triton'] = None\n"

# Triton before 3.4, as far as the library can tell.
OLD_TRITON = """
import sys, torch, triton
for name in {missing}:
    sys.modules[f"triton.{{name}}"] = None
    vars(triton).pop(name, None)
"""


def test_cpu_without_the_interpreter_runs_the_reference(run_python):
    assert run_python(COMPARE) == "eager: the kernels run on CUDA GPUs, the tensors are on cpu"


def test_cpu_with_the_interpreter_is_fused(run_python):
    code = "import torch, fastlora; t = torch.ones; print(fastlora.explain(*[t(2, 2)] * 4).path)"
    assert run_python(code, TRITON_INTERPRET="1") == "fused"


def test_works_without_triton(run_python):
    assert run_python(NO_TRITON + COMPARE).startswith("eager: Triton cannot be used: ")


@pytest.mark.parametrize(
    "missing", [["knobs"], ["knobs", "tools.tensor_descriptor"]], ids=["knobs", "both"]
)
def test_works_with_an_old_triton(run_python, missing):
    said = run_python(OLD_TRITON.format(missing=missing) + COMPARE)
    assert said.startswith("eager: Triton cannot be used: ")
    assert "knobs" in said
