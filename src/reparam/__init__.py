"""reparam: adapt large models by reparameterizing their weights.

The interface, in six lines:

    adapter = reparam.attach(model, "lora", r=8, alpha=16, targets="all-linear", name="task")
    adapter.bind(optimizer)
    reparam.select(model, "task")
    adapter.save("out/task")
    reparam.load(model, "out/task", name="task")
    reparam.merge(model)

To quantize the base model, call `reparam.quantize(model, "nf4")`, or pass a config to transformers when it loads the
model: `from_pretrained(path, quantization_config=reparam.NF4Config())`. `reparam.optim.PagedAdamW` is an AdamW whose
states are paged.

`import reparam` imports nothing else, not even torch: each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reparam import adapter as adapter
    from reparam import cli as cli
    from reparam import combine as combine
    from reparam import compare as compare
    from reparam import core as core
    from reparam import data as data
    from reparam import errors as errors
    from reparam import evaluation as evaluation
    from reparam import export as export
    from reparam import hf as hf
    from reparam import images as images
    from reparam import inspect as inspect
    from reparam import io as io
    from reparam import kernels as kernels
    from reparam import methods as methods
    from reparam import optim as optim
    from reparam import plan as plan
    from reparam import recipes as recipes
    from reparam import serve as serve
    from reparam import sites as sites
    from reparam import tasks as tasks
    from reparam import train as train
    from reparam import vision as vision
    from reparam import weights as weights
    from reparam.adapter.adapter import Adapter
    from reparam.adapter.attach import adapters, attach, remove
    from reparam.adapter.context import context
    from reparam.adapter.load import load
    from reparam.adapter.merge import MergeReport, merge
    from reparam.adapter.quantize import QuantizeReport, quantize
    from reparam.adapter.selection import Selection, select
    from reparam.adapter.untie import untie
    from reparam.combine.blend import Blend, blend
    from reparam.combine.compress import Compression, compress
    from reparam.combine.split import split
    from reparam.core.base import Factors, Site, Storage, Update, Weight
    from reparam.core.method import Method
    from reparam.core.registry import method, storage
    from reparam.errors import (
        AnswerFailed,
        BaseError,
        Busy,
        ClientGone,
        ConfigError,
        DataError,
        DiskFull,
        DuplicateKey,
        ExportError,
        FormatError,
        InputDependentError,
        NotChunked,
        NotFinite,
        NothingLearned,
        Refused,
        ReparamError,
        RunLocked,
        StateError,
        Stopped,
        Unavailable,
        UnknownAdapter,
        WorkerLost,
        WriteFailed,
    )
    from reparam.hf import prompts
    from reparam.hf.quantizer import Int8Config, NF4Config
    from reparam.methods.adalora.method import AdaLoRA
    from reparam.methods.bitfit import BitFit
    from reparam.methods.bottleneck import Bottleneck
    from reparam.methods.dora import DoRA
    from reparam.methods.full import Full
    from reparam.methods.intrinsic import Intrinsic
    from reparam.methods.lora import LoRA
    from reparam.methods.lora_bias import LoRABias
    from reparam.methods.mixture import (
        HydraLoRA,
        LLaVAMoLE,
        LoRAMoE,
        Mixture,
        MoELoRAContrastive,
        MoLE,
        MoLoRA,
        MoV,
        Poly,
        TaskGated,
        XLoRA,
    )
    from reparam.methods.several import Several
    from reparam.methods.tokens import Tokens
    from reparam.weights.int8 import Int8
    from reparam.weights.nf4 import NF4

__version__ = "0.1.0"
__all__ = [
    "NF4",
    "AdaLoRA",
    "Adapter",
    "AnswerFailed",
    "BaseError",
    "BitFit",
    "Blend",
    "Bottleneck",
    "Busy",
    "ClientGone",
    "Compression",
    "ConfigError",
    "DataError",
    "DiskFull",
    "DoRA",
    "DuplicateKey",
    "ExportError",
    "Factors",
    "FormatError",
    "Full",
    "HydraLoRA",
    "InputDependentError",
    "Int8",
    "Int8Config",
    "Intrinsic",
    "LLaVAMoLE",
    "LoRA",
    "LoRABias",
    "LoRAMoE",
    "MergeReport",
    "Method",
    "Mixture",
    "MoELoRAContrastive",
    "MoLE",
    "MoLoRA",
    "MoV",
    "NF4Config",
    "NotChunked",
    "NotFinite",
    "NothingLearned",
    "Poly",
    "QuantizeReport",
    "Refused",
    "ReparamError",
    "RunLocked",
    "Selection",
    "Several",
    "Site",
    "StateError",
    "Stopped",
    "Storage",
    "TaskGated",
    "Tokens",
    "Unavailable",
    "UnknownAdapter",
    "Update",
    "Weight",
    "WorkerLost",
    "WriteFailed",
    "XLoRA",
    "adapters",
    "attach",
    "blend",
    "compress",
    "context",
    "errors",
    "load",
    "merge",
    "method",
    "optim",
    "prompts",
    "quantize",
    "remove",
    "select",
    "split",
    "storage",
    "untie",
]

_HOMES = {  # the module that defines each name
    "Adapter": "reparam.adapter.adapter",
    "adapters": "reparam.adapter.attach",
    "attach": "reparam.adapter.attach",
    "remove": "reparam.adapter.attach",
    "select": "reparam.adapter.selection",
    "untie": "reparam.adapter.untie",
    "context": "reparam.adapter.context",
    "load": "reparam.adapter.load",
    "MergeReport": "reparam.adapter.merge",
    "merge": "reparam.adapter.merge",
    "QuantizeReport": "reparam.adapter.quantize",
    "quantize": "reparam.adapter.quantize",
    "Selection": "reparam.adapter.selection",
    "Blend": "reparam.combine.blend",
    "blend": "reparam.combine.blend",
    "Compression": "reparam.combine.compress",
    "compress": "reparam.combine.compress",
    "split": "reparam.combine.split",
    "Factors": "reparam.core.base",
    "Method": "reparam.core.method",
    "Site": "reparam.core.base",
    "Storage": "reparam.core.base",
    "Update": "reparam.core.base",
    "Weight": "reparam.core.base",
    "method": "reparam.core.registry",
    "storage": "reparam.core.registry",
    "AnswerFailed": "reparam.errors",
    "BaseError": "reparam.errors",
    "ConfigError": "reparam.errors",
    "DataError": "reparam.errors",
    "DiskFull": "reparam.errors",
    "DuplicateKey": "reparam.errors",
    "FormatError": "reparam.errors",
    "InputDependentError": "reparam.errors",
    "NotChunked": "reparam.errors",
    "NotFinite": "reparam.errors",
    "NothingLearned": "reparam.errors",
    "Refused": "reparam.errors",
    "ReparamError": "reparam.errors",
    "RunLocked": "reparam.errors",
    "StateError": "reparam.errors",
    "Stopped": "reparam.errors",
    "Busy": "reparam.errors",
    "ExportError": "reparam.errors",
    "ClientGone": "reparam.errors",
    "Unavailable": "reparam.errors",
    "UnknownAdapter": "reparam.errors",
    "WorkerLost": "reparam.errors",
    "WriteFailed": "reparam.errors",
    "Int8Config": "reparam.hf.quantizer",
    "NF4Config": "reparam.hf.quantizer",
    "AdaLoRA": "reparam.methods.adalora.method",
    "BitFit": "reparam.methods.bitfit",
    "Bottleneck": "reparam.methods.bottleneck",
    "DoRA": "reparam.methods.dora",
    "Full": "reparam.methods.full",
    "Intrinsic": "reparam.methods.intrinsic",
    "LoRA": "reparam.methods.lora",
    "LoRABias": "reparam.methods.lora_bias",
    "HydraLoRA": "reparam.methods.mixture",
    "LLaVAMoLE": "reparam.methods.mixture",
    "LoRAMoE": "reparam.methods.mixture",
    "Mixture": "reparam.methods.mixture",
    "MoELoRAContrastive": "reparam.methods.mixture",
    "MoLE": "reparam.methods.mixture",
    "MoLoRA": "reparam.methods.mixture",
    "MoV": "reparam.methods.mixture",
    "Poly": "reparam.methods.mixture",
    "TaskGated": "reparam.methods.mixture",
    "XLoRA": "reparam.methods.mixture",
    "Tokens": "reparam.methods.tokens",
    "Several": "reparam.methods.several",
    "Int8": "reparam.weights.int8",
    "NF4": "reparam.weights.nf4",
}
_OLD = {"pack": "reparam.adapter.quantize"}  # deprecated names, removed in the next release; their functions warn
_ROOMS = """
    adapter cli combine compare core data errors evaluation export hf images inspect io kernels methods optim
    plan recipes serve sites tasks train vision weights
"""
_MODULES = {"prompts": "reparam.hf.prompts"} | {name: f"reparam.{name}" for name in _ROOMS.split()}  # attributes, too


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


if not TYPE_CHECKING:  # a type checker reads the imports above and reports misspelled names

    def __getattr__(name: str) -> Any:
        """Import and cache `name`. Any name but a submodule or an error first registers all methods and storages."""
        if name in _MODULES:
            found = import_module(_MODULES[name])
        elif name in _OLD:
            return getattr(import_module(_OLD[name]), name)
        elif name in _HOMES:
            if _HOMES[name] != "reparam.errors":
                import_module("reparam.methods")
                import_module("reparam.weights")
            found = getattr(import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found
