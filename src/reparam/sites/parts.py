"""The parts of a vision-language model: the language model, the vision encoder, and the projector between them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from reparam.sites.walk import walk
from reparam.sites.wrapped import bare

PARTS = ("language", "vision", "projector")
WORDS = (*PARTS, *(f"{part}.{kind}" for part in PARTS[:2] for kind in ("attention", "mlp")))
"""The targets that name a part, and the attention or the other maps of its blocks."""
_MERGER = re.compile(r"(^|\.)\w*merger\w*(\.|$)")  # the projectors of Qwen's encoders stand inside of them


class Parts(NamedTuple):
    """Where the parts of a vision-language model are."""

    language: str
    """Path of the language model, without its output head."""
    vision: str
    """Path of the vision encoder."""
    head: str | None
    """Path of the output head."""

    def of(self, path: str) -> str:
        """The part that a module is in: one of `PARTS`. What is in neither of the two models is the projector's.

        >>> Parts("model.language_model", "model.visual", "lm_head").of("model.visual.merger.mlp.0")
        'projector'
        """
        if path == self.head or _within(path, self.language):
            return "language"
        inside = _within(path, self.vision)
        return "projector" if not inside or _MERGER.search(path[len(self.vision) :]) else "vision"


def parts_of(model: nn.Module) -> Parts | None:
    """The parts of a vision-language model of transformers; None for any other model."""
    root: Any = bare(model)
    config = getattr(root, "config", None)
    head = getattr(root, "get_output_embeddings", lambda: None)()
    if getattr(config, "vision_config", None) is None or head is None:
        return None
    paths = {module: path for path, module in walk(root)}
    language, vision = paths.get(bare(root.get_decoder())), paths.get(bare(root.get_encoder(modality="image")))
    if language is None or vision is None:
        return None
    return Parts(language, vision, paths.get(bare(head)))


def without_vision(model: nn.Module, paths: list[str]) -> list[str]:
    """The paths without those in the vision encoder or the projector of a vision-language model."""
    parts = parts_of(model)
    return paths if parts is None else [path for path in paths if parts.of(path) == "language"]


def check_mixed(model: nn.Module, name: str, paths: Iterable[str]) -> None:
    """Raise ValueError if an adapter on these modules cannot be in a mixed batch, because some of them see images.

    The vision encoder and the projector get all images of a batch one after the other, without the rows they are in.
    """
    parts = parts_of(model)
    outside = next((path for path in paths if parts is not None and parts.of(path) != "language"), None)
    if parts is not None and outside is not None:
        raise ValueError(
            f"the adapter {name!r} is also on {outside}, in the {parts.of(outside)} part, where the rows of images are "
            f"not known: in a mixed batch, adapters are on the language model; select one adapter at a time"
        )


def _within(path: str, above: str) -> bool:
    return f"{path}.".startswith(f"{above}.")
