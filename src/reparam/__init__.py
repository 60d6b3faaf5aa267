"""reparam: adapt large models by reparameterising their weights.

The interface, in six lines:

    adapter = reparam.attach(model, reparam.LoRA(r=8, alpha=16), targets="all-linear", name="task")
    adapter.bind(optimizer)
    reparam.select(model, "task")
    adapter.save("out/task")
    reparam.load(model, "out/task", name="task")
    reparam.merge(model)

`reparam.NF4Config` and `reparam.Int8Config` are for transformers' `from_pretrained(path, quantization_config=...)`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from reparam.adapter import Adapter, adapters, attach, remove, select, untie
from reparam.base import InputDependentError
from reparam.io.record import FormatError
from reparam.load import load
from reparam.merge import MergeReport, merge
from reparam.methods.lora import LoRA
from reparam.pack import PackReport, pack
from reparam.weights.int8 import Int8
from reparam.weights.nf4 import NF4

if TYPE_CHECKING:
    from reparam.hf_quantizer import Int8Config as Int8Config
    from reparam.hf_quantizer import NF4Config as NF4Config

__version__ = "0.1.0"
__all__ = [
    "NF4",
    "Adapter",
    "FormatError",
    "InputDependentError",
    "Int8",
    "LoRA",
    "MergeReport",
    "PackReport",
    "adapters",
    "attach",
    "load",
    "merge",
    "pack",
    "remove",
    "select",
    "untie",
]


def __getattr__(name: str) -> Any:
    """The two that need transformers, which is imported, and told of them, when one of them is first asked for."""
    if name in ("Int8Config", "NF4Config"):
        return getattr(importlib.import_module("reparam.hf_quantizer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
