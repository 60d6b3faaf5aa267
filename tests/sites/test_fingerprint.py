"""What a base's fingerprint sees, and what it does not depend on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters import trained
from models import bert, gpt2, llama, t5, tied_llama

import reparam
from reparam.sites.fingerprint import agree, fingerprint


@pytest.mark.parametrize("make", [llama, tied_llama, gpt2, bert, t5])
def test_fingerprint_is_of_the_base_alone(make: Callable[[], Any]) -> None:
    model = make()
    before = fingerprint(model)
    assert before == fingerprint(make())
    trained(model, targets="all-linear", name="a", modules_to_save=["final_layer_norm"] if make is t5 else [])
    assert fingerprint(model) == before
    if make is llama:
        trained(model, targets=["embed_tokens", "lm_head"], modules_to_save=["model.norm"], name="b")
        assert fingerprint(model) == before
    reparam.select(model, None)
    assert fingerprint(model) == before
    for name in list(reparam.adapters(model)):
        reparam.remove(model, name)
    assert fingerprint(model) == before


def test_fingerprint_notices_each_matrix_that_was_trained() -> None:
    before = fingerprint(llama())
    for name, _ in llama().named_parameters():
        model = llama()
        model.get_parameter(name).data *= 1.001
        assert not agree(fingerprint(model), before), name


def test_fingerprint_notices_names_and_shapes() -> None:
    def zeros(name: str, *shape: int) -> dict[str, str]:
        module = torch.nn.Module()
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
        return fingerprint(module)

    assert agree(zeros("a", 2, 6), zeros("a", 2, 6))
    assert not agree(zeros("a", 2, 6), zeros("a", 6, 2))
    assert not agree(zeros("a", 2, 6), zeros("b", 2, 6))
    assert not agree(zeros("a", 12), zeros("a", 13))
    assert not agree(zeros("a"), zeros("a", 1))
    assert agree(zeros("a", 0), zeros("a", 0))


def test_fingerprint_looks_at_every_column_of_a_matrix() -> None:
    """Places at a fixed distance would all lie in one column of a matrix whose width is a power of two."""
    a, b = torch.nn.Linear(64, 256, bias=False), torch.nn.Linear(64, 256, bias=False)
    b.weight.data = a.weight.data.clone()
    seen = set()
    for column in range(64):
        b.weight.data[:, column] += 1
        seen |= {column} if not agree(fingerprint(a), fingerprint(b)) else set()
        b.weight.data[:, column] = a.weight.data[:, column]
    assert len(seen) > 55


def test_fingerprint_copies_no_matrix() -> None:
    """A model that has no storage for more than a few bytes: every element of the matrices is the same number."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight = torch.nn.Parameter(torch.ones(1).expand(1 << 20, 1 << 20), requires_grad=False)  # 4 TiB if copied
    assert fingerprint(model)
