"""A head that transformers initialized randomly: attaching says that it stays frozen, loading does not depend on it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import reparam


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def classifier(folder: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0).eval()


def scores(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("format", ["reparam", "peft"])
def test_an_adapter_with_its_own_head_loads_beside_another_random_head(folder: Path, format: str) -> None:
    model = classifier(folder, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = reparam.attach(model, reparam.LoRA(r=2), targets="attention", modules_to_save="score")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    adapter.save(folder.parent / "adapter", format=format)
    other = classifier(folder, seed=2)
    assert not torch.equal(other.score.weight, model.score.origin.weight)
    reparam.load(other, folder.parent / "adapter")
    assert torch.equal(scores(other), scores(model))
    if format == "reparam":  # PEFT's files do not say which weights they were trained on
        reparam.remove(other, "default")
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        with pytest.raises(reparam.FormatError, match="weights"):
            reparam.load(other, folder.parent / "adapter")


def test_a_random_head_that_stays_frozen_is_named(folder: Path) -> None:
    model = classifier(folder, seed=1)
    with pytest.warns(UserWarning, match=r"score: not in the files of the model.*modules_to_save"):
        reparam.attach(model, reparam.LoRA(r=2), targets="attention")


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_a_model_that_was_read_whole_is_not_warned_of(folder: Path, storage: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if storage != "dense":
            reparam.quantize(model, storage)
            reparam.attach(model, reparam.LoRA(r=2), name="a")
            reparam.merge(model)
        reparam.attach(model, reparam.LoRA(r=2), name="b")
        reparam.attach(llama(), reparam.LoRA(r=2))
