"""What the tests of single kernels share: random inputs, the criterion, and packed masks."""

from __future__ import annotations

import torch

HAS_CUDA = torch.cuda.is_available()


def randn(device, dtype, *shape, scale=1.0):
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def assert_rounded(got, expected, dtype, *, roundings=2, depth=1, products=True):
    """``got`` is ``expected`` up to ``roundings`` of ``dtype`` in norm, and 8 times that anywhere.

    In fp32 that is ``depth`` terms summed in some order; TF32 truncates operands by up to 2**-10 each.
    Interpreted bf16 casts truncate: twice the half ulp.
    """
    unit = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 and not HAS_CUDA else 2)
    if dtype == torch.float32:
        tf32 = products and HAS_CUDA and torch.backends.cuda.matmul.allow_tf32
        unit = 2.0**-9 if tf32 else unit * (2 + depth**0.5)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    error = (got.double() - expected).abs()
    scale = expected.square().mean().sqrt()
    assert error.square().mean().sqrt() <= roundings * unit * scale
    assert (error <= 8 * roundings * unit * (scale + expected.abs())).all()


def unpack(mask, K):
    bits = (mask[:, :, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    return bits.reshape(mask.shape[0], -1)[:, :K].bool()


def pack(keep):
    padded = torch.nn.functional.pad(keep.int(), (0, -keep.shape[1] % 8))
    weights = 2 ** torch.arange(8, device=keep.device)
    return (padded.view(keep.shape[0], -1, 8) * weights).sum(-1).to(torch.uint8)


def assert_same_bits_beside_other_work(device, steps, rounds):
    """Steps give the same bits however often they run, beside each other and another stream's work."""
    steps = [(step, step()) for step in steps]
    other, side = randn(device, torch.bfloat16, 2048, 2048), torch.cuda.Stream()
    for i in range(rounds):
        with torch.cuda.stream(side):
            other @ other  # programs come onto the GPU late, and in part
            steps[i % len(steps)][0]()  # two of the kernels at once
        for step, expected in steps:
            if i % 50 == 0:
                assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
            else:
                made = step()
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    torch.cuda.synchronize()
