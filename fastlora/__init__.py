"""fastlora: LoRA linears as fused Triton kernels, checked against an eager reference."""

from fastlora import reference
from fastlora._version import __version__
from fastlora.adapter_io import load_adapter, save_adapter
from fastlora.functional import explain, lora_linear
from fastlora.injection import InjectionReport, inject
from fastlora.integrations.peft import AccelerationReport, accelerate, restore
from fastlora.modules import LoRALinear

__all__ = [
    "AccelerationReport",
    "InjectionReport",
    "LoRALinear",
    "__version__",
    "accelerate",
    "explain",
    "inject",
    "load_adapter",
    "lora_linear",
    "reference",
    "restore",
    "save_adapter",
]
