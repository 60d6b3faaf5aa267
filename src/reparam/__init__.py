"""reparam: adapt large models by reparameterising their weights.

The interface, in six lines:

    adapter = reparam.attach(model, reparam.LoRA(r=8, alpha=16), targets="all-linear", name="task")
    adapter.bind(optimizer)
    reparam.select(model, "task")
    adapter.save("out/task")
    reparam.load(model, "out/task", name="task")
    reparam.merge(model)
"""

from reparam.adapter import Adapter, adapters, attach, remove, select, untie
from reparam.base import InputDependentError
from reparam.io.record import FormatError
from reparam.load import load
from reparam.merge import MergeReport, merge
from reparam.methods.lora import LoRA
from reparam.pack import PackReport, pack
from reparam.weights.int8 import Int8
from reparam.weights.nf4 import NF4

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
