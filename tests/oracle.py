"""What the tests of the fused op share: inputs, the fp64 oracle, plain eager LoRA, and the criterion.

Loaded by the `oracle` fixture of conftest: importlib mode puts no test folder on sys.path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlora
from fastlora import reference
from fastlora.kernels.config import keep_scale

SEED = 1234
LEAVES = ("x", "weight", "lora_A", "lora_B", "bias")
HAS_CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Case:
    """The arguments of one call, and the gradient ``dy`` that comes back to it."""

    tensors: dict[str, Tensor]
    dy: Tensor
    scaling: float | Tensor = 1.5
    dropout_p: float = 0.0
    training: bool = True
    wanted: tuple[str, ...] = field(default=LEAVES)

    def double(self) -> Case:
        tensors = {name: t.double() for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, dy=self.dy.double(), scaling=float(self.scaling))

    def dense(self) -> Case:
        """The same case with every tensor contiguous."""
        tensors = {name: t.contiguous() for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, dy=self.dy.contiguous())

    def relaid(self, **changes: Tensor) -> Case:
        """The same case with some tensors in another layout."""
        return replace(self, tensors={**self.tensors, **changes})


def make_case(
    M: int,
    K: int,
    N: int,
    R: int,
    dtype: torch.dtype,
    device: str,
    *,
    bias: bool = True,
    adapter_dtype: torch.dtype | None = None,
    **options: object,
) -> Case:
    """Inputs of unit variance: the LoRA branch is as large as the frozen one, so errors in it show."""

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    adapter = dtype if adapter_dtype is None else adapter_dtype
    tensors = {
        "x": draw(M, K),
        "weight": draw(N, K, scale=K**-0.5),
        "lora_A": draw(R, K, scale=K**-0.5, dtype=adapter),
        "lora_B": draw(N, R, scale=R**-0.5, dtype=adapter),
    }
    if bias:
        tensors["bias"] = draw(N)
    return Case(tensors, draw(M, N), **options)  # type: ignore[arg-type]


def drawn_seed(device: torch.device) -> Tensor:
    """The seed that a call right after ``torch.manual_seed(SEED)`` draws."""
    torch.manual_seed(SEED)
    return reference.draw_seed(device)


def run(call: Callable[[Case], Tensor], case: Case) -> dict[str, Tensor]:
    """``y`` and the wanted gradients of ``call`` on fresh leaves that share the case's memory."""
    wanted = [name for name in case.wanted if name in case.tensors]
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in case.tensors.items()}
    y = call(replace(case, tensors=leaves))
    assert y.requires_grad == bool(wanted)
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], case.dy) if wanted else ()
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_fused(case: Case) -> None:
    decision = fastlora.explain(**case.tensors, dropout_p=case.dropout_p)
    assert decision.fused, str(decision)


def fused_call(case: Case) -> Tensor:
    torch.manual_seed(SEED)
    return fastlora.lora_linear(
        **case.tensors,
        scaling=case.scaling,
        dropout_p=case.dropout_p,
        training=case.training,
    )


def reference_call(case: Case) -> Tensor:
    return reference.lora_linear(
        **case.tensors,
        scaling=case.scaling,
        dropout_p=case.dropout_p,
        training=case.training,
        seed=drawn_seed(case.tensors["x"].device),
    )


def plain_call(case: Case) -> Tensor:
    """PEFT's forward in the dtype of x: what a user has without fastlora, with the same mask."""
    x, weight, a, b = (case.tensors[name] for name in LEAVES[:4])
    dropped = x
    if case.training and case.dropout_p > 0:
        rows = x.numel() // x.shape[-1]
        keep = reference.dropout_keep_mask(
            drawn_seed(x.device), rows, x.shape[-1], case.dropout_p, x.device
        )
        dropped = torch.where(keep.view(x.shape), x * keep_scale(case.dropout_p), 0)
    branch = F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, weight, case.tensors.get("bias")) + branch * case.scaling


def fused(case: Case) -> dict[str, Tensor]:
    assert_fused(case)
    return run(fused_call, case)


def exact(case: Case) -> dict[str, Tensor]:
    return run(reference_call, case.double())


def plain(case: Case) -> dict[str, Tensor]:
    # torch's own bf16 products on a CPU read past some strided views, of which a NaN may come.
    return run(plain_call, case.dense())


def floor_of(dtype: torch.dtype, depth: int = 1) -> float:
    """Relative error that is always allowed, for cases in which eager happens to round luckily.

    It is one worst-case rounding. Triton's interpreter truncates where it casts to bf16, 2**-7 each
    time, so there it is three of those: an operand, s or ds, and the result. fp32 gets the order of
    summation too: the kernels keep one running sum, whose rounding grows as the square root of its
    ``depth``, to some sqrt(depth) / 7 units in norm, and s or ds adds its own; cuBLAS splits long sums for
    few rows, and its parts stay short. TF32 truncates both operands of s and then of y by up to 2**-10
    each, which one product alone does not average out, while eager may get an exact fp32 kernel for one
    token.
    """
    if dtype == torch.bfloat16 and not HAS_CUDA:
        return 3 * 2.0**-7
    if dtype == torch.float32 and HAS_CUDA and torch.backends.cuda.matmul.allow_tf32:
        return 2.0**-8
    eps = torch.finfo(dtype).eps
    return eps * (max(8.0, depth**0.5 / 4) if dtype == torch.float32 else 0.5)


def assert_close(
    got: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    name: str = "",
    depth: int = 1,
    chance: Tensor | None = None,
) -> None:
    """Error of ``got`` no larger than that of ``plain``, in norm and in its largest element.

    The factors leave room for chance: 1.25 in norm (3 for fp32, where only the order of summation
    differs: one running sum here, many partial ones in cuBLAS), and twice that for the largest
    element, which is the worst of many. ``depth`` is the length of the longest sum in it.
    ``chance`` is an error that ``plain`` would have but for luck, where too few numbers are rounded to
    average: it stands for that of ``plain`` where it is larger.
    """
    assert got.shape == exact.shape, name
    if got.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error, baseline = (got.double() - exact).abs(), (plain.double() - exact).abs()
    floor, factor = floor_of(dtype, depth), 3.0 if dtype == torch.float32 else 1.25
    for measure, slack in ((torch.linalg.vector_norm, 1.0), (torch.amax, 2.0)):
        e = measure(error)
        usual = measure(baseline)
        if chance is not None:
            usual = torch.maximum(usual, measure(chance))
        limit = slack * (factor * usual + floor * measure(exact.abs()))
        assert e <= limit, f"{name}: {measure.__name__} of error {e:.3g}, limit {limit:.3g}"


def depth_of(name: str, x: Tensor, dy: Tensor) -> int:
    """The length of the longest sum of a result: its own, or that in s or ds, which it is made of."""
    (M, N), K = (dy.shape[:-1].numel(), dy.shape[-1]), x.shape[-1]
    depths = {"y": K, "x": N, "weight": M, "bias": M, "lora_A": max(M, N), "lora_B": max(M, K)}
    return depths[name]


def check(case: Case, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Assert that the fused path runs, and that y and every gradient are as exact as plain eager's."""
    got, baseline, truth = fused(case), plain(case), exact(case)
    dtype = case.tensors["x"].dtype
    assert got.keys() == truth.keys()
    assert got["y"].dtype == dtype
    for name in truth if names is None else names:
        depth = depth_of(name, case.tensors["x"], case.dy)
        assert_close(got[name], baseline[name], truth[name], dtype, name, depth)
        if name != "y":
            assert got[name].dtype == case.tensors[name].dtype, name
    return got
