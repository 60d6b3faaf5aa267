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

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "FormatError",
    "InputDependentError",
    "LoRA",
    "MergeReport",
    "adapters",
    "attach",
    "load",
    "merge",
    "remove",
    "select",
    "untie",
]
