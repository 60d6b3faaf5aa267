"""Loading a model with an adapter from folder names."""

from __future__ import annotations

from pathlib import Path

import torch

import reparam
from reparam.hf.models import load_base
from reparam.hf.open import open_model

BASE = str(Path(__file__).parents[2] / "assets" / "tiny-python")


def test_an_adapter_of_an_untied_base_opens_on_the_tied_one(tmp_path: Path) -> None:
    ids = torch.arange(12)[None]
    model = load_base(BASE, dtype="float32").eval()
    reparam.untie(model)
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["lm_head"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        expected = model(ids).logits
    adapter.save(tmp_path / "a")
    opened, _, _ = open_model(BASE, tmp_path / "a", dtype="float32")
    with torch.no_grad():
        assert torch.equal(opened.eval()(ids).logits, expected)
    assert not opened.config.tie_word_embeddings


def test_a_tied_base_stays_tied_where_neither_half_changes(tmp_path: Path) -> None:
    model = load_base(BASE, dtype="float32")
    reparam.attach(model, reparam.LoRA(r=2), targets=["q_proj"]).save(tmp_path / "a")
    opened, _, _ = open_model(BASE, tmp_path / "a", dtype="float32")
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
