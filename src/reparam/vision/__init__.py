"""Vision as LoRA (VoRA, arXiv 2503.20680): a decoder language model learns to see, without a vision encoder.

Adapters on the linear maps of its first blocks, a light embedding of image patches, and a mask in which the tokens of
one image see each other. A vision transformer can teach the blocks while they train; nothing of it is kept.

    vora = reparam.vision.VoRA(model, vision=Vision(patch=14, size=224), blocks=12, method=LoRA(r=64, scaling="none"))
    vora = reparam.vision.load("out/vora")
    vora.generate(images=["cat.png"], text="What is this?")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reparam.vision.distill import Distillation, Teacher
    from reparam.vision.files import load
    from reparam.vision.model import VoRA
    from reparam.vision.patches import PatchEmbedding, Vision
    from reparam.vision.processor import Processor

_HOMES = {
    "Distillation": "distill",
    "Teacher": "distill",
    "load": "files",
    "VoRA": "model",
    "PatchEmbedding": "patches",
    "Vision": "patches",
    "Processor": "processor",
}
__all__ = ["Distillation", "PatchEmbedding", "Processor", "Teacher", "Vision", "VoRA", "load"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import `name` when it is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
