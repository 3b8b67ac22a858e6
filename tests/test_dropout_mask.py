"""The dropout mask of the reference: Philox's published vectors, its layout and its statistics."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from fastlora import dropout_mask, reference
from fastlora.kernels.config import DROPOUT_LEVELS, PHILOX_ROUNDS, dropout_threshold

ONES = 0xFFFFFFFF
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
# Known answers of Random123's kat_vectors for philox4x32: rounds, counter, key, output.
VECTORS = [
    (7, (0, 0, 0, 0), (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, (ONES,) * 4, (ONES,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, *PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, (0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, (ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, *PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
M, K = 512, 1000
PROBABILITIES = [2.0**-14, 0.01, 0.1, 0.5, 0.9, 1 - 2.0**-14]


def philox(counter, key, rounds=PHILOX_ROUNDS):
    """Philox-4x32 by its definition, in Python's own integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & ONES, (a >> 32) ^ c3 ^ k1, a & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


def draw(seed, m, k):
    """The draw of element ``(m, k)``, as the reference's docstring places it."""
    word = philox((k // 8, m, 0, 0), (seed & ONES, (seed >> 32) & ONES))[k % 8 // 2]
    return (word >> 16 if k % 2 else word) & (DROPOUT_LEVELS - 1)


def z_score(count, trials, rate):
    return abs(count - trials * rate) / math.sqrt(trials * rate * (1 - rate))


def correlation(a, b):
    """Correlation of two keep masks in standard deviations of independent ones."""
    return abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())).double())[0, 1]) * math.sqrt(
        a.numel()
    )


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), VECTORS)
def test_known_answers(rounds, counter, key, expected):
    assert " ".join(f"{word:08x}" for word in philox(counter, key, rounds)) == expected


def test_reference_gives_the_known_answer_of_zeros():
    zero = torch.zeros((), dtype=torch.int64)
    words = dropout_mask._philox_4x32(zero, zero, zero)
    assert [int(w) for w in words] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_reference_is_philox():
    source = random.Random(0)
    edges = [(-1, ONES, ONES), (-(2**63), 0, ONES), (2**63 - 1, ONES, 0)]
    points = [
        (source.randrange(-(2**63), 2**63), source.randrange(2**32), source.randrange(2**32))
        for _ in range(200)
    ]
    for seed, c0, c1 in edges + points:
        words = dropout_mask._philox_4x32(*(torch.tensor(v) for v in (seed, c0, c1)))
        expected = philox((c0, c1, 0, 0), (seed & ONES, (seed >> 32) & ONES))
        assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 42, -1, 2**40 + 3])
def test_layout_is_the_documented_one(seed, p):
    mask = reference.dropout_keep_mask(seed, 5, 19, p)
    expected = [[draw(seed, m, k) >= dropout_threshold(p) for k in range(19)] for m in range(5)]
    assert mask.tolist() == expected


def test_tensor_and_integer_seeds_agree():
    masks = [reference.dropout_keep_mask(s, 8, 64, 0.5) for s in (9, torch.tensor(9))]
    assert torch.equal(*masks)


def test_mask_depends_on_the_position_alone():
    whole = reference.dropout_keep_mask(1, 40, 70, 0.3)
    assert torch.equal(whole[:7, :13], reference.dropout_keep_mask(1, 7, 13, 0.3))


@pytest.mark.parametrize(("m", "k"), [(0, 8), (3, 1), (1, 8), (2, 9)])
def test_shape(m, k):
    mask = reference.dropout_keep_mask(0, m, k, 0.5)
    assert mask.shape == (m, k)
    assert mask.dtype == torch.bool


def test_ends_are_exact():
    assert reference.dropout_keep_mask(0, M, K, 0.0).all()
    assert not reference.dropout_keep_mask(0, M, K, 1.0).any()


@pytest.mark.parametrize("p", PROBABILITIES)
def test_keep_rate(p):
    mask = reference.dropout_keep_mask(123, 2048, 2048, p)
    rate = 1 - dropout_threshold(p) / DROPOUT_LEVELS
    assert z_score(int(mask.sum()), mask.numel(), rate) < 4


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_keep_rate_of_every_lane(p):
    mask = reference.dropout_keep_mask(7, 4096, 128, p).reshape(4096, 16, 8)
    kept = mask.sum((0, 1))  # the 8 lanes of a block are different bits of its words
    assert max(z_score(int(n), mask[..., 0].numel(), 1 - p) for n in kept) < 4.5


def test_higher_p_drops_more_of_the_same():
    low, high = (reference.dropout_keep_mask(3, M, K, p) for p in (0.1, 0.4))
    assert not (high & ~low).any()


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("distance", [1, 2, 4, 8])
def test_neighbours_are_independent(p, distance):
    mask = reference.dropout_keep_mask(5, M, K, p)
    assert correlation(mask[:, distance:], mask[:, :-distance]) < 4.5
    assert correlation(mask[distance:], mask[:-distance]) < 4.5
    assert correlation(mask[distance:, distance:], mask[:-distance, :-distance]) < 4.5


@pytest.mark.parametrize(
    ("one", "other"),
    [(0, 1), (5, 6), (2**31 - 1, 2**31), (0, 2**32), (0, -1), (7, 7 << 32), (1234, 987654321)],
)
def test_seeds_are_independent(one, other):
    masks = [reference.dropout_keep_mask(s, M, K, 0.5) for s in (one, other)]
    assert correlation(*masks) < 4.5


def test_seed_and_row_do_not_mix():
    # A seed that were added to the counter would give shifted copies of one mask.
    first, second = (reference.dropout_keep_mask(s, M, K, 0.5) for s in (10, 11))
    assert correlation(first[1:], second[:-1]) < 4.5
    assert correlation(first[:-1], second[1:]) < 4.5
    assert correlation(first[:, 8:], second[:, :-8]) < 4.5


def test_draws_are_uniform():
    # Masks at rising p nest, so the differences of their counts are a histogram of the draws.
    bins, total = 64, 1024 * 1024
    kept = [
        int(reference.dropout_keep_mask(17, 1024, 1024, i / bins).sum()) for i in range(bins + 1)
    ]
    counts = [a - b for a, b in itertools.pairwise(kept)]
    assert sum(counts) == total
    expected = total / bins
    chi_square = sum((n - expected) ** 2 / expected for n in counts)
    # 63 degrees of freedom: mean 63, standard deviation 11.2.
    assert abs(chi_square - (bins - 1)) < 4.5 * math.sqrt(2 * (bins - 1))


def test_a_part_of_the_rows():
    whole = reference.dropout_keep_mask(7, 20, 27, 0.4)
    assert torch.equal(reference.dropout_keep_mask(7, 5, 27, 0.4, first_row=12), whole[12:17])
