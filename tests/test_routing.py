"""Routing: which rows use which adapter, against plain Python; tables of fixed size, updated in place.

Where there is no GPU the kernels run in the interpreter, called as a GPU calls them.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlora
from fastlora import dispatch, routing_ops
from fastlora.adapters import Routing
from fastlora.kernels.config_multi import ROUTE_ROWS, route_block
from fastlora.routing_ops import NO_ADAPTER, TABLES, build_table, sort_rows, table_shape

if dispatch.HAS_TRITON:
    from fastlora.kernels import launch, route_tables
    from fastlora.kernels.route_rows import lora_route_rows
    from fastlora.kernels.route_tables import lora_route_tables, makes_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs Triton")
KEYS = (*TABLES, *((kind, block) for kind in ("blocks", "tiles") for block in (1, 4, 16)))

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
    check_tables(fastlora.route(torch.tensor(ids, device=DEVICE), L), ids, L)


@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_update_writes_the_same_tables_in_place(L, M, data):
    rows = st.lists(st.integers(-1, L - 1), min_size=M, max_size=M)
    first, second = data.draw(rows), data.draw(rows)
    routing = fastlora.route(torch.tensor(first, device=DEVICE), L)
    check_tables(routing, first, L)
    tables = [routing.ids, routing.order, routing.sorted_ids, *routing._tables.values()]
    addresses = [t.data_ptr() for t in tables]
    assert routing.update_(torch.tensor(second)) is routing
    check_tables(routing, second, L)
    tables = [routing.ids, routing.order, routing.sorted_ids, *routing._tables.values()]
    assert [t.data_ptr() for t in tables] == addresses, "a captured graph reads these addresses"


def test_the_callers_ids_may_be_overwritten():
    ids = torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE)
    routing = fastlora.route(ids, 2)
    ids.zero_()
    check_tables(routing, [1, 0, 1], 2)


def test_no_rows():
    routing = fastlora.route(torch.empty(0, dtype=torch.int64, device=DEVICE), 3)
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


# The kernels themselves.


def filled(*shape):
    return torch.full(shape, 99, dtype=torch.int32, device=DEVICE)


def sorted_by_kernel(ids, L):
    """``valid``, and ``ids``, ``order`` and ``sorted_ids``."""
    rows = tuple(filled(len(ids)) for _ in range(3))
    return lora_route_rows(ids, L, rows), rows


def routed_by_kernels(ids, L, keys=KEYS):
    valid, (own, order, sorted_ids) = sorted_by_kernel(ids, L)
    assert valid.item()
    tables = [filled(*table_shape(*key, len(ids), L)) for key in keys]
    lora_route_tables(keys, own, sorted_ids, L, tables)
    return Routing(own, L, order, sorted_ids, _tables=dict(zip(keys, tables, strict=True)))


def check_against_torch(routing, ids, L):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_ops, "kernels_can_route", lambda ids: False)
        rows = sort_rows(ids.cpu(), L)
    for got, expected in zip((routing.ids, routing.order, routing.sorted_ids), rows, strict=True):
        assert got.dtype == torch.int32
        assert torch.equal(got.cpu(), expected)
    for key, table in routing._tables.items():
        assert torch.equal(table.cpu(), build_table(*key, rows[0], rows[2], L)), key


def draw(kind, M, L):
    """Ids of M rows, unsorted."""
    return {
        "base": torch.full((M,), NO_ADAPTER),
        "one": torch.full((M,), L - 1),
        "different": torch.randperm(M) % L,
        "mixed": torch.randint(-1, L, (M,)),
        "few": torch.randint(-1, min(L, 3), (M,)),
    }[kind]


def strided(ids, layout):
    """``ids`` as the device holds them: int32 or int64, dense or not."""
    dtype, columns = layout
    held = torch.full((len(ids), columns), 99, dtype=dtype, device=DEVICE)
    held[:, -1] = ids.to(DEVICE)
    return held[:, -1]


LAYOUTS = [(torch.int32, 1), (torch.int64, 1), (torch.int32, 3), (torch.int64, 2)]


@kernels
@settings(max_examples=20)
@given(batches, st.sampled_from(LAYOUTS))
def test_kernels_find_what_python_finds(batch, layout):
    ids, L = batch
    given_ids = strided(torch.tensor(ids), layout)
    check_tables(routed_by_kernels(given_ids, L), ids, L)


@kernels
@pytest.mark.parametrize("L", [1, 5, 2000])
@pytest.mark.parametrize("M", [1, 2, 63, 64, 65, 129, 300])
def test_kernels_find_what_torch_finds(monkeypatch, M, L):
    """Walking over the positions in short steps, as they do in long ones over many rows."""
    monkeypatch.setattr(route_tables, "route_chunk", lambda rows: 32)
    launch.clear_plans()
    kinds = ("base", "one", "different", "mixed", "few")
    for i, kind in enumerate(kinds if M < 100 else kinds[2:]):
        ids = strided(draw(kind, M, L), LAYOUTS[i % len(LAYOUTS)])
        check_against_torch(routed_by_kernels(ids, L, TABLES), ids, L)
    launch.clear_plans()


@kernels
@pytest.mark.parametrize("M", [700, 1025, 2049, 8192, ROUTE_ROWS])
def test_kernels_sort_many_rows(M):
    if DEVICE == "cpu" and M > 1025:
        pytest.skip("too slow in the interpreter")
    ids = draw("mixed", M, 40).to(DEVICE)
    keys = TABLES if DEVICE == "cuda" else [("tiles", 64)]
    check_against_torch(routed_by_kernels(ids, 40, keys), ids, 40)


@kernels
def test_ids_of_one_address():
    ids = torch.tensor([2], device=DEVICE).expand(70)
    check_tables(routed_by_kernels(ids, 4), [2] * 70, 4)


@kernels
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-2, 3, 2**31 - 1, -(2**31), 2**32, 2**40 + 1, -(2**62)])
def test_a_wrong_id_is_seen(dtype, wrong):
    if abs(wrong) > 2**31 and dtype == torch.int32:
        pytest.skip("no such id")
    for M, at in ((1, 0), (70, 0), (70, 37), (70, 69)):
        ids = torch.arange(M, dtype=dtype, device=DEVICE) % 3
        assert sorted_by_kernel(ids, 3)[0].item()
        ids[at] = wrong
        valid, rows = sorted_by_kernel(ids, 3)
        assert valid.dtype == torch.bool
        assert valid.shape == ()
        assert not valid.item()
        sizes = [math.prod(table_shape(*key, M, 3)) for key in TABLES]
        tables = [filled(size + 16) for size in sizes]
        lora_route_tables(TABLES, rows[0], rows[2], 3, tables)
        for size, table in zip(sizes, tables, strict=True):
            assert (table[size:] == 99).all(), "out of bounds"


def test_programs_fill_the_sms():
    assert [route_block(M, 132) for M in (1, 64, 4096, 8192, ROUTE_ROWS)] == [16, 16, 16, 32, 64]


@kernels
def test_tiles_that_the_kernel_leaves_to_torch():
    blocks = [block for block in range(300) if makes_table("tiles", block)]
    assert blocks == [1, 2, 4, 8, 16, 32, 64, 128]
    assert makes_table("blocks", 24)
    routing = fastlora.route(draw("mixed", 70, 5).to(DEVICE), 5)
    for block in (24, 256):
        expected = build_table("tiles", block, routing.ids, routing.sorted_ids, 5)
        assert torch.equal(routing.tile_slots(block), expected)


@contextlib.contextmanager
def as_on_a_gpu():
    """Routing by the kernels on any device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_ops, "kernels_can_route", lambda ids: ids.shape[0] > 0)
        yield


