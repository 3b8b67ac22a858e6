"""What the tests of accelerated layers share: PEFT models of one layer, and the comparison with PEFT.

conftest makes it importable: importlib mode puts no test folder on sys.path.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.integrations import peft_layers

SEED = 77
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
IN, OUT, ROWS = 40, 24, (2, 9)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


class Net(nn.Module):
    """One linear that PEFT wraps, and one that it leaves."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.lin = linear
        self.head = nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin(x))


@dataclass(frozen=True)
class Precision:
    """dtypes of one run; autocast None is off."""

    base: torch.dtype
    adapters_fp32: bool = True
    autocast: torch.dtype | None = None
    x: torch.dtype | None = None

    @property
    def out(self) -> torch.dtype:
        return self.autocast or self.base


PRECISIONS = {
    "fp32": Precision(fp32),
    "bf16, fp32 adapters": Precision(bf16),
    "bf16, bf16 adapters": Precision(bf16, adapters_fp32=False),
    "bf16, fp32 adapters, autocast": Precision(bf16, autocast=bf16),
    "fp32, autocast bf16": Precision(fp32, autocast=bf16),
}


def make_model(
    precision: Precision = PRECISIONS["fp32"],
    *,
    conv1d: bool = False,
    base_bias: bool = True,
    device: str = "cpu",
    **config: Any,
) -> nn.Module:
    base = Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT, bias=base_bias)
    nn.init.normal_(base.weight, std=IN**-0.5)
    if base.bias is not None:
        nn.init.normal_(base.bias)
    options = {"r": 6, "lora_alpha": 9, "target_modules": ["lin"], "init_lora_weights": False}
    options |= {"fan_in_fan_out": conv1d} | config
    model = get_peft_model(
        Net(base).to(device, precision.base),
        LoraConfig(**options),
        autocast_adapter_dtype=precision.adapters_fp32,
    )
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Adapters as large as the frozen part, so that an error in them shows."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=1.0 if p.dim() < 2 else p.shape[1] ** -0.5)


def lin(model: nn.Module) -> PeftLinear:
    return model.base_model.model.lin


def make_x(precision: Precision, device: str, rows: tuple[int, ...] = ROWS) -> Tensor:
    return torch.randn(*rows, IN, device=device).to(precision.x or precision.base)


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the other forward ran")


@contextlib.contextmanager
def only(which: str) -> Iterator[None]:
    """Make the other forward fail: PEFT's for "fused", the op's for "PEFT"."""
    with pytest.MonkeyPatch.context() as patch:
        if which == "fused":
            patch.setattr(PeftLinear, "forward", forbidden)
        else:
            patch.setattr(peft_layers, "lora_linear", forbidden)
            patch.setattr(peft_layers, "lora_linear_multi", forbidden)
            patch.setattr(peft_layers, "dora_linear", forbidden)
        yield


def measure(
    call: Callable[[Tensor], Tensor],
    layer: nn.Module,
    x: Tensor,
    dy: Tensor,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """y, and the gradients of x and of every trainable parameter of the layer."""
    torch.manual_seed(SEED)
    x = x.detach().requires_grad_()
    leaves = {"x": x} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = call(x)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True)
    got = {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}
    return {"y": y.detach(), **got}


def peft_forward(layer: PeftLinear, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: PeftLinear.forward(layer, x, **kwargs)


def compare(
    model: nn.Module,
    oracle: ModuleType,
    precision: Precision,
    device: str,
    x: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Accelerate; assert that the fused pass is as exact as PEFT's forward against one in fp64."""
    layer = lin(model)
    x = make_x(precision, device) if x is None else x
    dy = torch.randn(*x.shape[:-1], OUT, device=device).to(precision.out)
    exact_layer = copy.deepcopy(layer).double()
    with only("PEFT"):
        plain = measure(peft_forward(layer, **kwargs), layer, x, dy, precision.autocast)
        exact = measure(peft_forward(exact_layer, **kwargs), exact_layer, x.double(), dy.double())
    report = fastlora.accelerate(model)
    assert [m.forward for m in report.modules] == ["fused"], str(report)
    assert type(layer) is peft_layers.AcceleratedLinear
    with only("fused"):
        got = measure(lambda t: layer(t, **kwargs), layer, x, dy, precision.autocast)
    assert got.keys() == plain.keys() == exact.keys()
    for name in exact:
        assert got[name].dtype == plain[name].dtype, name
        oracle.assert_close(got[name], plain[name], exact[name], precision.out, name)
    return got


def add_adapter(model: nn.Module, name: str, **config: Any) -> None:
    options = {"target_modules": ["lin"], "init_lora_weights": False}
    model.add_adapter(name, LoraConfig(**(options | config)))
    randomize(model)


@contextlib.contextmanager
def count_peft_forwards() -> Iterator[list[PeftLinear]]:
    """The layers whose forward was PEFT's own inside the block."""
    seen: list[PeftLinear] = []
    original = PeftLinear.forward

    def forward(self: PeftLinear, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(self)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftLinear, "forward", forward)
        yield seen


def llama(**changes: Any) -> nn.Module:
    """A small model of the family, other settings on top of `SMALL`."""
    return LlamaForCausalLM(LlamaConfig(**(SMALL | changes)))
