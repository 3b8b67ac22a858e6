"""The workload of a case, of whatever suite."""

from __future__ import annotations

import torch

from fastlora.bench.cases import Case, ServeCase, TrainCase
from fastlora.bench.models import ModelWorkload
from fastlora.bench.workloads import ServeWorkload, TrainWorkload, Workload


def make_workload(case: Case, device: torch.device, seed: int = 0) -> Workload:
    """The workload of a case.

    Args:
        case (Case): of any suite.
        device (torch.device): where to run.
        seed (int): of every random tensor. Default: 0.

    Returns:
        Workload: with its tensors on the device.
    """
    if isinstance(case, TrainCase):
        return TrainWorkload(case, device, seed)
    if isinstance(case, ServeCase):
        return ServeWorkload(case, device, seed)
    return ModelWorkload(case, device, seed)
