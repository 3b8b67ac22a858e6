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


def run(kernel, x, size=8, factor=2.0, flag=True, block=64, grid=(3,)):
    # Options in another order than the kernel's, with a launch option between them.
    launching.launch(kernel, grid, DEVICE, x, size, factor, BLOCK=block, num_warps=4, FLAG=flag)


def test_second_launch_is_direct_and_in_the_kernels_order(kernel):
    x, y = torch.empty(64), torch.empty(64)
    run(kernel, x)
    run(kernel, y, factor=3.0, grid=(5, 2))
    assert len(kernel.analysed) == 1
    (direct,) = kernel.direct
    assert direct[:9] == (5, 2, 1, 77, "function", "packed", None, None, None)
    assert direct[9] is y
    assert direct[10:] == (8, 3.0, True, 64)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"size": 1}, id="one"),
        pytest.param({"size": 7}, id="not-a-multiple"),
        pytest.param({"size": 2**40}, id="wide"),
        pytest.param({"flag": False}, id="constexpr"),
        pytest.param({"block": 128}, id="block"),
        pytest.param({"factor": torch.empty(())}, id="tensor-for-float"),
        pytest.param({"x": torch.empty(64, dtype=torch.float16)}, id="dtype"),
        pytest.param({"x": torch.empty(65)[1:]}, id="alignment"),
        pytest.param({"x": None}, id="none"),
    ],
)
def test_what_triton_specialises_on_is_analysed_again(kernel, change):
    run(kernel, torch.empty(64))
    run(kernel, **{"x": torch.empty(64), **change})
    assert len(kernel.analysed) == 2
    assert not kernel.direct


def test_two_kernels_do_not_share_an_entry(kernel):
    other, x = FakeKernel(), torch.empty(64)
    run(kernel, x)
    run(other, x)
    assert len(kernel.analysed) == len(other.analysed) == 1


def test_a_profilers_hook_sees_every_launch(kernel, monkeypatch):
    hook = types.SimpleNamespace(calls=[print])
    monkeypatch.setattr(launching.knobs.runtime, "launch_enter_hook", hook)
    x = torch.empty(64)
    run(kernel, x)
    run(kernel, x)
    assert len(kernel.analysed) == 2


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
    run(kernel, torch.empty(64))
    assert len(kernel.analysed) == 1
    assert current == [1]


def test_the_table_stays_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launching, "_MAX_KERNELS", 2)
    x = torch.empty(64)
    for size in range(2, 8):
        run(kernel, x, size=size)
        assert len(launching._compiled) <= 2
    run(kernel, x, size=7)
    assert len(kernel.analysed) == 6, "the last one is still there"


def test_descriptor_equals_tritons_own():
    x = torch.empty(64, 32)
    ours = launching.descriptor(x, [16, 32])
    theirs = launching.TensorDescriptor.from_tensor(x, [16, 32])
    assert ours.base is theirs.base
    # Read as the launcher reads them: a field that a newer Triton adds has its default on the class.
    names = [field.name for field in dataclasses.fields(theirs) if field.name != "base"]
    assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}
