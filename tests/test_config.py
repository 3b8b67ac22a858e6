"""Launch heuristics: what holds for every shape, dtype and number of SMs."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlora.kernels import config
from fastlora.kernels.config import LaunchConfig, ReduceConfig, cdiv, rank_block, rank_step

SMALLEST_SHARED = 101_376  # bytes a program may have on sm_86, sm_89 and sm_120: 99 KB
HOPPER_SHARED = 232_448  # 227 KB

sizes = st.one_of(st.integers(1, 300), st.integers(1, 100_000))
ranks = st.integers(1, config.MAX_RANK)
itemsizes = st.sampled_from([2, 4])
sms = st.sampled_from([1, 20, 46, 84, 108, 114, 132, 148, 170])
ALL_RANKS = range(1, config.MAX_RANK + 1)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def check_launch(c: LaunchConfig | ReduceConfig) -> None:
    values = dataclasses.asdict(c)
    for name, value in values.items():
        assert isinstance(value, int), name
        assert value >= 1, name
        if name.startswith("BLOCK") or name in ("num_warps", "SUBTILES"):
            assert is_power_of_two(value), name
        if name.startswith("BLOCK"):
            assert 16 <= value <= 256, name  # tl.dot needs 16
    assert 1 <= c.num_warps <= 16
    assert 1 <= c.num_stages <= 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.num_warps = 1


@pytest.mark.parametrize(
    ("p", "levels"),
    [(0.0, 0), (2e-5, 0), (5e-5, 1), (0.1, 1638), (0.7, 11469), (0.99998, 16384), (1.0, 16384)],
)
def test_a_probability_is_rounded_to_the_nearest_level(p, levels):
    assert config.dropout_threshold(p) == levels
    kept = config.DROPOUT_LEVELS - levels
    assert config.keep_scale(p) == (config.DROPOUT_LEVELS / kept if kept else 0)


@pytest.mark.parametrize(("a", "b"), [(0, 4), (1, 4), (4, 4), (5, 4), (10**12, 3)])
def test_cdiv_rounds_up(a, b):
    assert cdiv(a, b) * b >= a > (cdiv(a, b) - 1) * b


def test_rank_block_is_the_least_power_of_two_that_holds_the_rank():
    for R in ALL_RANKS:
        block = rank_block(R)
        assert is_power_of_two(block)
        assert block >= max(R, 16)
        assert block == 16 or block < 2 * R


@pytest.mark.parametrize("itemsize", [2, 4])
def test_rank_steps_cover_the_rank(itemsize):
    for R in ALL_RANKS:
        step = rank_step(R, itemsize)
        assert is_power_of_two(step)
        assert step >= 16
        assert cdiv(R, step) * step >= R
        assert cdiv(R, step) * step <= rank_block(R)


@given(M=sizes, N=sizes, R=ranks | st.none(), itemsize=itemsizes, num_sms=sms)
def test_tma_tiles(M, N, R, itemsize, num_sms):
    c = config.gemm_tma_config(M, N, itemsize, num_sms, R)
    check_launch(c)
    assert c == config.gemm_tma_config(M, N, itemsize, num_sms, R)
    assert c.SUBTILES in (1, 2), "what store_tile can halve"
    assert c.BLOCK_K * itemsize == 128, "one swizzle atom"
    # A TMA box holds at most 256 elements a side, of 16 bytes at least in its last.
    for box in (c.BLOCK_M, c.BLOCK_N, c.BLOCK_K, c.BLOCK_N // c.SUBTILES):
        assert box <= 256
        assert box * itemsize >= 16
    ring = c.num_stages * (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K * itemsize
    assert ring <= HOPPER_SHARED
    accumulators = c.BLOCK_M * c.BLOCK_N // (c.num_warps * 32)
    assert accumulators <= 128, "half of a thread's registers"


@given(M=sizes, N=sizes, num_sms=sms)
def test_wide_tiles_only_where_they_fill_the_gpu(M, N, num_sms):
    c = config.gemm_tma_config(M, N, 2, num_sms)
    if c.BLOCK_N == 256:
        assert cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N) >= num_sms


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_pointer_tiles(itemsize, precision):
    c = config.gemm_pointer_config(itemsize, precision)
    check_launch(c)
    assert c == config.gemm_pointer_config(itemsize, precision)
    ring = c.num_stages * (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K * itemsize
    assert ring <= SMALLEST_SHARED


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("M", [1, 2048, 8192])
def test_shrink_tiles(M, itemsize, precision, dropout):
    for R in ALL_RANKS:
        c = config.shrink_config(M, R, itemsize, 132, precision, dropout)
        check_launch(c)
        masked = "64 rows would be a wgmma with its left operand in registers"
        assert c.BLOCK_M <= 32 or not dropout, masked
        assert c.BLOCK_M <= 32 or M == 8192, "too few programs"
        assert c.BLOCK_M <= 16 or not dropout or M == 8192 or R > 32 or itemsize == 4, "want warps"
        assert c.BLOCK_K % 8 == 0, "whole Philox blocks"
        # One stage of the ring is being multiplied while the others load.
        ring = (c.num_stages - 1) * (c.BLOCK_M + rank_block(R)) * c.BLOCK_K * itemsize
        assert ring <= SMALLEST_SHARED


def check_reduce(c: ReduceConfig, M: int, columns: int, R: int, itemsize: int, sms: int) -> None:
    check_launch(dataclasses.replace(c, row_splits=1))
    blocks = cdiv(M, c.BLOCK_M)
    assert 1 <= c.row_splits <= blocks
    # As the launchers split: whole row blocks to a split, no split without rows.
    rows = cdiv(blocks, c.row_splits) * c.BLOCK_M
    splits = cdiv(M, rows)
    assert splits <= c.row_splits
    assert splits * rows >= M > (splits - 1) * rows
    assert c.row_splits == 1 or c.row_splits * cdiv(columns, c.BLOCK_C) <= 4 * sms
    ring = (c.num_stages - 1) * c.BLOCK_M * (c.BLOCK_C + rank_block(R)) * itemsize
    assert ring <= HOPPER_SHARED


@given(M=sizes, N=sizes, R=ranks, itemsize=itemsizes, num_sms=sms)
def test_grad_b_splits_cover_the_rows(M, N, R, itemsize, num_sms):
    c = config.grad_b_config(M, N, R, itemsize, num_sms)
    assert c == config.grad_b_config(M, N, R, itemsize, num_sms)
    if c is not None:
        check_reduce(c, M, N, R, itemsize, num_sms)


@given(
    M=sizes,
    K=sizes,
    R=ranks,
    itemsize=itemsizes,
    num_sms=sms,
    precision=st.sampled_from(["tf32", "ieee"]),
    dropout=st.booleans(),
)
def test_grad_a_splits_cover_the_rows(M, K, R, itemsize, num_sms, precision, dropout):
    c = config.grad_a_config(M, K, R, itemsize, num_sms, precision, dropout)
    assert c == config.grad_a_config(M, K, R, itemsize, num_sms, precision, dropout)
    check_reduce(c, M, K, R, itemsize, num_sms)
    assert c.BLOCK_C % 8 == 0, "whole bytes of the packed mask"


def test_every_rank_has_a_grad_b():
    fused = [R for R in ALL_RANKS if config.grad_b_config(8192, 4096, R, 2, 132) is not None]
    assert fused == list(range(1, len(fused) + 1)), "one pass up to some rank, two passes above"


@pytest.mark.parametrize("M", [1, 64, 8192, 65536])
def test_partial_sums_stay_smaller_than_the_input(M):
    # dA's and dB's partial sums, fp32, against twice bf16 x or dy: scratch memory must not rule.
    for R in (1, 16, 32):
        for c in (
            config.grad_a_config(M, 4096, R, 2, 132),
            config.grad_a_config(M, 4096, R, 2, 132, dropout=True),
            config.grad_b_config(M, 4096, R, 2, 132),
        ):
            assert c is not None
            assert 4 * c.row_splits * R <= 2 * 2 * cdiv(M, c.BLOCK_M) * c.BLOCK_M


@given(R=ranks, itemsize=itemsizes, precision=st.sampled_from(["tf32", "ieee"]))
def test_dora_norm_tiles(R, itemsize, precision):
    c = config.dora_norm_config(itemsize, R, precision)
    check_launch(c)
    held = c.num_stages * rank_block(R) * c.BLOCK_K * 4  # rows of A, which may be fp32
    assert held <= SMALLEST_SHARED, "the ring of A"
    assert c.BLOCK_N * c.BLOCK_K // (c.num_warps * 32) <= 32, "four such tiles are in registers"


@given(M=sizes, N=sizes, itemsize=itemsizes, num_sms=sms)
def test_dora_grad_splits_cover_the_rows(M, N, itemsize, num_sms):
    c = config.dora_grad_config(M, N, itemsize, num_sms)
    check_launch(c)
    assert 1 <= c.row_splits <= cdiv(M, c.BLOCK_M)
    assert c.row_splits == 1 or c.row_splits * cdiv(N, c.BLOCK_C) <= 4 * num_sms
