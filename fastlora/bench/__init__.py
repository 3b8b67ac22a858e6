"""The benchmark suite: cases, providers, a timing core, results on disk, a report and a comparison.

``python -m fastlora bench`` runs it. A provider of your own is a small file, see docs/benchmarks.md.
"""

from fastlora.bench import model_providers, serve_providers, train_providers  # they register
from fastlora.bench.problems import ServeProblem, ServeSet, TrainProblem
from fastlora.bench.registry import (
    Layer,
    LoraModel,
    ModelProvider,
    ServeProvider,
    TrainProvider,
    providers_of,
    register,
)

__all__ = [
    "Layer",
    "LoraModel",
    "ModelProvider",
    "ServeProblem",
    "ServeProvider",
    "ServeSet",
    "TrainProblem",
    "TrainProvider",
    "model_providers",
    "providers_of",
    "register",
    "serve_providers",
    "train_providers",
]
