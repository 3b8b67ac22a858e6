"""Routing: which rows use which adapter, against plain Python; tables of fixed size, updated in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastlora
from fastlora.routing_ops import NO_ADAPTER

batches = st.integers(1, 9).flatmap(
    lambda L: st.tuples(st.lists(st.integers(-1, L - 1), min_size=1, max_size=70), st.just(L))
)


def blocks_of(ids, block):
    """Positions in the sorted order at which a block of at most ``block`` rows of one adapter begins."""
    ordered, starts = sorted(ids), []
    for position, slot in enumerate(ordered):
        if slot >= 0 and (position - ordered.index(slot)) % block == 0:
            starts.append(position)
    return starts


def check_tables(routing, ids, L):
    M = len(ids)
    assert routing.ids.tolist() == ids
    assert routing.order.tolist() == sorted(range(M), key=lambda m: ids[m]), "stable"
    assert routing.sorted_ids.tolist() == sorted(ids)
    for block in (1, 4, 16):
        starts = routing.block_starts(block).tolist()
        expected = blocks_of(ids, block)
        assert len(starts) == min(M, -(-M // block) + L)
        assert starts == expected + [M] * (len(starts) - len(expected))
    segments = routing.segment_starts().tolist()
    expected = blocks_of(ids, M)
    assert len(segments) == min(M, L) + 1
    assert segments == expected + [M] * (len(segments) - len(expected))
    for block in (4, 16):
        tiles = routing.tile_slots(block).tolist()
        assert len(tiles) == -(-M // block)
        for t, slots in enumerate(tiles):
            here = sorted({slot for slot in ids[t * block : (t + 1) * block] if slot >= 0})
            assert slots == here + [NO_ADAPTER] * (min(block, L) - len(here))


@given(batches)
def test_tables_hold_what_python_finds(batch):
    ids, L = batch
    check_tables(fastlora.route(torch.tensor(ids), L), ids, L)


@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_update_writes_the_same_tables_in_place(L, M, data):
    rows = st.lists(st.integers(-1, L - 1), min_size=M, max_size=M)
    first, second = data.draw(rows), data.draw(rows)
    routing = fastlora.route(torch.tensor(first), L)
    check_tables(routing, first, L)
    tables = [routing.ids, routing.order, routing.sorted_ids, *routing._tables.values()]
    addresses = [t.data_ptr() for t in tables]
    assert routing.update_(torch.tensor(second)) is routing
    check_tables(routing, second, L)
    tables = [routing.ids, routing.order, routing.sorted_ids, *routing._tables.values()]
    assert [t.data_ptr() for t in tables] == addresses, "a captured graph reads these addresses"


def test_the_callers_ids_may_be_overwritten():
    ids = torch.tensor([1, 0, 1], dtype=torch.int32)
    routing = fastlora.route(ids, 2)
    ids.zero_()
    check_tables(routing, [1, 0, 1], 2)


def test_no_rows():
    routing = fastlora.route(torch.empty(0, dtype=torch.int64), 3)
    assert len(routing) == routing.block_starts(16).numel() == routing.tile_slots(16).numel() == 0
    assert routing.segment_starts().tolist() == [0]


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 1], TypeError, "adapter_ids must be a Tensor, got list"),
        (torch.zeros(2), TypeError, "adapter_ids must be int32 or int64, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"one dimension, got \(2, 2\)"),
        (torch.tensor([0, 4]), ValueError, "adapter_ids must be from -1 to 3, got 4"),
        (torch.tensor([-2, 0]), ValueError, "adapter_ids must be from -1 to 3, got -2"),
    ],
)
def test_wrong_ids(ids, error, message):
    with pytest.raises(error, match=message):
        fastlora.route(ids, 4)


def test_update_with_another_number_of_rows():
    routing = fastlora.route(torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match=r"must have shape \(2,\), as this routing, got \(3,\)"):
        routing.update_(torch.tensor([0, 1, 1]))
