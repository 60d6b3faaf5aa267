"""AdaLoRA: the method, its update, and the rank budget that falls during training."""

from reparam.methods.adalora.method import AdaLoRA
from reparam.methods.adalora.update import SVDUpdate

__all__ = ["AdaLoRA", "SVDUpdate"]