@kernels
@settings(max_examples=8)
@given(batches, st.randoms(use_true_random=False))
def test_update_by_the_kernels_is_in_place(batch, random):
    ids, L = batch
    with as_on_a_gpu():
        routing = fastlora.route(torch.tensor(ids, device=DEVICE), L).complete_()
        check_tables(routing, ids, L)
        tensors = [*routing.made()[1], *routing._complete]
        before = [(t.data_ptr(), t._version) for t in tensors]
        random.shuffle(ids)
        routing.update_(torch.tensor(ids, device=DEVICE))
        check_tables(routing, ids, L)
    after = [*routing.made()[1], *routing._complete]
    assert [t.data_ptr() for t in after] == [address for address, _ in before]
    assert all(t._version > version for t, (_, version) in zip(after, before, strict=True))
    for key, table in zip(TABLES, routing._complete, strict=True):
        expected = build_table(*key, routing.ids, routing.sorted_ids, L)
        assert torch.equal(table.view(expected.shape), expected)


@kernels
def test_update_with_what_the_routing_holds_itself():
    ids = draw("mixed", 300, 5)
    with as_on_a_gpu():
        routing = fastlora.route(ids.to(DEVICE), 5)
        routing.tile_slots(64)
        routing.update_(routing.sorted_ids)
        check_against_torch(routing, ids.sort().values, 5)
        routing.update_(routing.ids.view(-1))
        check_against_torch(routing, ids.sort().values, 5)


