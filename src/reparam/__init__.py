"""reparam: adapt large models by reparameterizing their weights.

The interface, in six lines:

    adapter = reparam.attach(model, reparam.LoRA(r=8, alpha=16), targets="all-linear", name="task")
    adapter.bind(optimizer)
    reparam.select(model, "task")
    adapter.save("out/task")
    reparam.load(model, "out/task", name="task")
    reparam.merge(model)

Packed bases: `reparam.pack(model, "nf4")`, or while transformers reads the model,
`from_pretrained(path, quantization_config=reparam.NF4Config())`. Paged optimizer states: `reparam.optim.PagedAdamW`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from reparam.adapter.adapter import Adapter
from reparam.adapter.attach import adapters, attach, remove, select, untie
from reparam.adapter.context import context
from reparam.adapter.load import load
from reparam.adapter.merge import MergeReport, merge
from reparam.adapter.quantize import PackReport, pack
from reparam.combine.blend import Blend, blend
from reparam.combine.compress import Compression, compress
from reparam.combine.split import split
from reparam.core.base import InputDependentError
from reparam.io.record import FormatError
from reparam.methods.adalora.method import AdaLoRA
from reparam.methods.bitfit import BitFit
from reparam.methods.bottleneck import Bottleneck
from reparam.methods.dora import DoRA
from reparam.methods.full import Full
from reparam.methods.intrinsic import Intrinsic
from reparam.methods.lora import LoRA
from reparam.weights.int8 import Int8
from reparam.weights.nf4 import NF4

if TYPE_CHECKING:
    from reparam.hf.config import Int8Config as Int8Config
    from reparam.hf.config import NF4Config as NF4Config

__version__ = "0.1.0"
__all__ = [
    "NF4",
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "Blend",
    "Bottleneck",
    "Compression",
    "DoRA",
    "FormatError",
    "Full",
    "InputDependentError",
    "Int8",
    "Intrinsic",
    "LoRA",
    "MergeReport",
    "PackReport",
    "adapters",
    "attach",
    "blend",
    "compress",
    "context",
    "load",
    "merge",
    "pack",
    "remove",
    "select",
    "split",
    "untie",
]


def __getattr__(name: str) -> Any:
    """What is imported when first asked for: two that need transformers, which is told of them, and the optimizers."""
    if name in ("Int8Config", "NF4Config"):
        return getattr(importlib.import_module("reparam.hf.quantizer"), name)
    if name == "optim":
        return importlib.import_module("reparam.optim")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
