"""Mixtures of experts, from four pieces: experts, a router, what is selected, and how outputs are combined."""

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
