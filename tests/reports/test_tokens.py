"""Training the rows of single tokens: in a closed form, tied, merged, saved, and PEFT's `trainable_token_indices`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import assert_equal_but_for_rounding, trained
from models import llama, logits, loss, tied_llama
from safetensors.torch import load_file
from torch import Tensor

import reparam

TOKENS = (72, 28, 94)  # in IDS
EMBEDDING = "model.embed_tokens"


@torch.no_grad()
def plain(make: Callable[[], Any], values: Tensor, where: tuple[str, ...] = (EMBEDDING,)) -> Any:
    """The base with these rows."""
    model = make()
    for path in where:
        model.get_submodule(path).weight[list(TOKENS)] = values
    return model


@pytest.mark.parametrize("make", [llama, tied_llama])
def test_outputs_are_those_of_the_base_with_these_rows(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    before = logits(model)
    adapter = reparam.attach(model, reparam.Tokens(ids=TOKENS), tie=make is tied_llama)
    assert torch.equal(logits(model), before)
    (values,) = adapter.parameters()
    assert values.shape == (3, 32)
    with torch.no_grad():
        values += torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = logits(plain(make, values.detach()))
    assert_equal_but_for_rounding(logits(model), expected)
    adapter.save(tmp_path)
    again = make()
    reparam.load(again, tmp_path)
    assert_equal_but_for_rounding(logits(again), expected)
    reparam.select(again, [None, "default", None])
    mixed = logits(again)
    for row, whole in enumerate((before, expected, before)):
        assert_equal_but_for_rounding(mixed[row], whole[row])
    reparam.merge(model)
    assert_equal_but_for_rounding(logits(model), expected)
    assert torch.equal(model.model.embed_tokens.weight[list(TOKENS)], values)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (make is tied_llama)


@pytest.mark.parametrize("make", [llama, tied_llama])
def test_gradients_are_those_of_the_rows(make: Callable[[], Any]) -> None:
    model = make()
    (values,) = reparam.attach(model, reparam.Tokens(ids=TOKENS), tie=make is tied_llama).parameters()
    loss(model).backward()
    base = make()
    loss(base).backward()
    torch.testing.assert_close(values.grad, base.model.embed_tokens.weight.grad[list(TOKENS)], rtol=1e-4, atol=1e-6)


def test_without_tie_a_tied_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shares its weight with lm_head.*tie"):
        reparam.attach(tied_llama(), reparam.Tokens(ids=TOKENS))


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ((), "list at least one token"),
        ((1, 1), "each of them once"),
        ((-1,), "expected (whole numbers|a whole number) of at least 0, found -1"),
        ((1.5,), "expected (whole numbers|a whole number)"),
        ((97,), f"{EMBEDDING} has 97 rows, so it has none for the token 97"),
    ],
)
def test_ids_that_do_not_fit(ids: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reparam.attach(llama(), reparam.Tokens(ids=ids))


def test_beside_lora_in_one_adapter(tmp_path: Path) -> None:
    model = llama()
    method = reparam.Several({"method": "lora", "r": 2}, {"embed_tokens": {"method": "tokens", "ids": list(TOKENS)}})
    trained(model, method=method, targets=["q_proj", "embed_tokens"]).save(tmp_path)
    again = llama()
    reparam.load(again, tmp_path)
    assert_equal_but_for_rounding(logits(again), logits(model))
    assert (logits(again) - logits(llama())).abs().max() > 0.1


def save_moved(model: Any, folder: Path) -> None:
    """Move the trained parameters of a PEFT model, and save it."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.eval().save_pretrained(str(folder))


