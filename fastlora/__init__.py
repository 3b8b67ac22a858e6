"""fastlora: LoRA linears as fused Triton kernels, checked against an eager reference."""

from fastlora import reference
from fastlora._version import __version__
from fastlora.adapter_io import load_adapter, save_adapter
from fastlora.adapters import AdapterStack, Routing, route, stack_adapters
from fastlora.bank import AdapterBank
from fastlora.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from fastlora.dora import dora_linear
from fastlora.embedding import explain_embedding, lora_embedding
from fastlora.functional import explain, lora_linear
from fastlora.group import explain_group, lora_linear_group
from fastlora.injection import InjectionReport, inject
from fastlora.integrations.peft import AccelerationReport, accelerate, restore
from fastlora.layers import LoRAEmbedding
from fastlora.loralib import (
    load_lora_state_dict,
    lora_state_dict,
    mark_only_lora_as_trainable,
)
from fastlora.merged_linear import LoRAMergedLinear, lora_merged_linear
from fastlora.merging import merge, merged, unmerge
from fastlora.modules import LoRALinear
from fastlora.multi import lora_linear_multi
from fastlora.serving import serve, unserve
from fastlora.switching import switch_adapter

__all__ = [
    "AccelerationReport",
    "AdapterBank",
    "AdapterStack",
    "InjectionReport",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMergedLinear",
    "Routing",
    "__version__",
    "accelerate",
    "dora_linear",
    "explain",
    "explain_embedding",
    "explain_group",
    "inject",
    "load_adapter",
    "load_lora_state_dict",
    "lora_embedding",
    "lora_linear",
    "lora_linear_group",
    "lora_linear_multi",
    "lora_merged_linear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "merged",
    "reference",
    "restore",
    "route",
    "save_adapter",
    "serve",
    "stack_adapters",
    "switch_adapter",
    "unmerge",
    "unserve",
]
