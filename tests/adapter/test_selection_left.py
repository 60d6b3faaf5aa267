"""A selection leaves nothing behind after `with`, errors, removing, merging and copying."""

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import IDS, logits
from selecting import change, close, moved, two, under

import reparam


def test_with_puts_the_choice_back() -> None:
    model = two()
    a, mixed = logits(model), under(model, ["b", None, "a"])
    with reparam.select(model, "b"):
        with reparam.select(model, ["b", None, "a"]):
            with reparam.select(model, None):
                assert torch.equal(logits(model), logits(models.llama()))
            assert torch.equal(logits(model), mixed)
        assert not close(logits(model), a)
    assert torch.equal(logits(model), a)
    assert not model._forward_pre_hooks


class BreakError(Exception):
    """Raised in the middle of a forward."""


@pytest.mark.parametrize("which", [None, "b", ["b", None, "a"]], ids=str)
def test_an_exception_in_a_forward_leaves_no_routing(which: Any) -> None:
    model = two()
    y = logits(model)

    def fail(*_: Any) -> None:
        raise BreakError

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(BreakError), reparam.select(model, which):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), y)
    assert torch.equal(logits(model, IDS[:2]), y[:2]) or close(logits(model, IDS[:2]), y[:2])
    assert not model._forward_pre_hooks


def test_leaving_a_mixed_batch_frees_the_length() -> None:
    model = two()
    with reparam.select(model, ["a", "b"]):
        logits(model, IDS[:2])
    for rows in (1, 2, 3):
        logits(model, IDS[:rows])
    reparam.select(model, ["a", "b"])
    reparam.select(model, None)
    logits(model)
    assert not model._forward_pre_hooks


def test_a_refused_list_leaves_a_mixed_batch_as_it_was() -> None:
    model = two()
    reparam.select(model, ["a", "b", None])
    mixed = logits(model)
    with pytest.raises(ValueError, match="no adapter is named 'x'"):
        reparam.select(model, ["x", "a", "b"])
    assert torch.equal(logits(model), mixed)
    with pytest.raises(ValueError, match="3 adapter names"):
        logits(model, IDS[:2])


@pytest.mark.parametrize("which", ["a", ["a", None, "b"]], ids=str)
def test_removing_the_chosen_adapter_selects_the_base(which: Any) -> None:
    model = two()
    reparam.select(model, which)
    reparam.remove(model, "a")
    base = logits(models.llama())
    assert torch.equal(logits(model), base)
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match=r"no adapter is named 'a'.*the model has: b"):
        reparam.remove(model, "a")
    assert not close(under(model, "b"), base)


def test_removing_another_keeps_the_choice() -> None:
    model = two()
    y = logits(model)
    reparam.remove(model, "b")
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("make", list(models.ALL.values()), ids=list(models.ALL))
@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds", "ignore:targets. skipped .*experts")
def test_removing_all_gives_the_plain_model_back(make: Callable[[], Any]) -> None:
    plain, model = make(), two(make)
    under(model, ["a", "b", None])
    reparam.remove(model, "b")
    reparam.remove(model, "a")
    assert str(model) == str(plain)
    assert models.same(models.frozen(model), models.frozen(plain))
    assert torch.equal(logits(model), logits(plain))
    assert not hasattr(model, "reparam_state")
    assert vars(model).keys() == vars(plain).keys()
    moved(model, "a", 1)  # and it can be adapted again
    assert torch.equal(logits(model), under(two(make), "a"))


@pytest.mark.parametrize("before", ["a", ["a", "b", None]], ids=str)
def test_merging_inside_with_leaves_the_merged_model(before: Any) -> None:
    model = two()
    reparam.select(model, before)
    with reparam.select(model, "b"):
        y = logits(model)
        reparam.merge(model)
    assert close(logits(model), y)
    assert str(model) == str(models.llama())
    assert not model._forward_pre_hooks


def test_removing_inside_with_what_was_chosen_before_leaves_the_base() -> None:
    model = two()
    with reparam.select(model, "b"):
        reparam.remove(model, "a")
        assert not close(logits(model), logits(models.llama()))
    assert torch.equal(logits(model), logits(models.llama()))
    with reparam.select(model, None):
        reparam.remove(model, "b")
    assert str(model) == str(models.llama())


def test_a_copy_made_during_a_mixed_batch_is_apart() -> None:
    model = two()
    reparam.select(model, ["a", "b", None])
    twin = copy.deepcopy(model)
    mixed = logits(model)
    assert torch.equal(logits(twin), mixed)
    reparam.select(twin, ["b", "a"])
    logits(twin, IDS[:2])
    assert torch.equal(logits(model), mixed)
    reparam.select(twin, None)
    assert not twin._forward_pre_hooks
    assert len(model._forward_pre_hooks) == 1
    change(reparam.adapters(twin)["a"], 9)
    assert torch.equal(logits(model), mixed)
    assert torch.equal(under(model, ["a", "b", None]), mixed)
