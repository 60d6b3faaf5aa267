"""Mixtures of experts, built from four parts: experts, a router, a selection, and a way to combine the experts."""

from reparam.methods.mixture.method import Mixture
from reparam.methods.mixture.presets import (
    HydraLoRA,
    LLaVAMoLE,
    LoRAMoE,
    MoELoRAContrastive,
    MoLE,
    MoLoRA,
    MoV,
    Poly,
    TaskGated,
    XLoRA,
)

__all__ = [
    "HydraLoRA",
    "LLaVAMoLE",
    "LoRAMoE",
    "Mixture",
    "MoELoRAContrastive",
    "MoLE",
    "MoLoRA",
    "MoV",
    "Poly",
    "TaskGated",
    "XLoRA",
]
