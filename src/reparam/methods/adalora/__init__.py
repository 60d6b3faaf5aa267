"""AdaLoRA: the method, its update, and the budget of ranks that training moves."""

from reparam.methods.adalora.method import AdaLoRA
from reparam.methods.adalora.update import SVDUpdate

__all__ = ["AdaLoRA", "SVDUpdate"]
