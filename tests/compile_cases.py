"""What the tests of torch.compile share: a call in one graph, a training step, the graphs of AOTAutograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

no_recompilation = torch._dynamo.config.patch(error_on_recompile=True)


def compiled(
    function: Callable[..., Any], backend: str = "aot_eager", **options: Any
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """``function`` in one graph, and the counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def opcheck(op: Any, args: tuple[Any, ...]) -> None:
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def step(call: Callable[..., Tensor], model: nn.Module, x: Tensor, seed: int = 1) -> dict[str, Any]:
    """``y``, dx and the gradients of the parameters of one training step."""
    x = x.detach().requires_grad_(x.is_floating_point())
    model.zero_grad()
    torch.manual_seed(seed)
    y = call(x)
    y.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) >= 2
    return {"y": y.detach(), **({} if x.grad is None else {"x": x.grad}), **grads}


def check(
    call: Callable[..., Tensor],
    model: nn.Module,
    x: Tensor,
    seed: int = 1,
    tolerance: float = 1e-4,
    function: Callable[..., Tensor] | None = None,
) -> None:
    """A step of ``call`` gives what one of ``function`` gives, which is the model itself by default."""
    got, expected = step(call, model, x, seed), step(function or model, model, x, seed)
    assert got.keys() == expected.keys()
    assert_alike(got, expected, tolerance)


def assert_alike(got: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Both have a tensor, of one dtype, under the same names, or both have none."""
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            assert got[name].dtype == value.dtype, name
            torch.testing.assert_close(
                got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def graphs_of(function: Callable[..., Tensor], *args: Any) -> list[Any]:
    """The forward graph, and where there is one the backward graph, that AOTAutograd makes of a call."""
    found = []

    def note(graph: Any, _: Any) -> Any:
        found.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=note,
        bw_compiler=note,
        partition_fn=torch._functorch.partitioners.min_cut_rematerialization_partition,
    )
    y = torch.compile(function, backend=backend, fullgraph=True)(*args)
    if y.requires_grad:
        y.sum().backward()
    return found


def targets(graph: Any) -> list[str]:
    """What the nodes of a graph call."""
    return [str(node.target) for node in graph.graph.nodes]
