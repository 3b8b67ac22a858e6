"""The product of many adapters whose tiles mostly have one of them, against its formula in fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_rounded, randn

import fastlora
from fastlora.autograd_multi import _tiles
from fastlora.kernels import multi_gemm, multi_gemm_ring
from fastlora.kernels.config_multi import MULTI_BLOCK_M, makes_pairs
from fastlora.kernels.multi_shrink import lora_multi_shrink

HAS_CUDA = torch.cuda.is_available()
BF16, F16 = torch.bfloat16, torch.float16  # the interpreter rounds fp16 rightly, and truncates bf16


@pytest.fixture(autouse=True)
def on_hopper():
    if HAS_CUDA and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the TMA variants run on sm_90")


@pytest.fixture
def rings(monkeypatch):
    """Whether each call of `lora_multi_gemm` went through the kernel under test."""
    found = []
    plain = multi_gemm.lora_multi_gemm_ring

    def noted(*args):
        y = plain(*args)
        found.append(y is not None)
        return y

    monkeypatch.setattr(multi_gemm, "lora_multi_gemm_ring", noted)
    return found


def stale(a, b, ranks):
    """What is past a rank, as a slot that held something else may have it."""
    for slot, r in enumerate(ranks):
        a[slot, r:], b[slot, :, r:] = float("nan"), float("inf")


def check(device, dtype, M, K, N, R, L, ids, ranks=None, bias=False, backward=False):
    """``y`` from x ``[M, K]``, or dx ``[M, K]`` from dy ``[M, N]``, and the same bits again."""
    x = randn(device, dtype, M, N if backward else K)
    weight = randn(device, dtype, N, K, scale=K**-0.5)
    a = randn(device, dtype, L, R, K, scale=K**-0.5)
    b = randn(device, dtype, L, N, R, scale=R**-0.5)
    added = randn(device, dtype, N) if bias else None
    scaling = torch.rand(L, device=device) + 0.5
    ids = torch.as_tensor(ids).to(device)
    held = None
    if ranks is not None:
        stale(a, b, ranks)
        held = torch.tensor(ranks, dtype=torch.int32, device=device)
    if backward:
        weight, a, b = weight.t(), b.transpose(1, 2), a.transpose(1, 2)
    routing = fastlora.route(ids, L)
    tiles = multi_gemm.multi_gemm_tiles(x, weight, R)
    assert tiles[0] == "tma"
    blocks = (routing.order, routing.sorted_ids, routing.block_starts(MULTI_BLOCK_M))
    table = _tiles(routing, tiles[0], tiles[1].BLOCK_M)
    s, _, none = lora_multi_shrink(x, a, scaling, held, blocks, MULTI_BLOCK_M)
    assert none is None
    assert not s[ids < 0].any()
    pair = None
    if makes_pairs(R, 2):
        again, _, pair = lora_multi_shrink(
            x, a, scaling, held, blocks, MULTI_BLOCK_M, tile_slots=table[1]
        )
        check_pair(pair, s, again, ids, table[1], [R] * L if ranks is None else ranks)

    def call(pair=pair):
        return multi_gemm.lora_multi_gemm(
            x, weight, s, b, held, table, tiles, added, pair=pair
        )  # fmt: skip

    y = call()
    assert_rounded(y, call(pair=None).double(), dtype)
    expected = x.double() @ weight.double().t()
    for slot in range(L):
        rows, r = ids == slot, R if ranks is None else ranks[slot]
        expected[rows] += s[rows, :r].double() @ b[slot, :, :r].double().t()
    expected = expected if added is None else expected + added.double()
    assert_rounded(y, expected, dtype)
    assert torch.equal(y, call())


def check_pair(pair, s, again, ids, slots, ranks):
    """s of each row at its adapter's place of the two first in the tile's list, and zeros elsewhere."""
    for row, slot in enumerate(ids.tolist()):
        r, listed = max(ranks[slot], 0) if slot >= 0 else 0, slots[row // 128].tolist()
        second = slot >= 0 and len(listed) > 1 and listed[1] == slot
        mine, other = pair[row + second * len(s)], pair[row + (not second) * len(s)]
        assert torch.equal(again[row, :r], s[row, :r])
        assert torch.equal(mine[:r], s[row, :r])
        assert not mine[r:].any()
        assert not other.any()


def in_blocks(M, L, rows):
    return torch.arange(M) // rows % L


def mostly_alike(M, L):
    """Tiles of one adapter, of several, of none, and of one or several beside rows without."""
    ids = in_blocks(M, L, 128)
    ids[128:256] = -1
    ids[300:340] = -1
    ids[400:600] = torch.arange(200) % (L + 1) - 1
    return ids


ROUTES = {
    "blocks": lambda M, L: in_blocks(M, L, 256),
    "borders": lambda M, L: in_blocks(M, L, 200),
    "random": lambda M, L: torch.arange(M) * 7 % (L + 1) - 1,
    "none": lambda M, L: torch.full((M,), -1),
    "all": mostly_alike,
}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("backward", [False, True])
def test_routes(device, rings, dtype, route, backward):
    ids = ROUTES[route](770, 5)
    check(device, dtype, 770, 136, 264, 16, 5, ids, bias=not backward, backward=backward)
    assert all(rings) and rings


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("backward", [False, True])
def test_tiles_of_sorted_rows(device, rings, monkeypatch, route, backward):
    """Where tiles have more than a few adapters, which is one here; K and N end inside of a step."""
    monkeypatch.setattr(multi_gemm_ring, "MULTI_GATHER_ABOVE", 1)
    ids, ranks = ROUTES[route](770, 7), [16, 3, 0, 8, 13, 16, 1]
    check(device, F16, 770, 136, 264, 16, 7, ids, ranks, bias=not backward, backward=backward)
    assert all(rings) and rings


def test_rows_are_sorted_where_most_tiles_have_many_adapters(device, monkeypatch):
    """The wrong table of sorted tiles shows whether it is read."""
    M, K, N, R, L = 128 * 4, 64, 256, 8, 40
    x, weight = randn(device, F16, M, K), randn(device, F16, N, K)
    b = randn(device, F16, L, N, R)
    s = torch.ones(M, R, device=device, dtype=F16)
    how = multi_gemm.multi_gemm_tiles(x, weight, R)

    def call(routing, sorted_tiles):
        tiles = (*_tiles(routing, how[0], how[1].BLOCK_M)[:3], sorted_tiles)
        return multi_gemm.lora_multi_gemm(x, weight, s, b, None, tiles, how)

    for many in range(5):
        ids = in_blocks(M, L, 128)
        ids[: 128 * many] = torch.arange(128 * many) % (multi_gemm_ring.MULTI_GATHER_ABOVE + 1)
        routing = fastlora.route(ids.to(device), L)
        right = routing.sorted_tile_slots(how[1].BLOCK_M)
        same = torch.equal(call(routing, right), call(routing, torch.full_like(right, -1)))
        assert same == (many <= 2), many


def test_rows_whose_end_is_no_vector(device, rings, monkeypatch):
    """x and the weight are columns of wider tensors, as TMA can still describe them."""
    monkeypatch.setattr(multi_gemm_ring, "MULTI_GATHER_ABOVE", 1)
    M, K, N, R, L = 300, 75, 136, 8, 5
    x, weight = randn(device, F16, M, 80), randn(device, F16, N, 80)
    x[:, K:], weight[:, K:] = float("nan"), float("nan")
    x, weight = x[:, :K], weight[:, :K]
    a, b = randn(device, F16, L, R, K, scale=K**-0.5), randn(device, F16, L, N, R)
    for ids in (torch.arange(M) % L, in_blocks(M, L, 128)):
        ids = ids.to(device)
        y = fastlora.lora_linear_multi(x, weight, (a, b), ids)
        s = torch.einsum("mk,mrk->mr", x.double(), a[ids].double())
        update = torch.einsum("mr,mnr->mn", s.to(F16).double(), b[ids].double())
        assert_rounded(y, x.double() @ weight.double().t() + update, F16)
    assert rings == [True] * 2


@pytest.mark.parametrize("R", [8, 16, 24, 64, 136])
@pytest.mark.parametrize("backward", [False, True])
def test_ranks(device, rings, R, backward):
    M, L = 770, 5
    check(device, F16, M, 72, 520, R, L, mostly_alike(M, L), backward=backward)
    assert all(rings) and rings


@pytest.mark.parametrize("R", [8, 16, 64, 136])
@pytest.mark.parametrize("route", ["all", "borders", "random"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_stale_rest_of_a_slot(device, rings, R, route, backward):
    """Ranks that TMA can begin at and ranks that it cannot, an empty slot, and a full one."""
    M, L = 770, 6
    ranks = [R, min(3, R), 0, 8, R - 3, max(8, R // 16 * 8)]
    check(device, F16, M, 72, 264, R, L, ROUTES[route](M, L), ranks, backward=backward)
    assert all(rings) and rings


@pytest.mark.parametrize("route", ["all", "random"])
@pytest.mark.parametrize("backward", [False, True])
def test_equal_ranks_below_what_a_slot_can_hold(device, rings, route, backward):
    """No slot's own rank is read then, and what is past it neither."""
    ids = ROUTES[route](770, 5)
    check(device, F16, 770, 72, 264, 24, 5, ids, [8] * 5, backward=backward)
    assert all(rings) and rings


