"""stack_adapters: several adapters trained in one batch are as each trained alone on its rows."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import fastlora
from fastlora.dispatch import force

K, H, N = 10, 7, 9
RANKS, SCALING, RATES = (2, 5, 3, 4), (1.0, 2.0, 0.5, 1.5), (1e-2, 1e-3, 3e-2, 1e-1)
IDS = torch.tensor([2, 0, -1, 1, 0, 2, 2, -1, 1, 0, 0])  # the last adapter has no row
WAYS = [pytest.param(force, id="eager"), pytest.param(contextlib.nullcontext, id="kernels")]


def adapters(device):
    """Per adapter its parameters: (lora_A, lora_B) of two layers."""
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape):
        return nn.Parameter((torch.randn(shape, generator=generator) * 0.3).to(device))

    return [[(parameter(r, K), parameter(H, r)), (parameter(r, H), parameter(N, r))] for r in RANKS]


def optimizers(trained):
    """One each, with its own rate; of two kinds."""
    made = []
    for i, (layers, rate) in enumerate(zip(trained, RATES, strict=True)):
        kind = torch.optim.SGD if i % 2 else torch.optim.AdamW
        made.append(kind([p for pair in layers for p in pair], lr=rate))
    return made


def batches(device):
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(len(IDS), K, generator=generator).to(device)
        yield x, torch.randn(len(IDS), N, generator=generator).to(device)


def frozen(device):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(s, generator=generator).to(device) for s in ((H, K), (N, H))]


def train_alone(which, device):
    first, second = frozen(device)
    trained = adapters(device)
    optimizer = optimizers(trained)[which]
    (a, b), (c, d) = trained[which]
    rows = (which == IDS).to(device)
    for x, target in batches(device):
        h = fastlora.lora_linear(x[rows], first, a, b, scaling=SCALING[which]).tanh()
        y = fastlora.lora_linear(h, second, c, d, scaling=SCALING[which])
        optimizer.zero_grad()
        (y - target[rows]).square().sum().backward()
        optimizer.step()
    return [a, b, c, d]


@pytest.mark.parametrize("way", WAYS)
def test_together_is_as_each_alone(way, device):
    first, second = frozen(device)
    trained = adapters(device)
    steppers = optimizers(trained)
    routing = fastlora.route(IDS.to(device), len(RANKS))
    with way("eager"):
        for x, target in batches(device):
            stacks = [fastlora.stack_adapters([a[i] for a in trained], SCALING) for i in (0, 1)]
            h = fastlora.lora_linear_multi(x, first, stacks[0], routing).tanh()
            y = fastlora.lora_linear_multi(h, second, stacks[1], routing)
            for optimizer in steppers:
                optimizer.zero_grad()
            (y - target).square().sum().backward()
            for optimizer in steppers:
                optimizer.step()
        assert all(torch.count_nonzero(p.grad) == 0 for pair in trained[3] for p in pair)
        for which in range(3):
            alone = train_alone(which, device)
            together = [p for pair in trained[which] for p in pair]
            initial = [p for pair in adapters(device)[which] for p in pair]
            for mixed, expected, start in zip(together, alone, initial, strict=True):
                assert mixed.shape == expected.shape
                assert (expected - start).abs().max() > 1e-3  # it did learn
                torch.testing.assert_close(mixed.grad, expected.grad, atol=1e-3, rtol=1e-3)
                torch.testing.assert_close(mixed, expected, atol=1e-3, rtol=1e-3)


def test_gradients_to_fp64_accuracy():
    pairs = [
        (torch.randn(r, K, dtype=torch.float64), torch.randn(N, r, dtype=torch.float64))
        for r in RANKS
    ]
    x, weight = torch.randn(len(IDS), K).double(), torch.randn(N, K).double()
    flat = [t.requires_grad_() for pair in pairs for t in pair]

    def mixed(*parameters):
        stack = fastlora.stack_adapters(
            list(zip(parameters[::2], parameters[1::2], strict=True)), 2
        )
        return fastlora.lora_linear_multi(x, weight, stack, IDS)

    assert torch.autograd.gradcheck(mixed, flat)


def test_what_it_makes():
    pairs = [(torch.ones(r, K), torch.ones(N, r)) for r in (2, 5)]
    stack = fastlora.stack_adapters(pairs, [1.0, 0.5])
    assert stack.lora_A.shape == (2, 5, K) and stack.lora_B.shape == (2, N, 5)
    assert stack.lora_A[0].sum() == 2 * K and stack.lora_B[0].sum() == 2 * N
    assert stack.ranks.dtype == torch.int32 and stack.ranks.tolist() == [2, 5]
    assert stack.scaling.tolist() == [1.0, 0.5]
    stack.scaling.mul_(2)  # its own: the next stack is not concerned
    assert fastlora.stack_adapters(pairs, [1.0, 0.5]).scaling.tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("pairs", "scaling", "error", "message"),
    [
        ([], 1.0, ValueError, "adapters must hold at least one pair"),
        ([torch.zeros(2, 4)], 1.0, TypeError, r"adapters\[0\] must be a pair of Tensors"),
        ([((2, 4), (4, 3))], 1.0, ValueError, r"adapters\[0\] must be \(r, in_features\)"),
        ([((0, 4), (4, 0))], 1.0, ValueError, r"adapters\[0\] must be \(r, in_features\)"),
        ([((2, 4), (4, 2)), ((2, 5), (4, 2))], 1.0, ValueError, r"adapters\[1\] .* are 4 .* got 5"),
        ([((2, 4), (4, 2)), ((2, 4), (6, 2))], 1.0, ValueError, r"adapters\[1\] .* are 4 .* got 6"),
        ([((2, 4), (4, 2))], [1.0, 2.0], ValueError, "scaling must have 1 entries, got 2"),
        ([((2, 4), (4, 2))], ["1"], TypeError, "scaling must be numbers"),
    ],
)
def test_wrong_arguments(pairs, scaling, error, message):
    made = [tuple(map(torch.zeros, pair)) if isinstance(pair, tuple) else pair for pair in pairs]
    with pytest.raises(error, match=message):
        fastlora.stack_adapters(made, scaling)


def test_dtypes_must_agree():
    a, b = torch.zeros(2, 4), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"adapters\[1\] must be torch.float32 on cpu"):
        fastlora.stack_adapters([(a, b), (a, b.half())])
