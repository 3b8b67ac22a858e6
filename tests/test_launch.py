"""The table of compiled kernels: what shares an entry, what does not, and what a launch passes on."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

launching = pytest.importorskip("fastlora.kernels.launch", reason="needs Triton")
DEVICE = torch.device("cuda", 0)  # named only: nothing is launched


class FakeKernel:
    """A jitted function of ``(x_ptr, size, factor, FLAG, BLOCK)`` that notes how it is run."""

    arg_names = ("x_ptr", "size", "factor", "FLAG", "BLOCK")

    def __init__(self):
        self.analysed, self.direct = [], []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.analysed.append((grid, args, options))
            return types.SimpleNamespace(
                run=lambda *a: self.direct.append(a), function="function", packed_metadata="packed"
            )

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    return FakeKernel()


def plan(kernel, size=8, flag=True, block=64, grid=(3,)):
    # Options in another order than the kernel's, with a launch option between them.
    return launching.Launch(kernel, grid, DEVICE, size, BLOCK=block, num_warps=4, FLAG=flag)


X = torch.empty(64)


def test_second_launch_is_direct_and_in_the_kernels_order(kernel):
    y, launch = torch.empty(64), plan(kernel, grid=(5, 2))
    launch(X, 2.0)
    launch(y, 3.0)
    ((grid, args, options),) = kernel.analysed
    assert grid == (5, 2, 1)
    assert args[0] is X
    assert args[1:] == (2.0, 8)
    assert options == {"BLOCK": 64, "num_warps": 4, "FLAG": True}
    (direct,) = kernel.direct
    assert direct[:9] == (5, 2, 1, 77, "function", "packed", None, None, None)
    assert direct[9] is y
    assert direct[10:] == (3.0, 8, True, 64)


def test_another_shape_of_the_same_kind_is_direct_at_once(kernel):
    plan(kernel, size=32)(X, 2.0)
    plan(kernel, size=48, grid=(7,))(X, 2.0)
    assert len(kernel.analysed) == 1
    (direct,) = kernel.direct
    assert direct[0] == 7
    assert direct[10:] == (2.0, 48, True, 64)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"size": 1}, id="one"),
        pytest.param({"size": 7}, id="not-a-multiple"),
        pytest.param({"size": 2**40}, id="wide"),
        pytest.param({"size": 2**63}, id="unsigned"),
        pytest.param({"flag": False}, id="constexpr"),
        pytest.param({"block": 128}, id="block"),
        pytest.param({"factor": torch.empty(())}, id="tensor-for-float"),
        pytest.param({"x": torch.empty(64, dtype=torch.float16)}, id="dtype"),
        pytest.param({"x": torch.empty(65)[1:]}, id="alignment"),
        pytest.param({"x": None}, id="none"),
    ],
)
def test_what_triton_specialises_on_is_analysed_again(kernel, change):
    arguments = {"x": X, "factor": 2.0}
    plan(kernel, size=16)(*arguments.values())
    arguments |= {name: change[name] for name in arguments if name in change}
    sizes = {name: value for name, value in change.items() if name not in arguments}
    plan(kernel, **{"size": 16, **sizes})(*arguments.values())
    assert len(kernel.analysed) == 2
    assert not kernel.direct


def test_a_plan_tells_its_arguments_apart(kernel):
    launch = plan(kernel)
    for x in (X, X.half(), X, X.half()):
        launch(x, 2.0)
    assert len(kernel.analysed) == len(kernel.direct) == 2


def test_two_kernels_do_not_share_an_entry(kernel):
    other = FakeKernel()
    plan(kernel)(X, 2.0)
    plan(other)(X, 2.0)
    assert len(kernel.analysed) == len(other.analysed) == 1


def test_a_profilers_hook_sees_every_launch(kernel, monkeypatch):
    hook = types.SimpleNamespace(calls=[print])
    monkeypatch.setattr(launching.knobs.runtime, "launch_enter_hook", hook)
    launch = plan(kernel)
    for _ in range(3):
        launch(X, 2.0)
    assert len(kernel.analysed) == 3


def test_another_device_is_made_current(kernel, monkeypatch):
    current = [1]

    class Switch:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Switch)
    plan(kernel)(X, 2.0)
    assert len(kernel.analysed) == 1
    assert current == [1]


def test_the_table_stays_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launching, "_MAX_COMPILED", 2)
    for block in (16, 32, 64, 128, 256):
        plan(kernel, block=block)(X, 2.0)
        assert len(launching._compiled) <= 2
    plan(kernel, block=256)(X, 2.0)
    assert len(kernel.analysed) == 5, "the last one is still there"


def test_plans_are_kept_until_cleared():
    made = []

    @launching.cached_plan
    def make(size):
        made.append(size)
        return size

    assert [make(3), make(3), make(4)] == [3, 3, 4]
    assert made == [3, 4]
    launching.clear_plans()
    assert make(3) == 3
    assert made == [3, 4, 3]


def test_descriptor_equals_tritons_own():
    x = torch.empty(64, 32)
    ours = launching.descriptor(x, [16, 32])
    theirs = launching.TensorDescriptor.from_tensor(x, [16, 32])
    assert ours.base is theirs.base
    # Read as the launcher reads them: a field that a newer Triton adds has its default on the class.
    names = [field.name for field in dataclasses.fields(theirs) if field.name != "base"]
    assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}
