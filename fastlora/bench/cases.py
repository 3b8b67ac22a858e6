"""The cases of every suite: one registry for the command, for pytest-benchmark and for the report."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fastlora.bench.shapes import MODELS

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,  # with TF32 products allowed
}

RANK, ALPHA = 16, 32.0

TRAIN_TABLE = (
    (8192, 4096, 4096),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
    (8192, 8192, 8192),
    (8192, 4096, 1024),
    (2048, 4096, 4096),
)
"""Tokens, K, N of the table that every release is measured by."""

SERVE_TABLE = (
    (16, 16, 16, 4096, 4096),
    (64, 64, 16, 4096, 4096),
    (64, 64, 16, 4096, 14336),
    (256, 64, 16, 4096, 4096),
    (64, 64, 64, 4096, 4096),
)
"""Tokens, adapters, rank, K, N of the decode rows; two rows of 8192 tokens in blocks follow."""


@dataclass(frozen=True)
class TrainCase:
    """One LoRA linear, forward and forward + backward."""

    tag: str
    M: int
    K: int
    N: int
    R: int = RANK
    p: float = 0.0
    dtype: str = "bf16"
    adapter_dtype: str = "bf16"

    suite: ClassVar[str] = "train"

    @property
    def id(self) -> str:
        """A name that is the same in every run."""
        dtypes = (
            self.dtype if self.dtype == self.adapter_dtype else f"{self.dtype}+{self.adapter_dtype}"
        )
        return f"train/{self.tag}/{self.M}x{self.K}x{self.N}/r{self.R}/p{self.p:g}/{dtypes}"

    @property
    def title(self) -> str:
        """The case in words."""
        words = f"{self.M} tokens, {self.K} -> {self.N}, r={self.R}, p={self.p:g}, {self.dtype}"
        same = self.dtype == self.adapter_dtype
        return words if same else f"{words}, {self.adapter_dtype} adapters"

    @property
    def tokens(self) -> int:
        """Rows of x."""
        return self.M

    def work(self, mode: str) -> tuple[int, int]:
        """Floating-point operations, and the fewest bytes: inputs read once, outputs written once."""
        M, K, N, R = self.M, self.K, self.N, self.R
        size, small = DTYPES[self.dtype].itemsize, DTYPES[self.adapter_dtype].itemsize
        adapter = R * (K + N) * small
        forward = (M * K + N * K + M * N) * size + adapter
        if mode == "forward":
            return 2 * M * K * N + 2 * M * R * (K + N), forward
        # Backward reads dy, x, the weight and the adapter, and writes dx and the adapter's gradients.
        backward = (M * N + 2 * M * K + N * K) * size + 2 * adapter
        return 4 * M * K * N + 6 * M * R * (K + N), forward + backward

    def shrunk(self) -> TrainCase:
        """A small twin, of odd sizes, for a check on a CPU."""
        return replace(
            self, M=min(self.M, 37), K=self.K // 64 + 8, N=self.N // 64 + 8, R=min(self.R, 8)
        )


@dataclass(frozen=True)
class ServeCase:
    """One linear whose rows use different adapters, or none."""

    tag: str
    M: int
    live: int
    """Adapters that the rows use, in turn."""
    R: int
    K: int
    N: int
    layout: str = "mixed"
    """``"mixed"``: row m uses adapter m mod live; ``"blocks"``: equal runs of rows; ``"requests"``: unequal
    ones, and the stack has a table of ranks, as a bank's has; ``"random"``; ``"base"``: none."""
    slots: int = 0
    """Slots of the stacks, ``live`` when 0."""
    cold: bool = False
    """Whether weights and adapters are rotated past L2, as the layers of a model do."""
    train: bool = False
    """Whether backward is timed as well."""
    p: float = 0.0
    dtype: str = "bf16"

    suite: ClassVar[str] = "serve"

    @property
    def id(self) -> str:
        """A name that is the same in every run."""
        parts = [f"{self.M}x{self.K}x{self.N}", f"{self.live}of{self.slots or self.live}"]
        parts += [f"r{self.R}", self.layout, "cold" if self.cold else "warm", self.dtype]
        if self.train:
            parts.append(f"train-p{self.p:g}")
        return f"serve/{self.tag}/" + "/".join(parts)

    @property
    def title(self) -> str:
        """The case in words."""
        slots = f" of {self.slots} slots" if self.slots > self.live else ""
        users = {
            "base": "no adapter",
            "blocks": f"{self.live} adapters{slots} in blocks",
            "requests": f"{self.live} adapters{slots} in runs of unequal length",
            "random": f"{self.live} adapters{slots} at random",
            "mixed": f"{self.live} adapters{slots}",
        }[self.layout]
        how = f", p={self.p:g}" if self.train else (", cold" if self.cold else ", warm")
        return f"{self.M} rows, {users}, r={self.R}, {self.K} -> {self.N}{how}"

    @property
    def tokens(self) -> int:
        """Rows of x."""
        return self.M

    def work(self, mode: str) -> tuple[int, int]:
        """Floating-point operations, and the fewest bytes: weight and active adapters once."""
        M, K, N, R, size = self.M, self.K, self.N, self.R, DTYPES[self.dtype].itemsize
        live = 0 if self.layout == "base" else self.live
        rank_flops = 2 * M * R * (K + N) if live else 0
        adapters = live * R * (K + N) * size
        forward = (M * K + N * K + M * N) * size + adapters
        if mode == "forward":
            return 2 * M * K * N + rank_flops, forward
        backward = (M * N + 2 * M * K + N * K) * size + 2 * adapters
        return 4 * M * K * N + 3 * rank_flops, forward + backward

    def shrunk(self) -> ServeCase:
        """A small twin, of odd sizes, for a check on a CPU."""
        live = min(self.live, 5)
        return replace(
            self, M=min(self.M, 37), K=self.K // 64 + 8, N=self.N // 64 + 8, R=min(self.R, 8),
            live=live, slots=live + 3 if self.slots > self.live else 0,
        )  # fmt: skip


