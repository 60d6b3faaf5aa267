"""`untie` for every way in which transformers ties weights: nothing is shared afterwards, and files read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import IDS, bert, llama, logits, same, tied_llama
from tiny_configs import TooLarge, scramble, tiny, tying_classes
from torch import Tensor, nn

import reparam
from reparam.sites.targets import resolve

SAMPLE = [
    "BartForConditionalGeneration",
    "MBartForConditionalGeneration",
    "PegasusForConditionalGeneration",
    "MarianMTModel",
    "M2M100ForConditionalGeneration",
    "BlenderbotForConditionalGeneration",
    "LEDForConditionalGeneration",
    "BertForMaskedLM",
    "T5ForConditionalGeneration",
    "UMT5ForConditionalGeneration",
    "GemmaForCausalLM",
    "WhisperForConditionalGeneration",
]
CLASSES = (
    tying_classes() if os.environ.get("REPARAM_TESTS") == "full" else [getattr(transformers, name) for name in SAMPLE]
)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and saved buffers, by each of their names."""
    saved = model.state_dict()
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in own if name in saved}


def outputs(model: Any) -> Tensor | None:
    """The logits for a batch of tokens, or None for a model that needs other inputs."""
    asked: dict[str, Any] = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        asked["decoder_input_ids"] = IDS
    if "input_features" in str(model.main_input_name):
        asked["input_features"] = torch.ones(len(IDS), model.config.num_mel_bins, 2 * model.config.max_source_positions)
        del asked["input_ids"]
    try:
        with torch.no_grad():
            return model(**asked).logits
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_untied_model_reads_back(cls: Any, tmp_path: Path) -> None:
    try:
        model = tiny(cls)
        model.save_pretrained(tmp_path / "tied")
        if not same(tensors(cls.from_pretrained(tmp_path / "tied")), tensors(model)):
            pytest.skip("transformers does not read back its own files of the tied model")
    except TooLarge as error:
        pytest.skip(str(error))
    except Exception as error:  # a configuration whose sizes depend on each other in its own way
        if cls.__name__ in SAMPLE:
            raise
        pytest.skip(f"{type(error).__name__}: {error}")
    before = outputs(model)
    assert before is not None or cls.__name__ not in SAMPLE or cls.__name__.startswith("LED")
    reparam.untie(model)
    held = [id(p) for p in model.parameters()]
    assert len(held) == len([*model.named_parameters(remove_duplicate=False)])
    after = outputs(model)
    assert before is None or torch.equal(after, before)  # type: ignore[arg-type]
    for name in ("fresh", "trained"):
        model.save_pretrained(tmp_path / name)
        found = cls.from_pretrained(tmp_path / name).eval()
        assert same(tensors(found), tensors(model)), name
        again = outputs(found)
        assert again is None or torch.equal(again, outputs(model)), name  # type: ignore[arg-type]
        scramble(model)


def test_a_resize_after_untying_ties_nothing_again() -> None:
    for cls in (transformers.T5ForConditionalGeneration, transformers.BartForConditionalGeneration):
        model = tiny(cls)  # type: ignore[arg-type]
        reparam.untie(model)
        model.resize_token_embeddings(120)
        assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_one_embedding_module_of_encoder_and_decoder_is_parted(tmp_path: Path) -> None:
    """`resize_token_embeddings` gives BART's encoder and decoder one module."""
    model = tiny(transformers.BartForConditionalGeneration)
    model.resize_token_embeddings(120)
    assert model.model.encoder.embed_tokens is model.model.shared
    reparam.untie(model)
    scramble(model)
    model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path)
    assert same(tensors(found), tensors(model))
    assert not torch.equal(found.lm_head.weight, found.model.shared.weight)


