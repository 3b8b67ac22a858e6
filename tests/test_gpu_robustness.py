"""What only a GPU can show: above 2^31 elements, CUDA graphs, streams, and memory that runs out in backward.

The checks of the large tensors themselves are tried on small ones wherever there is no GPU.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch._inductor.cudagraph_trees
from torch._dynamo.utils import counters

import fastlora
from fastlora import reference

pytest.importorskip("triton")

BF16, F32 = torch.bfloat16, torch.float32
GIB = 2**30
SEED, P, SCALING = 11, 0.25, 1.5


def need_memory(gib):
    """Skip unless so much of the GPU's memory is free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.0f}")


def near(got, exact, tolerance, name):
    assert got.shape == exact.shape, name
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error, exact = (got.double() - exact).abs(), exact.abs()
    for measure, slack in ((torch.linalg.vector_norm, 1), (torch.amax, 4)):
        e, limit = measure(error), slack * tolerance * measure(exact)
        assert e <= limit, f"{name}: {measure.__name__} of error {e:.3g}, limit {limit:.3g}"


# Tensors above 2^31 elements, or small ones for the same checks.

KINDS = ("single", "multi", "merged")


def large_problem(kind, M, K, N, R, dtype, device):
    """The arguments of a call of a kind, and dy; every random number drawn on the device."""

    def draw(*shape, scale=1.0):
        return torch.randn(shape, device=device, dtype=dtype) * scale

    values = {"x": draw(M, K), "weight": draw(N, K, scale=K**-0.5), "dy": draw(M, N)}
    if kind == "single":
        A, B = draw(R, K, scale=K**-0.5), draw(N, R, scale=R**-0.5)
    elif kind == "multi":
        A, B = draw(3, R, K, scale=K**-0.5), draw(3, N, R, scale=R**-0.5)
        values["ids"] = torch.randint(-1, 3, (M,), device=device)
    else:  # the first quarter and the last half of the outputs
        A, B = draw(2 * R, K, scale=K**-0.5), draw(N // 4 + N // 2, R, scale=R**-0.5)
    return {**values, "lora_A": A, "lora_B": B}


def call_of(kind, v, x, A, B):
    N = v["weight"].shape[0]
    if kind == "single":
        return fastlora.lora_linear(x, v["weight"], A, B, scaling=SCALING, dropout_p=P)
    if kind == "multi":
        return fastlora.lora_linear_multi(
            x, v["weight"], (A, B), v["ids"], scaling=SCALING, dropout_p=P
        )
    return fastlora.lora_merged_linear(
        x, v["weight"], A, B, widths=(N // 4, N // 4, N // 2), enable_lora=(True, False, True),
        scaling=SCALING, dropout_p=P,
    )  # fmt: skip


def as_stack(kind, v):
    """The adapters as ``[L, R, K]`` and ``[L, N, R]`` in fp64, and the slot of each row."""
    A, B, N = v["lora_A"].double(), v["lora_B"].double(), v["weight"].shape[0]
    if kind == "multi":
        return A, B, v["ids"]
    ids = torch.zeros(len(v["x"]), dtype=torch.int64, device=A.device)
    if kind == "merged":  # B_g in the rows and the ranks of slice g, zeros elsewhere
        R, dense = B.shape[1], B.new_zeros(N, 2 * B.shape[1])
        dense[: N // 4, :R], dense[N - N // 2 :, R:] = B[: N // 4], B[N // 4 :]
        B = dense
    return A[None], B[None], ids


def keep_scaled(seed, first, last, K, device):
    keep = reference.dropout_keep_mask(seed, last - first, K, P, device, first_row=first)
    return keep / (1 - P)


def check_large(kind, M, K, N, R, dtype, device, tolerance, chunk=16384):
    """y and dx of some rows, the last among them, and dA and dB of all, against fp64."""
    v = large_problem(kind, M, K, N, R, dtype, device)
    x, a, b = (v[n].requires_grad_() for n in ("x", "lora_A", "lora_B"))
    torch.manual_seed(SEED)
    y = call_of(kind, v, x, a, b)
    dx, da, db = torch.autograd.grad(y, (x, a, b), v["dy"])
    torch.manual_seed(SEED)
    seed = reference.draw_seed(x.device)

    with torch.no_grad():
        A, B, ids = as_stack(kind, v)
        weight = v["weight"].double()
        border = min(2**31 // K, M // 2)
        for first, last in ((0, 64), (border - 32, border + 32), (M - 64, M)):
            first, last = max(first, 0), min(last, M)
            rows = slice(first, last)
            scale = keep_scaled(seed, first, last, K, x.device)
            x_r, dy_r = x[rows].double(), v["dy"][rows].double()
            y_r, dx_r = x_r @ weight.t(), dy_r @ weight
            for slot in range(len(A)):
                on = (ids[rows] == slot).double()[:, None] * SCALING
                y_r += on * (x_r * scale @ A[slot].t() @ B[slot].t())
                dx_r += scale * (on * (dy_r @ B[slot]) @ A[slot])
            near(y[rows], y_r, tolerance, f"y of rows from {first}")
            near(dx[rows], dx_r, tolerance, f"dx of rows from {first}")
        del y, dx, weight

        da_exact, db_exact = torch.zeros_like(A), torch.zeros_like(B)
        for first in range(0, M, chunk):
            last = min(first + chunk, M)
            dropped = x[first:last] * keep_scaled(seed, first, last, K, x.device)
            dropped, dy = dropped.double(), v["dy"][first:last].double()
            for slot in range(len(A)):
                on = (ids[first:last] == slot).double()[:, None] * SCALING
                da_exact[slot] += (on * (dy @ B[slot])).t() @ dropped
                db_exact[slot] += dy.t() @ (on * (dropped @ A[slot].t()))
        if kind == "merged":
            R, whole = b.shape[1], db_exact[0]
            db_exact = torch.cat([whole[: N // 4, :R], whole[N - N // 2 :, R:]])
        near(da, da_exact.view(da.shape), tolerance, "dA")
        near(db, db_exact.view(db.shape), tolerance, "dB")


@pytest.mark.parametrize("kind", KINDS)
def test_the_checks_of_large_tensors_on_small_ones(kind, device):
    check_large(kind, 200, 24, 40, 4, F32, device, 1e-5, chunk=64)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_rows_past_2_31_elements(kind):
    need_memory(40)
    check_large(kind, 600_000, 4096, 4096, 8, BF16, "cuda", 0.01)


@pytest.mark.gpu
def test_a_weight_of_more_than_2_31_elements():
    need_memory(40)
    M, K, N, R = 64, 4096, 530_000, 8
    v = large_problem("single", M, K, N, R, BF16, "cuda")
    x, a, b = (v[n].requires_grad_() for n in ("x", "lora_A", "lora_B"))
    y = fastlora.lora_linear(x, v["weight"], a, b, scaling=SCALING)
    dx, da, db = torch.autograd.grad(y, (x, a, b), v["dy"])
    with torch.no_grad():
        x64, A, s = x.double(), a.double(), SCALING * (x.double() @ a.double().t())
        for columns in (
            slice(0, 512),
            slice(2**31 // K - 256, 2**31 // K + 256),
            slice(N - 512, N),
        ):
            exact = x64 @ v["weight"][columns].double().t() + s @ b[columns].double().t()
            near(y[:, columns], exact, 0.01, f"y of columns from {columns.start}")
            near(db[columns], v["dy"][:, columns].double().t() @ s, 0.01, "dB")
        ds, dx_exact = torch.zeros_like(s), torch.zeros_like(x64)
        for first in range(0, N, 65536):
            dy = v["dy"][:, first : first + 65536].double()
            ds += SCALING * (dy @ b[first : first + 65536].double())
            dx_exact += dy @ v["weight"][first : first + 65536].double()
        near(dx, dx_exact + ds @ A, 0.01, "dx")
        near(da, ds.t() @ x64, 0.01, "dA")


@pytest.mark.gpu
def test_a_table_of_more_than_2_31_elements():
    need_memory(20)
    V, N, R = 530_000, 4096, 8
    weight = torch.randn(V, N, device="cuda", dtype=BF16)
    a = torch.randn(R, V, device="cuda", dtype=BF16).requires_grad_()
    b = torch.randn(N, R, device="cuda", dtype=BF16).requires_grad_()
    ids = torch.cat([torch.arange(V - 300, V), torch.arange(300)]).cuda()
    y = fastlora.lora_embedding(ids, weight, a, b, scaling=SCALING)
    dy = torch.randn_like(y)
    da, db = torch.autograd.grad(y, (a, b), dy)
    s = SCALING * a.detach()[:, ids].t().double()
    near(y, weight[ids].double() + s @ b.detach().double().t(), 0.01, "y")
    near(db, dy.double().t() @ s, 0.01, "dB")
    near(da[:, ids], (SCALING * (dy.double() @ b.detach().double())).t(), 0.01, "dA")
    assert not da[:, 300 : V - 300].any()


@pytest.mark.gpu
def test_merging_more_than_2_31_elements():
    from fastlora.kernels.lora_merge import lora_merge

    need_memory(20)
    N, K, R = 530_000, 4096, 8
    weight = torch.randn(N, K, device="cuda", dtype=BF16)
    a = torch.randn(R, K, device="cuda", dtype=BF16)
    b = torch.randn(N, R, device="cuda", dtype=BF16)
    blocks = [slice(0, 64), slice(2**31 // K - 32, 2**31 // K + 32), slice(N - 64, N)]
    exact = [weight[rows].double() + SCALING * (b[rows].double() @ a.double()) for rows in blocks]
    lora_merge(weight, a, b, SCALING, out=weight)
    for rows, expected in zip(blocks, exact, strict=True):
        near(weight[rows], expected, 0.01, f"rows from {rows.start}")


# CUDA graphs, streams, memory: small calls of every op.

OPS = ("linear", "group", "multi", "merged", "embedding", "dora")


def operation(kind, device, p=0.5):
    """A call without arguments, and the leaves whose gradients it has."""
    torch.manual_seed(0)
    x, weight = torch.randn(96, 64, device=device), torch.randn(80, 64, device=device) / 8
    a, b = torch.randn(8, 64, device=device) / 8, torch.randn(80, 8, device=device)
    if kind == "linear":
        leaves = [x, a, b]
        call = lambda: fastlora.lora_linear(x, weight, a, b, dropout_p=p)  # noqa: E731
    elif kind == "group":
        leaves, weights = [x, a, b], [weight, weight[:48]]

        def call():  # b is cut here: a cut from before requires_grad_ joins the graph when b is written to
            ys = fastlora.lora_linear_group(x, weights, [a, a], [b, b[:48]], dropout_p=p)
            return torch.cat(ys, 1)

    elif kind == "multi":
        a, b = a.view(2, 4, 64).clone(), b.view(80, 2, 4).transpose(0, 1).contiguous()
        routing = fastlora.route(torch.randint(-1, 2, (96,), device=device), 2)
        leaves = [x, a, b]
        call = lambda: fastlora.lora_linear_multi(  # noqa: E731
            x, weight, (a, b), routing, scaling=2.0, dropout_p=p
        )
    elif kind == "merged":
        b = b[:60, :4].contiguous()
        leaves = [x, a, b]
        call = lambda: fastlora.lora_merged_linear(  # noqa: E731
            x, weight, a, b, widths=(40, 20, 20), enable_lora=(True, False, True), dropout_p=p
        )
    elif kind == "embedding":
        ids, table = torch.randint(0, 64, (96,), device=device), torch.randn(64, 80, device=device)
        leaves = [a, b]
        call = lambda: fastlora.lora_embedding(ids, table, a, b)  # noqa: E731
    else:
        magnitude = torch.rand(80, device=device) + 0.5
        leaves = [x, a, b, magnitude]
        call = lambda: fastlora.dora_linear(x, weight, a, b, magnitude, dropout_p=p)  # noqa: E731
    return call, [t.requires_grad_() for t in leaves]


def step(call, leaves):
    y = call()
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def captured(function):
    """A CUDA graph of ``function`` and what it gives, as torch's documentation makes one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


def replays(graph, outputs, seed):
    """What three replays from a seed give."""
    torch.cuda.manual_seed(seed)
    found = []
    for _ in range(3):
        graph.replay()
        found.append([t.clone() for t in outputs])
    return found


@pytest.mark.parametrize("kind", OPS)
def test_the_small_calls_draw_as_they_should(kind, device):
    call, leaves = operation(kind, device)
    torch.manual_seed(3)
    first, second = step(call, leaves), step(call, leaves)
    torch.manual_seed(3)
    assert torch.equal(step(call, leaves)[0], first[0])
    assert torch.equal(second[0], first[0]) == (kind == "embedding")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", OPS)
def test_replays_of_a_cuda_graph_are_eager_steps(kind):
    """Forward and backward in a graph: what eager gives from the same generator state, replay by replay."""
    call, leaves = operation(kind, "cuda")
    graph, outputs = captured(lambda: step(call, leaves))
    replayed = replays(graph, outputs, seed=5)
    torch.cuda.manual_seed(5)
    eager = [step(call, leaves) for _ in replayed]
    for turn, (got, expected) in enumerate(zip(replayed, eager, strict=True)):
        for name, (mine, other) in enumerate(zip(got, expected, strict=True)):
            alike = [torch.allclose(mine, each[name], rtol=1e-3, atol=1e-3) for each in eager]
            note = f"replay {turn}, tensor {name}; is it that of eager step 0, 1, 2: {alike}"
            torch.testing.assert_close(
                mine, other, rtol=1e-4, atol=1e-4, msg=lambda text, note=note: f"{note}\n{text}"
            )
    if kind != "embedding":
        for one, other in itertools.combinations(replayed, 2):
            assert not torch.equal(one[0], other[0]), "every replay draws a mask of its own"


def masked(x, layers=1):
    """Calls whose y is dropout(x): the mask can be read off it, and off its gradient."""
    eye = torch.eye(x.shape[1], device=x.device)
    zero = torch.zeros_like(eye)
    return [fastlora.lora_linear(x, zero, eye, eye, dropout_p=0.5) for _ in range(layers)]


def masks_of(x):
    """The masks of two layers' forward and backward."""
    ys = masked(x, layers=2)
    return [t for y in ys for t in (y.detach() != 0, torch.autograd.grad(y.sum(), x)[0] != 0)]


def expected_masks(x):
    seeds = [reference.draw_seed(x.device) for _ in range(2)]
    keeps = [reference.dropout_keep_mask(s, *x.shape, 0.5, x.device) for s in seeds]
    return [keeps[0], keeps[0], keeps[1], keeps[1]]


def test_masks_can_be_read_off_the_results(device):
    x = torch.randn(40, 32, device=device).requires_grad_()
    torch.manual_seed(4)
    got = masks_of(x)
    torch.manual_seed(4)
    for mine, expected in zip(got, expected_masks(x), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.gpu
def test_masks_of_replays_are_those_of_the_reference():
    x = torch.randn(40, 32, device="cuda").requires_grad_()
    graph, outputs = captured(lambda: masks_of(x))
    replayed = replays(graph, outputs, seed=4)
    torch.cuda.manual_seed(4)
    for got in replayed:
        for mine, expected in zip(got, expected_masks(x), strict=True):
            assert torch.equal(mine, expected)
    drawn = [keep for masks in replayed for keep in (masks[0], masks[2])]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


@pytest.mark.gpu
def test_reduce_overhead_draws_a_mask_at_every_call():
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda x: masked(x)[0], mode="reduce-overhead", fullgraph=True)
    x = torch.randn(40, 32, device="cuda").requires_grad_()
    masks = []
    for _ in range(6):  # a warm-up, a recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        keep = y.detach() != 0
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx != 0, keep), "backward uses the mask of its forward"
        torch.testing.assert_close(dx, 2.0 * keep)
        assert 0.4 < keep.float().mean() < 0.6
        masks.append(keep.clone())
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = torch._inductor.cudagraph_trees.get_container(x.device.index).tree_manager
    assert manager is not None and any(manager.roots.values()), "CUDA graphs were recorded"
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", OPS)
def test_reduce_overhead_without_dropout_is_eager(kind):
    """The counterpart of the masks: values and gradients of recorded and replayed calls."""
    torch._dynamo.reset()
    call, leaves = operation(kind, "cuda", p=0.0)
    expected = step(call, leaves)
    compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        for got, value in zip(step(compiled, leaves), expected, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", OPS)
def test_work_follows_the_current_stream(kind):
    """The inputs arrive late on a side stream: a launch on any other stream would read NaN."""
    call, leaves = operation(kind, "cuda")
    torch.cuda.manual_seed(6)
    expected = step(call, leaves)  # compiles, too
    real = [t.detach().clone() for t in leaves]
    with torch.no_grad():
        for t in leaves:
            t.fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        with torch.no_grad():
            for t, value in zip(leaves, real, strict=True):
                t.copy_(value)
        torch.cuda.manual_seed(6)
        got = step(call, leaves)
    torch.cuda.current_stream().wait_stream(side)
    for mine, value in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", OPS)
def test_another_device_than_the_current_one(kind):
    results = []
    for device in ("cuda:0", "cuda:1"):  # their generators are seeded alike
        call, leaves = operation(kind, device)
        torch.manual_seed(6)
        results.append(step(call, leaves))
        assert all(t.device == torch.device(device) for t in results[-1])
    assert torch.cuda.current_device() == 0
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first.cpu(), second.cpu(), rtol=1e-5, atol=1e-5)


def peak_of(function):
    """What a call takes of the GPU's memory beside what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def memory_limit(headroom):
    """No more GPU memory than what is in use now and ``headroom`` bytes, holes in the cache included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + headroom) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.no_poison
@pytest.mark.parametrize("kind", KINDS)
def test_out_of_memory_in_backward_leaves_the_gradients(kind):
    """Less than its peak stops a backward, at one point of it or another."""
    need_memory(8)
    v = large_problem(kind, 65536, 4096, 4096, 8, BF16, "cuda")
    leaves = [v[n].requires_grad_() for n in ("x", "lora_A", "lora_B")]

    def forward():
        torch.cuda.empty_cache()  # or what is saved leaves large holes, which no limit counts
        torch.manual_seed(SEED)
        for t in leaves:  # from the step before
            t.grad = torch.ones_like(t)
        return call_of(kind, v, *leaves)

    expected = torch.autograd.grad(forward(), leaves, v["dy"])  # compiles, too
    y = forward()
    peak = peak_of(lambda: y.backward(v["dy"]))
    assert peak >= v["x"].nbytes, "dx at least"
    del y
    for share in (0, 0.004, 0.03, 0.125, 0.25, 0.5, 0.875):
        y = forward()
        headroom = int(share * peak)
        with memory_limit(headroom), pytest.raises(torch.OutOfMemoryError):
            y.backward(v["dy"])
        for t in leaves:
            assert (t.grad == 1).all(), f"a gradient was written with {headroom} bytes left"
        del y
    y = forward()
    for t in leaves:
        t.grad = None
    y.backward(v["dy"])
    for t, value in zip(leaves, expected, strict=True):
        assert torch.equal(t.grad, value)
