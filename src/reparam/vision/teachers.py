"""Load a vision transformer as a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from reparam.core.checks import finite
from reparam.core.progress import waiting
from reparam.errors import BaseError
from reparam.hf.bars import waits_of_transformers
from reparam.hf.folder import check_path
from reparam.hf.sound import check_complete, check_finite, from_files
from reparam.vision.distill import Teacher

PIXELS = "preprocessor_config.json"


def load_teacher(path: str) -> Teacher:
    """Load the vision model in a local folder or on the hub, with the normalization of its pixels.

    Weights are read from safetensors only, and code in the repository is never run. Raises BaseError if there is no
    vision model of transformers, or if its files are damaged.
    """
    check_path(path)
    disable_progress_bar()
    with from_files(path, "vision model"), waiting(f"loading {path}"), waits_of_transformers():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not hasattr(config, "vision_config") and not hasattr(config, "patch_size"):
            raise BaseError(f"{path}: a {config.model_type} has no patches, so it is no vision transformer")
        found: Any = AutoModel.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        model, info = found
        check_complete(info, "vision model")
        check_finite(model)
    return Teacher(model, **_normalization(path))


def _normalization(path: str) -> dict[str, Any]:
    """Mean and standard deviation of the teacher's pixels, if its files have them."""
    file = cached_file(path, PIXELS, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return {}
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        mean, std = values["image_mean"], values["image_std"]
        if not all(finite(value) for value in [*mean, *std]) or min(std) <= 0:
            raise ValueError("image_mean and image_std are not finite numbers, or a deviation is not above 0")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseError(f"{path}: {PIXELS} does not tell how pixels are normalized ({error})") from None
    return {"mean": mean, "std": std}
