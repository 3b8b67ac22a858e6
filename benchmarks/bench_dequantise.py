"""What it costs to make a bf16 weight from fp8 or NF4, beside the product that it is made for.

``python benchmarks/bench_dequantise.py [--json FILE]``. docs/quantised_bases.md says what the figures mean.
NF4 is plain PyTorch, with bitsandbytes' codebook and its blocks of 64: a kernel of one pass costs less.
Without a CUDA GPU the sizes are tiny, every format is checked, and nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.bench.clock import CudaClock, estimate_ms, time_eager
from fastlora.bench.stats import spread

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = [(4096, 4096), (14336, 4096)] if CUDA else [(48, 64)]
TOKENS = (8192, 512) if CUDA else (4,)
BLOCK = 64
# The 16 values of NF4 (Dettmers et al., 2023, arXiv 2305.14314, appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[N, K]`` and one scale for the tensor."""
    scale = weight.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn), scale.to(torch.bfloat16)


def from_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.to(torch.bfloat16) * scale


def to_nf4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, two a byte, the largest magnitude of each block, and the codebook."""
    book = torch.tensor(NF4, device=weight.device)
    blocks = weight.float().view(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    middles = (book[1:] + book[:-1]) / 2
    codes = torch.bucketize(blocks / absmax, middles).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], absmax, book.to(torch.bfloat16)


def from_nf4(packed: Tensor, absmax: Tensor, book: Tensor, shape: tuple[int, int]) -> Tensor:
    codes = torch.stack((packed >> 4, packed & 15), 1).int()
    values = book.index_select(0, codes.view(-1)).view(-1, BLOCK)
    return (values * absmax).to(torch.bfloat16).view(shape)


def calls_for(shape: tuple[int, int]) -> dict[str, Callable[[int], object]]:
    """The products at each token count, and each way to make the weight."""
    weight = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    fp8, nf4 = to_fp8(weight), to_nf4(weight)
    for name, made, error in (("fp8", from_fp8(*fp8), 0.05), ("nf4", from_nf4(*nf4, shape), 0.15)):
        relative = (made.float() - weight.float()).norm() / weight.float().norm()
        if not relative < error:
            raise RuntimeError(f"{name}: relative error {relative:.3f}, expected below {error}")
    calls: dict[str, Callable[[int], object]] = {
        "fp8": lambda i: from_fp8(*fp8),
        "nf4": lambda i: from_nf4(*nf4, shape),
    }
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.bfloat16)
        calls[f"product {tokens}"] = lambda i, x=x: x @ weight.t()
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", help="write every sample to this file")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if CUDA else "no CUDA GPU: nothing is timed"
    print(f"{name}, torch {torch.__version__}")
    clock = CudaClock(torch.device("cuda", 0)) if CUDA else None
    found = {}
    for shape in SHAPES:
        calls = calls_for(shape)
        if clock is None:
            for call in calls.values():
                call(0)
            print(f"{list(shape)}: {', '.join(calls)} ran")
            continue
        for call in calls.values():
            estimate_ms(clock, call)  # warms it up
        samples = time_eager(clock, calls, dict.fromkeys(calls, 10), repeats=20)
        found[f"{shape[0]}x{shape[1]}"] = {n: dataclasses.asdict(s) for n, s in samples.items()}
        device = {label: spread(sample.device_ms) for label, sample in samples.items()}
        for label, times in device.items():
            ratios = "".join(
                f"  x {times.median / device[f'product {tokens}'].median:.2f} of the product at {tokens}"
                for tokens in TOKENS
                if label in ("fp8", "nf4")
            )
            print(
                f"{list(shape)!s:14} {label:14} {times.median:8.4f} ms "
                f"[{times.p20:.4f}, {times.p80:.4f}]{ratios}"
            )
        del calls
        torch.cuda.empty_cache()
    if args.json and CUDA:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"device": name, "torch": torch.__version__, "samples": found}, file)


if __name__ == "__main__":
    main()