@dataclass(frozen=True)
class ModelCase:
    """A transformers Llama with the layer sizes of a real one: a training step, or generation."""

    tag: str
    kind: str
    """``"layer"`` (a decoder layer, forward and step), ``"finetune"`` or ``"generate"``."""
    model: str = "llama-3.1-8b"
    batch: int = 4
    length: int = 2048
    R: int = RANK
    p: float = 0.0
    layers: int = 0
    """0: as many as fit into the GPU's memory for every provider."""
    adapters: int = 1
    new_tokens: int = 16
    checkpointing: bool = False
    """Whether each decoder layer keeps its input alone and runs again in the backward."""
    tiny: bool = False

    suite: ClassVar[str] = "model"

    @property
    def id(self) -> str:
        """A name that is the same in every run."""
        parts = [self.model, f"{self.batch}x{self.length}", f"r{self.R}", f"p{self.p:g}"]
        if self.layers:
            parts.append(f"{self.layers}layers")
        if self.kind == "generate":
            parts.append(f"{self.adapters}adapters")
        if self.checkpointing:
            parts.append("checkpointing")
        return f"model/{self.tag}/" + "/".join(parts)

    @property
    def title(self) -> str:
        """The case in words."""
        label = MODELS[self.model].label
        if self.kind == "generate":
            return (
                f"{label} layers: {self.batch} prompts of {self.length}, {self.new_tokens} new tokens, "
                f"{self.adapters} adapters, r={self.R}"
            )
        what = "one decoder layer" if self.kind == "layer" else "training step"
        more = ", checkpointing" if self.checkpointing else ""
        return (
            f"{label}: {what}, {self.batch} x {self.length} tokens, r={self.R}, p={self.p:g}{more}"
        )

    @property
    def tokens(self) -> int:
        """Tokens of a call: those trained on, or those generated."""
        return self.batch * (self.new_tokens if self.kind == "generate" else self.length)

    def work(self, mode: str) -> tuple[int, int]:
        """Not counted for a whole model."""
        return 0, 0

    def shrunk(self) -> ModelCase:
        """A tiny twin for a check on a CPU."""
        return replace(
            self, batch=min(self.batch, 4), length=12, R=min(self.R, 4), layers=1, new_tokens=2,
            adapters=min(self.adapters, 3), tiny=True,
        )  # fmt: skip


Case = TrainCase | ServeCase | ModelCase