@kernels
def test_several_tables_take_one_launch(monkeypatch):
    launched, inside = [], []
    plain = launch.Launch.__call__

    def note(self, *args):
        if not inside:  # a launch that has found a compiled kernel calls itself
            launched.append(self._kernel.__name__)
        inside.append(self)
        plain(self, *args)
        inside.pop()

    monkeypatch.setattr(launch.Launch, "__call__", note)
    with as_on_a_gpu():
        routing = fastlora.route(draw("mixed", 40, 5).to(DEVICE), 5).complete_()
        routing.update_(routing.ids.clone())
        empty = fastlora.route(torch.empty(0, dtype=torch.int64, device=DEVICE), 5).complete_()
        empty.update_(empty.ids)
    assert launched == ["_lora_route_rows_kernel", "_lora_route_tables_kernel"] * 2


@kernels
def test_no_table_is_made_by_a_call_that_is_recorded(monkeypatch):
    ids = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(launch.recording, "tape", object())
    with pytest.raises(route_tables.CannotRecordError, match="a table of a routing"):
        lora_route_tables([("segments", 0)], ids, ids, 1, [filled(2)])


def test_torch_routes_where_the_kernels_do_not():
    ids = torch.zeros(3, dtype=torch.int64)
    assert not dispatch.kernels_can_route(ids)
    assert not dispatch.kernels_can_route(ids.to("meta"))


@pytest.mark.gpu
def test_who_routes_on_a_gpu(monkeypatch):
    ids = torch.randint(-1, 9, (ROUTE_ROWS + 1,), device="cuda")
    assert not dispatch.kernels_can_route(ids)
    many = fastlora.route(ids, 9).complete_()
    check_against_torch(many, ids, 9)
    with dispatch.force("eager"):
        expected = fastlora.route(ids[1:], 9).complete_()
    monkeypatch.setattr(routing_ops, "build_table", None)
    got = fastlora.route(ids[1:], 9).complete_()
    for name in ("ids", "order", "sorted_ids"):
        assert torch.equal(getattr(got, name), getattr(expected, name))
    for mine, other in zip(got._complete, expected._complete, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [3, 64, 1000, 5000])
def test_a_captured_routing_is_replayed_with_other_ids(M):
    ids = torch.zeros(M, dtype=torch.int64, device="cuda")

    def call():
        routing = fastlora.route(ids, 30)
        for block in (16, 64, 128):
            routing.block_starts(block)
            routing.tile_slots(block)
        routing.segment_starts()
        return routing

    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = call()
    for kind in ("mixed", "base", "different", "few"):
        ids.copy_(draw(kind, M, 30))
        graph.replay()
        check_against_torch(routing, ids, 30)


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_gpu():
    batches = [draw(kind, 300, 7).cuda() for kind in ("mixed", "few")]
    for ids in batches:
        fastlora.route(ids, 7).complete_().update_(ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        routing = fastlora.route(batches[0], 7).complete_()
        routing.block_starts(16)
        routing.update_(batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_against_torch(routing, batches[1], 7)