def check_back(make: Callable[[], Any], found: Any, adapter: Any, place: Path, expected: torch.Tensor) -> None:
    """PEFT reads what is written, under the same keys, and merging keeps the outputs."""
    adapter.save(place / "ours", format="peft")
    back = peft.PeftModel.from_pretrained(make(), str(place / "ours")).eval()
    assert_equal_but_for_rounding(logits(back), logits(found))
    before, after = (load_file(place / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    reparam.merge(found)
    assert_equal_but_for_rounding(logits(found), expected)


@pytest.mark.parametrize("make", [llama, tied_llama])
@pytest.mark.parametrize("ids", [[94, 72], {"embed_tokens": [72, 28, 94]}], ids=str)
def test_peft_folders(make: Callable[[], Any], ids: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=ids)
    model = peft.get_peft_model(make(), config)
    save_moved(model, tmp_path / "theirs")
    found = make()
    adapter = reparam.load(found, tmp_path / "theirs")
    assert_equal_but_for_rounding(logits(found), logits(model).detach())
    assert adapter.tied == ({"lm_head": EMBEDDING} if make is tied_llama else {})
    check_back(make, found, adapter, tmp_path, logits(model).detach())


@pytest.mark.parametrize(
    ("ids", "words"),
    [([72], r"embed_tokens\.values has shape \[2, 32\]"), ([72, 99], "none for the token 99")],
    ids=str,
)
def test_ids_of_a_peft_folder_that_do_not_fit(ids: list[int], words: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[72, 28])
    peft.get_peft_model(llama(), config).save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "trainable_token_indices": ids}))
    with pytest.raises(reparam.FormatError, match=words):
        reparam.load(llama(), tmp_path)


@pytest.mark.parametrize("make", [llama, tied_llama])
@pytest.mark.parametrize("where", [None, ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_folders_of_pefts_own_method(make: Callable[[], Any], where: list[str] | None, tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=list(TOKENS), target_modules=where)
    if make is tied_llama and where:
        return  # PEFT cannot compute with both; for the head alone, see below
    model = peft.get_peft_model(make(), config)
    save_moved(model, tmp_path / "theirs")
    found = make()
    adapter = reparam.load(found, tmp_path / "theirs")
    assert adapter.method == reparam.Tokens(ids=TOKENS)
    assert (logits(found) - logits(make())).abs().max() > 0.1
    assert_equal_but_for_rounding(logits(found), logits(model).detach())
    assert adapter.tied == ({"lm_head": EMBEDDING} if make is tied_llama else {})
    check_back(make, found, adapter, tmp_path, logits(model).detach())


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_rows_of_the_head_alone_on_tied_weights_are_refused(tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=[1], target_modules=["lm_head"])
    peft.get_peft_model(tied_llama(), config).save_pretrained(str(tmp_path))
    with pytest.raises(reparam.FormatError, match=r"lm_head shares its weight with model\.embed_tokens"):
        reparam.load(tied_llama(), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_indices": [72]}, r"embed_tokens\.values has shape \[2, 32\]"),
        ({"token_indices": [72, 99]}, "none for the token 99"),
        ({"token_indices": [72, 72]}, "token_indices: Tokens: ids: list at least one token, and each of them once"),
        ({"token_indices": None}, "token_indices: Tokens: ids: list at least one token"),
        ({"token_indices": "72"}, "trainable_token_indices"),
        ({"gates": [1]}, "gates = .*: unknown key"),
        ({"target_modules": ["nothing"]}, None),
    ],
    ids=str,
)
def test_odd_folders_of_pefts_own_method(change: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=[72, 28])
    peft.get_peft_model(llama(), config).save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **change}))
    if words is None:
        reparam.load(llama(), tmp_path)
        return
    with pytest.raises(reparam.FormatError, match=words):
        reparam.load(llama(), tmp_path)


def test_what_pefts_own_method_cannot_hold(tmp_path: Path) -> None:
    adapter = reparam.attach(llama(), reparam.Tokens(ids=TOKENS), modules_to_save=["lm_head"])
    with pytest.raises(reparam.FormatError, match="TRAINABLE_TOKENS trains neither biases nor whole modules"):
        adapter.save(tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()
