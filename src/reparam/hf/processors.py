"""The processors of vision-language models: their tokenizer, and what turns images into the model's inputs."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from reparam.errors import BaseError
from reparam.hf.folder import check_path, is_gguf
from reparam.hf.models import load_tokenizer
from reparam.hf.sound import from_files


def sees(path: str, *, revision: str | None = None) -> bool:
    """Whether the model in a folder or on the hub is a vision-language model of transformers.

    False, too, if that cannot be told: loading the model then says what is wrong.
    """
    config = _config(path, revision)
    return config is not None and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and has_eyes(config)


def has_eyes(config: Any) -> bool:
    """Whether a configuration of transformers has that of a vision encoder."""
    return getattr(config, "vision_config", None) is not None


def load_processor(path: str, *, revision: str | None = None) -> Any:
    """Load the processor of a vision-language model, for text and images; it processes no videos.

    Its tokenizer has the chat template of the processor, if that has one. Raises BaseError if the folder lacks the
    files, and if a package is missing that the processor needs.
    """
    config = _config(path, revision)
    kind = PROCESSOR_MAPPING.get(type(config), None)
    if config is None or kind is None:
        raise BaseError(f"{path}: transformers knows no processor of text and images for this model")
    with from_files(path, "processor of images"):
        cached = check_path(path)
        try:
            found = _images_only(kind).from_pretrained(
                path, revision=revision or "main", trust_remote_code=False, local_files_only=cached
            )
        except OSError as error:
            raise BaseError(
                f"{path}: no processor of images could be loaded; copy preprocessor_config.json, processor_config.json "
                f"and the chat template of the original model into the folder ({str(error).splitlines()[0]})"
            ) from None
    if found.chat_template and not isinstance(found.chat_template, dict):
        found.tokenizer.chat_template = found.chat_template
    return found


def words_of(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; for a vision-language model, that of its processor, if it can be loaded."""
    if sees(path, revision=revision):
        try:
            found: PreTrainedTokenizerBase = load_processor(path, revision=revision).tokenizer
        except BaseError:
            pass
        else:
            return found
    return load_tokenizer(path, revision=revision)


@functools.cache
def _images_only(kind: Any) -> Any:
    """The class of a processor without its processor of videos, which needs torchvision."""
    if not any("video" in name for name in kind.get_attributes()):
        return kind

    def attributes(cls: Any) -> list[str]:
        return [name for name in kind.get_attributes() if "video" not in name]

    def arguments(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        found = iter(super(made, cls)._get_arguments_from_pretrained(*args, **kwargs))
        return [None if "video" in name else next(found) for name in kind.get_attributes()]

    methods = {"get_attributes": attributes, "_get_arguments_from_pretrained": arguments}
    made: Any = type(kind.__name__, (kind,), {name: classmethod(method) for name, method in methods.items()})
    return made


def _config(path: str, revision: str | None) -> Any:
    if is_gguf(path):
        return None
    try:
        cached = check_path(path)
        return AutoConfig.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False, local_files_only=cached
        )
    except Exception:  # damaged files raise many kinds; loading the model reports them
        return None
