"""The biases of PEFT folders: of B (`lora_bias`), of the sites, and of modules beside them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import assert_equal_but_for_rounding, trained
from models import gpt2, llama, logits
from torch import Tensor, nn

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


def saved(model: Any, folder: Path, **config: Any) -> Tensor:
    """Save an adapter with PEFT, with random values, and return its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, peft.LoraConfig(r=2, fan_in_fan_out=True, bias="all", **config))
        torch.manual_seed(2)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        made.eval().save_pretrained(str(folder))
    return logits(made).detach()


def test_all_biases_are_saved_loaded_and_merged(tmp_path: Path) -> None:
    expected = saved(gpt2(), tmp_path / "peft", target_modules=["c_attn"])
    model = gpt2()
    before = logits(model)
    adapter = reparam.load(model, tmp_path / "peft")
    assert {"transformer.ln_f", "transformer.h.1.mlp.c_fc"} < adapter.sites.keys()
    adapter.save(tmp_path / "own")
    again = gpt2()
    reparam.load(again, tmp_path / "own")
    for one in (model, again):
        assert_equal_but_for_rounding(logits(one), expected)
    reparam.select(again, [None, "default", None])
    mixed = logits(again)
    for row, whole in enumerate((before, expected, before)):
        assert_equal_but_for_rounding(mixed[row], whole[row])
    reparam.merge(model)
    assert_equal_but_for_rounding(logits(model), expected)


def test_other_commands_refuse_what_they_cannot_use(tmp_path: Path) -> None:
    saved(gpt2(), tmp_path, target_modules=["c_attn"])
    for command in (lambda: reparam.blend([tmp_path], [1.0]), lambda: reparam.compress(tmp_path, rank=1)):
        with pytest.raises(reparam.FormatError, match=r"also trains biases of modules without factors \(transformer\."):
            command()


class Net(nn.Module):
    """A linear map beside a convolution, whose bias is not that of a site."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.linear = nn.Conv1d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mT)


def test_biases_of_other_modules(tmp_path: Path) -> None:
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["linear"], bias="all"))
    model.save_pretrained(str(tmp_path / "same"))
    reparam.load(Net(), tmp_path / "same")  # PEFT saves the untrained bias of the convolution, too
    with torch.no_grad():
        model.base_model.model.conv.bias += 1
    model.save_pretrained(str(tmp_path / "trained"))
    with pytest.raises(reparam.FormatError, match=r"conv\.bias was trained, but Conv1d is not supported"):
        reparam.load(Net(), tmp_path / "trained")