def _train_cases() -> list[TrainCase]:
    cases = [TrainCase("table", *sizes, p=p) for sizes in TRAIN_TABLE for p in (0.0, 0.1)]
    cases += [
        TrainCase("fp32-adapters", *sizes, p=p, adapter_dtype="fp32")
        for sizes in TRAIN_TABLE
        for p in ((0.0, 0.1) if sizes == TRAIN_TABLE[0] else (0.1,))
    ]
    cases += [
        TrainCase("rank", 8192, K, N, R=R)
        for K, N, ranks in ((4096, 4096, (4, 8, 32, 64, 128, 256)), (4096, 14336, (8, 64, 256)))
        for R in ranks
    ]
    cases += [
        TrainCase("tokens", M, 4096, 4096, p=p)
        for M in (1, 16, 64, 256, 512, 1024, 4096, 16384, 32768)
        for p in ((0.0, 0.1) if M in (16, 1024, 32768) else (0.0,))
    ]
    cases += [
        TrainCase("dtype", 8192, 4096, N, dtype=dtype, adapter_dtype=dtype)
        for dtype in ("fp16", "tf32", "fp32")
        for N in (4096, 14336)
    ]
    table = {(K, N) for _, K, N in TRAIN_TABLE}
    for name, shape in MODELS.items():
        cases += [
            TrainCase(f"shape-{name}", 8192, K, N)
            for K, N in shape.distinct_linears()
            if (K, N) not in table
        ]
    return cases


def _serve_cases() -> list[ServeCase]:
    blocks = [ServeCase("table", 8192, 32, 16, 4096, N, layout="blocks") for N in (4096, 14336)]
    cases = [ServeCase("table", *sizes) for sizes in SERVE_TABLE] + blocks
    cases += [ServeCase("cold", *sizes, cold=True) for sizes in SERVE_TABLE]
    cases += [
        ServeCase(layout, 8192, 32, 16, 4096, N, layout=layout)
        for layout in ("requests", "random")
        for N in (4096, 14336)
    ]
    cases += [
        ServeCase("base", M, 1, 16, 4096, 4096, layout="base", slots=64)
        for M in (16, 64, 256, 8192)
    ]
    cases += [
        ServeCase("slots", M, 16, 16, 4096, 4096, slots=slots)
        for M in (16, 256)
        for slots in (16, 2000)
    ]
    cases += [
        ServeCase("mixed-training", 8192, 8, 16, 4096, N, layout="blocks", train=True, p=p)
        for N in (14336, 4096)
        for p in (0.0, 0.1)
    ]
    cases += [
        ServeCase("adapters", 64, live, 16, 4096, 4096, cold=True) for live in (1, 2, 4, 8, 16, 32)
    ]
    return cases


def _model_cases() -> list[ModelCase]:
    return [
        ModelCase("layer", "layer", layers=1),
        ModelCase("layer", "layer", layers=1, p=0.1),
        ModelCase("finetune", "finetune", p=0.05),
        ModelCase("finetune", "finetune", p=0.05, checkpointing=True),
        ModelCase("generate", "generate", batch=16, length=128, adapters=16, layers=4),
        ModelCase("generate", "generate", batch=64, length=128, adapters=64, layers=4),
    ]


def _quick_cases() -> list[Case]:
    return [
        TrainCase("table", 8192, 4096, 4096, p=0.1),
        TrainCase("table", 8192, 4096, 14336, p=0.0),
        TrainCase("fp32-adapters", 2048, 4096, 4096, p=0.1, adapter_dtype="fp32"),
        ServeCase("table", 64, 64, 16, 4096, 4096),
        ServeCase("cold", 64, 64, 16, 4096, 4096, cold=True),
        ServeCase("table", 8192, 32, 16, 4096, 4096, layout="blocks"),
        ServeCase("mixed-training", 8192, 8, 16, 4096, 4096, layout="blocks", train=True),
        ModelCase("layer", "layer", layers=1),
        ModelCase("generate", "generate", batch=16, length=128, adapters=16, layers=2),
    ]


def suites() -> dict[str, list[Case]]:
    """Name to cases; within a suite the ones that matter most come first."""
    train, serve, model = _train_cases(), _serve_cases(), _model_cases()
    return {
        "quick": _quick_cases(),
        "train": [*train],
        "serve": [*serve],
        "model": [*model],
        "all": [*train, *serve, *model],
    }


def select(suite: str, pattern: str | None = None) -> list[Case]:
    """The cases of a suite whose id matches.

    Args:
        suite (str): a name of `suites`.
        pattern (str | None): a regular expression that is searched for in each id. Default: ``None``.

    Raises:
        ValueError: the suite is unknown, the pattern is no regular expression, or nothing matches.
    """
    every = suites()
    if suite not in every:
        raise ValueError(f"suite must be one of {', '.join(every)}, got {suite!r}")
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"--filter {pattern!r} is no regular expression: {error}") from error
    found = [case for case in every[suite] if wanted.search(case.id)]
    if not found:
        raise ValueError(f"no case of suite {suite} matches {pattern!r}; --list shows them")
    return found
