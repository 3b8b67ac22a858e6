"""What autograd's users may do to every fused op: hooks, graphs of a backward, outputs changed in place."""

from __future__ import annotations

import pytest
import torch

import fastlora

pytest.importorskip("fastlora.kernels.lora_shrink", reason="needs Triton")

M, K, N, R = 6, 16, 24, 4
KINDS = pytest.mark.parametrize("kind", ["linear", "group", "merged", "dora", "embedding", "multi"])


@pytest.fixture(params=[0.0, 0.3], ids=["", "dropout"])
def dropout_p(request):
    return request.param


def case(kind, device, p=0.0):
    """A call of an op on three axes, and the tensors that need a gradient."""

    def draw(*shape):
        return torch.randn(shape, device=device)

    x, weight, a, b = draw(2, M // 2, K), draw(N, K), draw(R, K), draw(N, R)
    seed = torch.tensor(5, device=device)
    if kind == "group":
        b2, w2, a2 = draw(8, R), draw(8, K), draw(R, K)
        leaves = [x, a, b, a2, b2]

        def call():
            torch.manual_seed(1)
            return torch.cat(
                fastlora.lora_linear_group(
                    x, [weight, w2], [a, a2], [b, b2], scaling=[1.0, 2.0], dropout_p=p, seed=seed
                ),
                -1,
            )

    elif kind == "merged":
        a, b = draw(2 * R, K), draw(16, R)
        leaves = [x, a, b]

        def call():
            torch.manual_seed(1)
            return fastlora.lora_merged_linear(
                x, weight, a, b, widths=[8, 8, 8], enable_lora=[True, False, True],
                scaling=2.0, dropout_p=p,
            )  # fmt: skip

    elif kind == "dora":
        magnitude = torch.rand(N, device=device) + 0.5
        leaves = [x, a, b, magnitude]

        def call():
            torch.manual_seed(1)
            return fastlora.dora_linear(x, weight, a, b, magnitude, scaling=0.5, dropout_p=p)

    elif kind == "embedding":
        ids, table, a = torch.randint(9, (2, 5), device=device), draw(9, N), draw(R, 9)
        leaves = [a, b]

        def call():
            return fastlora.lora_embedding(ids, table, a, b, scaling=0.5)

    elif kind == "multi":
        a, b = draw(3, R, K), draw(3, N, R)
        ids = torch.tensor([2, 0], device=device)
        leaves = [x, a, b]

        def call():
            torch.manual_seed(1)
            return fastlora.lora_linear_multi(x, weight, (a, b), ids, scaling=0.5, dropout_p=p)

    else:
        leaves = [x, a, b]

        def call():
            return fastlora.lora_linear(x, weight, a, b, scaling=0.5, dropout_p=p, seed=seed)

    for leaf in leaves:
        leaf.requires_grad_()
    return call, leaves


def turned(t):
    """The same numbers in another layout."""
    if t.dim() < 2:
        spread = torch.stack([t, torch.full_like(t, 77)], -1)
        return spread[..., 0]
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


@KINDS
def test_hooks_may_change_the_layout_of_what_is_saved(kind, device, dropout_p):
    call, leaves = case(kind, device, dropout_p)
    expected = torch.autograd.grad(call().square().sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, turned):
        y = call()
    found = torch.autograd.grad(y.square().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        # Products of another layout round otherwise.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@KINDS
def test_a_graph_of_the_backward_is_made_and_not_differentiated(kind, device):
    call, leaves = case(kind, device)
    expected = torch.autograd.grad(call().square().sum(), leaves)
    found = torch.autograd.grad(call().square().sum(), leaves, create_graph=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="double backward"):
        sum(g.sum() for g in found).backward()


@KINDS
def test_batched_gradients_are_refused_in_words(kind, device):
    call, leaves = case(kind, device)
    y = call()
    with pytest.raises(RuntimeError, match=r"no vmap rule; .*force\('eager'\)"):
        torch.autograd.grad(y, leaves, torch.stack([y, y]), is_grads_batched=True)


@KINDS
@pytest.mark.parametrize("eager", [False, True], ids=["fused", "eager"])
def test_an_output_may_be_changed_in_place(kind, device, eager):
    """As the embeddings of a text are, where those of an image go in."""
    call, _ = case(kind, device)
    if eager:
        fused = call

        def call():
            with fastlora.dispatch.force("eager"):
                return fused()

    with torch.no_grad():
        y = call()
    image = torch.ones_like(y[:, :1], requires_grad=True)
    y[:, 1:2] = image
    y.sum().backward()
    assert torch.equal(image.grad, torch.ones_like(image))
    assert call().detach_().grad_fn is None
