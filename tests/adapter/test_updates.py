"""The update of one site of a loaded adapter, compared with the adapter on its model."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from cases import move

import reparam
from reparam.adapter.updates import update_of
from reparam.core.base import Site
from reparam.errors import FormatError
from reparam.weights.dense import zero_weight

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "dora": {"r": 2},
    "adalora": {"init_r": 2, "target_r": 1},
    "intrinsic": {"d": 20},
    "full": {},
    "bitfit": {"create": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_record_gives_the_updates_that_its_model_has(name: str) -> None:
    adapter = reparam.attach(models.llama(), name, targets="q_proj", **SETTINGS[name])
    move(adapter, 1)
    record = adapter.record()
    for site, expected in adapter.updates.items():
        weight = adapter.modules[site].frozen
        found = update_of(record, site, weight)
        assert found.state_dict().keys() == expected.state_dict().keys()
        for one, other in zip(found.factors(weight), expected.factors(weight), strict=True):  # type: ignore[operator]
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def test_values_of_64_bits_are_not_rounded_on_the_way() -> None:
    adapter = reparam.attach(models.llama(), "lora", targets="q_proj", r=2)
    record = adapter.record()
    exact = {key: torch.full_like(t, 1 / 3, dtype=torch.float64) for key, t in record.tensors.items()}
    site = next(iter(record.sites.values()))
    zero = zero_weight(site.out_features, site.in_features)
    update = update_of(dataclasses.replace(record, tensors=exact), site.name, zero, dtype=torch.float64)
    assert torch.equal(update.A, exact[f"{site.name}.A"])
    assert not bool(zero.tensor().any())
    assert zero.tensor().untyped_storage().nbytes() == 4


@pytest.mark.parametrize("change", [{}, {"A": torch.ones(3, 5)}])
def test_tensors_that_do_not_fit_are_refused_by_the_name_of_their_site(change: dict[str, torch.Tensor]) -> None:
    adapter = reparam.attach(models.llama(), "lora", targets="q_proj", r=2)
    record = adapter.record()
    site = next(iter(record.sites))
    kept = {key: t for key, t in record.tensors.items() if not key.endswith(".A")}
    wrong = dataclasses.replace(record, tensors=kept | {f"{site}.{key}": t for key, t in change.items()})
    with pytest.raises(FormatError, match=f"{site}: the tensors do not fit the adapter's settings"):
        update_of(wrong, site, adapter.modules[site].frozen)


def test_a_check_refuses_and_says_nothing_else_and_notes_are_sentences() -> None:
    sites = [Site("a", "linear", 4, 4)]
    method = reparam.LoRA(r=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.check(sites)
        assert method.shared(sites) is None
        (note,) = method.notes(sites)
    assert "exceeds min(out_features, in_features) at 1 site (first: a, 4 x 4)" in note
    with pytest.raises(ValueError, match="matches none"):
        reparam.LoRA(rank_pattern={"b": 2}).check(sites)
    with pytest.raises(ValueError, match="raise d"):
        reparam.Intrinsic(d=1, mode="said").check(sites)
    assert reparam.Intrinsic(d=17).notes(sites)
    assert not reparam.Intrinsic(d=16).notes(sites)


def test_a_note_that_is_an_error_leaves_the_model_as_it_was() -> None:
    model = models.llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="the rank exceeds min"):
            reparam.attach(model, "lora", r=33, targets="q_proj")
    assert not reparam.adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_that_is_read_does_not_repeat_the_notes(tmp_path: Path) -> None:
    model = models.llama()
    with pytest.warns(UserWarning, match="the rank exceeds min"):
        reparam.attach(model, "lora", r=33, targets="q_proj", name="high").save(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reparam.load(model, tmp_path / "a", name="again")
