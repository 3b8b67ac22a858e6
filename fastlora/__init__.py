"""fastlora: LoRA linears as fused Triton kernels, checked against an eager reference."""

from fastlora import reference
from fastlora._version import __version__
from fastlora.adapter_io import load_adapter, save_adapter
from fastlora.adapters import AdapterStack, Routing, route
from fastlora.functional import explain, lora_linear
from fastlora.injection import InjectionReport, inject
from fastlora.integrations.peft import AccelerationReport, accelerate, restore
from fastlora.modules import LoRALinear
from fastlora.multi import lora_linear_multi

__all__ = [
    "AccelerationReport",
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
]
