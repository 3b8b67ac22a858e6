"""fastlora: LoRA linears as fused Triton kernels, checked against an eager reference."""

from fastlora import reference
from fastlora._version import __version__
from fastlora.adapter_io import load_adapter, save_adapter
from fastlora.adapters import AdapterStack, Routing, route, stack_adapters
from fastlora.bank import AdapterBank
from fastlora.functional import explain, lora_linear
from fastlora.injection import InjectionReport, inject
from fastlora.integrations.peft import AccelerationReport, accelerate, restore
from fastlora.modules import LoRALinear
from fastlora.multi import lora_linear_multi
from fastlora.serving import serve, unserve

__all__ = [
    "AccelerationReport",
    "AdapterBank",
    "AdapterStack",
    "InjectionReport",
    "LoRALinear",
    "Routing",
    "__version__",
    "accelerate",
    "explain",
    "inject",
    "load_adapter",
    "lora_linear",
    "lora_linear_multi",
    "reference",
    "restore",
    "route",
    "save_adapter",
    "serve",
    "stack_adapters",
    "unserve",
]
