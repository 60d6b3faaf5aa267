"""Selecting one adapter, none, or one for each row."""

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import IDS, logits
from selecting import check_rows, close, moved, two, under
from torch import nn

import reparam

# ---- one or none


def test_one_is_used_at_a_time() -> None:
    model = two()
    outputs = {name: under(model, name) for name in ("a", "b", None)}
    base = logits(models.llama())
    assert torch.equal(outputs[None], base)
    assert not close(outputs["a"], outputs["b"])
    assert not close(outputs["a"], base)
    reparam.select(model, "b")
    assert torch.equal(logits(model), outputs["b"])
    reparam.select(model, None)
    assert torch.equal(logits(model), base)
    assert reparam.adapters(model).keys() == {"a", "b"}


@pytest.mark.parametrize("which", ["aa", ["a", "aa", None], ["aa"], [3]])
def test_an_unknown_name_is_refused_at_once_and_the_choice_stays(which: Any) -> None:
    model = two()
    y = logits(model)
    with pytest.raises(ValueError, match=r"no adapter is named ('aa' \(did you mean 'a'\?\)|3); the model has: a, b"):
        reparam.select(model, which)
    assert torch.equal(logits(model), y)


def test_a_model_without_adapters_says_so() -> None:
    model = models.llama()
    assert reparam.adapters(model) == {}
    for use in (reparam.select, reparam.remove):
        with pytest.raises(ValueError, match="this LlamaForCausalLM has no adapter on it; attach or load one first"):
            use(model, "a")


def test_a_name_that_cannot_be_one_is_refused_and_leaves_nothing() -> None:
    model = models.llama()
    before = str(model)
    for name, message in {
        "": "letters, digits",
        "a.b": "letters, digits",
        "*": "letters, digits",
        "keys": "an attribute of PyTorch's ModuleDict",
        "copy": "an attribute of PyTorch's ModuleDict",
        "training": "an attribute of PyTorch's ModuleDict",
        "_modules": "an attribute of PyTorch's ModuleDict",
    }.items():
        with pytest.raises(ValueError, match=message):
            reparam.attach(model, reparam.LoRA(), name=name)
    assert str(model) == before
    moved(model, "a", 1)
    with pytest.raises(ValueError, match=r"name='a' is taken; remove\(model, 'a'\) first"):
        reparam.attach(model, reparam.LoRA(), name="a")


# ---- a mixed batch


def test_rows_may_be_any_sequence() -> None:
    model = two()
    expected = under(model, ["a", None, "b"])
    assert torch.equal(under(model, ("a", None, "b")), expected)
    assert torch.equal(under(model, iter(["a", None, "b"])), expected)
    with pytest.raises(ValueError, match="the list is empty; pass one name, or None, for each row"):
        reparam.select(model, [])


@pytest.mark.parametrize("make", list(models.ALL.values()), ids=list(models.ALL))
@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds", "ignore:targets. skipped .*experts")
def test_every_architecture_takes_mixed_batches(make: Callable[[], Any]) -> None:
    """Also if a layer gets rows and tokens in one dimension (a shared expert), or one vector per row (a pooler)."""
    model = two(make)
    check_rows(model, ["b", None, "a"])
    check_rows(model, ["a", "b", "a"])


@pytest.mark.parametrize("rows", [["a", None], ["a", "b", None, "a"], ["a"] * 21, [None]], ids=len)
def test_a_list_of_the_wrong_length_is_refused_before_any_compute(rows: list[str | None]) -> None:
    model = two()
    calls: list[nn.Module] = []
    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(lambda module, _: calls.append(module))
    reparam.select(model, rows)
    for batch in ({"input_ids": IDS}, {"inputs_embeds": torch.zeros(3, 7, 32)}):
        with pytest.raises(ValueError, match=rf"{len(rows)} adapter names, one per row, but .*\[3, 7"):
            model(**batch)
    with pytest.raises(ValueError, match="adapter names, one per row"):
        model(IDS)
    with pytest.raises(ValueError, match="adapter names, one per row"):
        model.generate(IDS, max_new_tokens=2)
    assert calls == []