@pytest.mark.parametrize(
    ("name", "head"),
    [("BertForMaskedLM", "cls.predictions.decoder"), ("RobertaForMaskedLM", "lm_head.decoder")],
)
def test_a_head_whose_bias_is_shared_too_is_adapted(name: str, head: str) -> None:
    model = tiny(getattr(transformers, name))
    with pytest.raises(ValueError, match=rf"{head} shares its weight with"):
        reparam.attach(model, reparam.LoRA(r=2), targets=[head])
    reparam.untie(model)
    base = logits(model)
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=[head], bias=True)
    torch.nn.init.normal_(adapter.updates[head].B)  # type: ignore[arg-type]
    expected = logits(model)
    assert not torch.allclose(expected, base, atol=1e-3)
    reparam.merge(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "path"), [("BartForConditionalGeneration", "model.shared"), ("T5Model", "shared")])
def test_an_embedding_that_nothing_calls_is_refused(name: str, path: str) -> None:
    """Once its weight is no longer tied, the module that lent it has no effect."""
    model = tiny(getattr(transformers, name))
    assert resolve(model, [path]) == [path]
    reparam.untie(model)
    before = outputs(model)
    with pytest.raises(ValueError, match=rf"{path}: \w+ does not call it, and nothing is tied to it"):
        reparam.attach(model, reparam.LoRA(r=1), targets=[path])
    with pytest.warns(UserWarning, match=rf"{path} \(\w+ does not call it"):
        assert path not in resolve(model, "everything")
    with torch.no_grad():
        model.get_submodule(path).weight += 1
    after = outputs(model)
    assert (before is None and after is None) or torch.equal(after, before)  # type: ignore[arg-type]


def test_untying_without_ties_changes_nothing() -> None:
    for model in (llama(), bert(), nn.Sequential(nn.Linear(2, 2))):
        state = tensors(model)
        reparam.untie(model)
        assert same(tensors(model), state)


def test_ties_that_no_class_declares_end_too() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    values = model[0].weight.detach().clone()
    reparam.untie(model)
    assert model[1].weight is not model[0].weight
    assert torch.equal(model[1].weight, values)


class Twice(nn.Module):
    """A layer and a block at two paths each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"inner": nn.Linear(6, 6)})
        self.second, self.also = self.first, self.block
        self.last = self.block["inner"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.also["inner"](x)))


@pytest.mark.parametrize("target", ["first", "second", "re:(first|last)", "all-linear"])
def test_one_layer_at_two_paths_is_one_site(target: str, tmp_path: Path) -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    model, plain = Twice(), Twice().double()
    base = model(x).detach()
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=[target])
    assert list(adapter.sites) == (["first"] if target in ("first", "second") else ["first", "block.inner"])
    with torch.no_grad():
        for path, update in adapter.updates.items():
            nn.init.normal_(update.B, 0, 0.3)  # type: ignore[arg-type]
            a, b = update.factors(adapter.modules[path].frozen)[:2]
            plain.get_submodule(path).weight += b.double() @ a.double()  # type: ignore[operator]
    expected = plain(x.double()).detach()
    assert torch.allclose(model(x).double(), expected, atol=1e-5)
    adapter.save(tmp_path / "a")
    other = Twice()
    reparam.load(other, tmp_path / "a")
    assert torch.equal(other(x), model(x))
    report = reparam.merge(model, keep_base=True)
    assert type(model.second) is nn.Linear
    assert model.second is model.first
    assert model.last is model.block["inner"]
    assert torch.allclose(model(x).double(), expected, atol=1e-5)
    report.restore()
    reparam.remove(model, "default")
    assert torch.equal(model(x), base)


def test_quantizing_reaches_both_paths() -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    model = Twice()
    base = model(x).detach()
    reparam.quantize(model, "int8")
    assert model.second is model.first
    assert model.last is model.block["inner"]
    assert not torch.equal(model(x), base)
    reparam.quantize(model, "dense")
    assert type(model.second) is nn.Linear


def test_a_tied_head_stays_as_it_was_where_nothing_is_untied() -> None:
    model = tied_llama()
    reparam.attach(model, reparam.LoRA(r=2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