@pytest.mark.parametrize("backward", [False, True])
def test_more_tiles_than_a_program_finds_at_once(device, backward):
    M, L = 128 * (150 if HAS_CUDA else 5), 3
    wide = 4104
    K, N = (wide, 64) if backward else (64, wide)
    check(device, F16, M, K, N, 8, L, ROUTES["all"](M, L), backward=backward)


def test_one_slot(device, rings):
    check(device, F16, 390, 72, 264, 16, 1, torch.arange(390) % 2 - 1)
    check(device, F16, 390, 72, 264, 16, 1, torch.zeros(390, dtype=torch.int64), [5])
    assert rings == [True] * 6


@pytest.mark.parametrize("backward", [False, True])
def test_a_slot_is_a_part_of_a_wider_one(device, rings, backward):
    """A pool with room for a larger rank, of which the first ranks are shown."""
    M, K, N, R, L = 770, 72, 264, 16, 3
    x, weight = randn(device, F16, M, N if backward else K), randn(device, F16, N, K)
    pool_a, pool_b = randn(device, F16, L, 32, K), randn(device, F16, L, N, 32)
    a, b = pool_a[:, 8 : 8 + R], pool_b[:, :, 8 : 8 + R]
    a[:], b[:] = a / 8, b / 8
    if backward:
        weight, b = weight.t(), a.transpose(1, 2)
    routing = fastlora.route(mostly_alike(M, L).to(device), L)
    s = randn(device, F16, M, R)
    s[routing.ids < 0] = 0
    tiles = multi_gemm.multi_gemm_tiles(x, weight, R)
    table = _tiles(routing, tiles[0], tiles[1].BLOCK_M)
    y = multi_gemm.lora_multi_gemm(x, weight, s, b, None, table, tiles)
    expected = x.double() @ weight.double().t()
    for slot in range(L):
        rows = routing.ids == slot
        expected[rows] += s[rows].double() @ b[slot].double().t()
    assert_rounded(y, expected, F16)
    assert rings == [True]


@pytest.mark.parametrize("R", [1, 3, 12])
def test_ranks_that_tma_cannot_describe(device, rings, R):
    check(device, F16, 390, 72, 264, R, 3, in_blocks(390, 3, 128))
    assert not any(rings) and rings


def test_ids_that_change_in_place(device):
    """As under the replay of a CUDA graph: the same tensors, other tiles of one adapter."""
    M, K, N, R, L = 390, 72, 264, 8, 3
    x, weight = randn(device, F16, M, K), randn(device, F16, N, K)
    a, b = randn(device, F16, L, R, K, scale=K**-0.5), randn(device, F16, L, N, R)
    routing = fastlora.route(in_blocks(M, L, 128).to(device), L)
    for ids in (in_blocks(M, L, 128), torch.arange(M) % L, torch.full((M,), -1)):
        ids = ids.to(device)
        routing.update_(ids)
        y = fastlora.lora_linear_multi(x, weight, (a, b), routing)
        expected = x.double() @ weight.double().t()
        for slot in range(L):
            s = x[ids == slot].double() @ a[slot].double().t()
            expected[ids == slot] += s @ b[slot].double().t()
        assert_rounded(y, expected, F16)