def test_one_token_and_one_row() -> None:
    model = two()
    check_rows(model, ["b", "a", None], IDS[:, :1])
    check_rows(model, ["b"], IDS[:1])
    check_rows(model, ["b"], IDS[:1, :1])


def test_beams_are_rows() -> None:
    model = two()
    length = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with reparam.select(model, ["a", None, "b"]):
        found = model.generate(IDS, **length)
    with reparam.select(model, ["a", "a", None, None, "b", "b"]):
        assert torch.equal(model.generate(IDS, **length), found)
    for row, name in enumerate(["a", None, "b"]):
        with reparam.select(model, name):
            assert torch.equal(found[row], model.generate(IDS, **length)[row])


def test_padding_on_the_left_is_each_row_alone() -> None:
    model = two()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    length = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    with reparam.select(model, ["b", "a", None]):
        found = model.generate(IDS, **length)
    for row, name in enumerate(["b", "a", None]):
        with reparam.select(model, name):
            assert torch.equal(found[row], model.generate(IDS, **length)[row])


def test_an_encoder_and_a_decoder_generate_row_by_row() -> None:
    model = two(models.t5)
    length = {"max_new_tokens": 4, "do_sample": False}
    with reparam.select(model, ["b", "a", None]):
        found = model.generate(input_ids=IDS, **length)
        with pytest.raises(ValueError, match="to the 3 rows of the mixed batch"):
            model.generate(input_ids=IDS[:2], **length)
    for row, name in enumerate(["b", "a", None]):
        with reparam.select(model, name):
            assert torch.equal(found[row], model.generate(input_ids=IDS, **length)[row])


def test_rows_that_share_their_positions() -> None:
    """GPT-2 looks up position embeddings once for the whole batch."""
    model = models.gpt2()
    moved(model, "a", 1, targets=["wpe", "c_attn"])
    check_rows(model, ["a", None, "a"])


def test_adapters_on_different_sites_with_biases_and_embeddings() -> None:
    model = models.gpt2()
    moved(model, "a", 1, targets=["wte", "c_fc"], bias=True)
    moved(model, "b", 2, targets="attention", r=5)
    moved(model, "c", 3, bias=True)
    moved(model, "d", 4, targets=["wte", "lm_head"])
    rows: list[str | None] = ["a", "b", "c", "d", None, "a"]
    check_rows(model, rows, torch.cat([IDS, IDS.flip(0)]))


def test_an_adapter_that_comes_later_joins_the_bank() -> None:
    model = models.llama()
    moved(model, "a", 1, targets=["q_proj"])
    under(model, ["a", None, "a"])
    moved(model, "b", 2, targets=["v_proj", "q_proj"], r=4)
    moved(model, "c", 3, targets=["down_proj"])
    check_rows(model, ["c", "b", "a"])
    check_rows(model, ["a", None, "a"])


@pytest.mark.parametrize("make", [models.bert, models.llama])
def test_modules_that_are_trained_whole_go_by_row(make: Callable[[], Any]) -> None:
    model = make()
    head = "classifier" if make is models.bert else "lm_head"
    moved(model, "a", 1, modules_to_save=[head])
    moved(model, "b", 2)
    moved(model, "c", 3, modules_to_save=[head], targets="attention")
    ids = torch.cat([IDS, IDS[:2]])
    check_rows(model, ["b", "a", None, "c", "a"], ids)
    with reparam.select(model, ["a", None, "c"]), pytest.raises(ValueError, match="3 adapter names, one per row"):
        logits(model, ids)


def test_training_through_a_mixed_batch_is_refused() -> None:
    model = two().train()
    with reparam.select(model, ["a", "b", None]):
        with pytest.raises(ValueError, match="a mixed batch is for inference: select one adapter to train it"):
            models.scores(model)
        with torch.no_grad():
            logits(model)
