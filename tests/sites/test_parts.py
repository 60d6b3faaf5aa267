"""Targets by part of vision-language models."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama
from torch import nn
from transformers import AutoModelForImageTextToText
from vision_language import BASES

import reparam
from reparam.sites.targets import resolve

VISION = r"vision_tower|vision_model|visual"
PROJECTOR = r"projector|connector|merger|modality_projection"


@pytest.fixture(params=BASES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    BASES[request.param](tmp_path)
    return AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_the_words_divide_the_linear_maps_by_the_names_of_transformers(model: Any) -> None:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    projector = [name for name in linear if re.search(PROJECTOR, name)]
    vision = [name for name in linear if re.search(VISION, name) and name not in projector]
    language = [name for name in linear if name not in (*vision, *projector)]
    assert len(language) == 14  # seven maps of two blocks
    for word in ("language", "all-linear"):
        assert resolve(model, word) == language
    assert resolve(model, "vision") == vision
    if projector:
        assert resolve(model, "projector") == projector
    else:
        with pytest.raises(ValueError, match="'projector' matches no module: this model has no linear map in that"):
            resolve(model, "projector")
    for part, of_part in (("language", language), ("vision", vision)):
        inside = [name for name in of_part if re.search(r"attn|attention", name)]
        assert resolve(model, f"{part}.attention") == inside
        assert set(resolve(model, f"{part}.mlp")) <= {*of_part} - {*inside}
    assert resolve(model, "attention") == resolve(model, "language.attention")
    assert resolve(model, "mlp") == resolve(model, "language.mlp")


def test_the_default_leaves_the_vision_encoder_and_the_projector_alone(tmp_path: Path) -> None:
    BASES["llava"](tmp_path)
    for method in ("lora", "bottleneck"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path)
        adapter = reparam.attach(model, method)
        assert adapter.sites
        assert all(path.startswith(("model.language_model.", "lm_head")) for path in adapter.sites)
    adapter = reparam.attach(model, "lora", r=2, targets=["vision", "projector"], name="other")
    assert not any("language_model" in path for path in adapter.sites)
    with torch.no_grad():
        reparam.select(model, "other")


def test_a_model_without_parts_says_so() -> None:
    with pytest.raises(ValueError, match="'vision' matches no module: this model has no such part"):
        resolve(llama(), ["vision"])
