"""The biases of PEFT folders: of B (`lora_bias`), of the sites, and of modules beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import assert_equal_but_for_rounding, trained
from models import gpt2, llama, logits

import reparam


@pytest.mark.parametrize("make", [llama, gpt2])
def test_biases_of_b_in_a_closed_form(make: object, tmp_path: Path) -> None:
    model = make()  # type: ignore[operator]
    name = "model.layers.0.self_attn.q_proj" if make is llama else "transformer.h.0.attn.c_attn"
    adapter = trained(model, method=reparam.LoRABias(r=2, alpha=6), targets=[name])
    site = model.get_submodule(name)
    x = torch.randn(5, 32, dtype=torch.float64)
    update = site.updates["default"]
    w, a, b, c = (t.detach().double() for t in (site.frozen.dense(), update.A, update.B, update.c))
    own = 0 if site.bias is None else site.bias.detach().double()
    expected = x @ w.T + own + 3.0 * (x @ a.T @ b.T + c)
    torch.testing.assert_close(model.double().get_submodule(name)(x), expected)
    assert c.abs().min() > 0
    assert adapter.sites.keys() == {name}


def test_compressing_keeps_the_biases_of_b(tmp_path: Path) -> None:
    model = gpt2()
    trained(model, method=reparam.LoRABias(r=4), targets=["c_attn"]).save(tmp_path / "whole")
    reparam.compress(tmp_path / "whole", energy=1.0).save(tmp_path / "small")
    again = gpt2()
    reparam.load(again, tmp_path / "small")
    assert_equal_but_for_rounding(logits(again), logits(model))


def test_biases_of_b_on_an_embedding_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embed_tokens: a bias on LoRA's B needs a linear map"):
        reparam.attach(llama(), "lora_bias", targets=["embed_tokens"])
