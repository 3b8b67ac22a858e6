"""Numbers that stay on a device: made once, and never taken from a CUDA graph that reads them."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora import device_numbers
from fastlora.device_numbers import constants, filled


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(device_numbers, "_kept", {})
    monkeypatch.setattr(device_numbers, "_read_by_graphs", {})


@pytest.fixture
def capturing(monkeypatch):
    """Says to the module that a graph is captured, where it holds True."""
    now = [False]
    monkeypatch.setattr(device_numbers, "_is_capturing", lambda device: now[0])
    return now


def test_they_are_made_once(device):
    device = torch.device(device)
    one = constants((1.5, 2.0), torch.float32, device)
    assert one.tolist() == [1.5, 2.0]
    assert constants((1.5, 2.0), torch.float32, device) is one
    assert constants((1.5, 2.0), torch.float64, device).dtype == torch.float64
    assert filled(2.5, 3, device).tolist() == [2.5] * 3
    assert filled(2.5, 3, device) is filled(2.5, 3, device) is not filled(2.5, 4, device)
    with torch.inference_mode():
        assert not filled(7.0, 2, device).is_inference()


def test_what_a_graph_makes_is_its_own(device, capturing):
    device, capturing[0] = torch.device(device), True
    made = filled(1.0, 2, device)
    assert filled(1.0, 2, device) is not made
    capturing[0] = False
    assert filled(1.0, 2, device) is not made, (
        "a later call would read what a replay has yet to write"
    )


def test_what_a_graph_reads_is_not_dropped(device, capturing, monkeypatch):
    monkeypatch.setattr(device_numbers, "_MOST", 2)
    device = torch.device(device)
    read, other = filled(1.0, 2, device), filled(2.0, 2, device)
    capturing[0] = True
    assert filled(1.0, 2, device) is read
    capturing[0] = False
    for value in range(3, 9):
        filled(float(value), 2, device)
    assert len(device_numbers._kept) <= 2
    assert filled(1.0, 2, device) is read
    assert filled(2.0, 2, device) is not other


@pytest.mark.gpu
def test_a_scaling_that_a_graph_sees_first():
    x, weight = torch.randn(4, 64, device="cuda"), torch.randn(32, 64, device="cuda")
    stacks = torch.randn(2, 8, 64, device="cuda"), torch.randn(2, 32, 8, device="cuda")
    routing = fastlora.route(torch.tensor([0, 1, -1, 1], device="cuda"), 2)
    call = lambda scaling: fastlora.lora_linear_multi(  # noqa: E731
        x, weight, stacks, routing, scaling=scaling
    )
    with torch.cuda.stream(torch.cuda.Stream()):
        call(0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(3.0)
    expected = call(3.0)
    graph.replay()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(call(3.0), expected)
