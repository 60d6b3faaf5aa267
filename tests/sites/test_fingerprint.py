"""What a base's fingerprint detects, and what it does not depend on."""

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from adapters import trained
from models import IDS, bert, gpt2, llama, logits, t5, tied_llama

import reparam
from reparam.sites.fingerprint import agree, base_tensors, fingerprint


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
    """Samples at a fixed stride would all be in one column of a matrix whose width is a power of two."""
    a, b = torch.nn.Linear(64, 256, bias=False), torch.nn.Linear(64, 256, bias=False)
    b.weight.data = a.weight.data.clone()
    seen = set()
    for column in range(64):
        b.weight.data[:, column] += 1
        seen |= {column} if not agree(fingerprint(a), fingerprint(b)) else set()
        b.weight.data[:, column] = a.weight.data[:, column]
    assert len(seen) > 55


def test_fingerprint_copies_no_matrix() -> None:
    """A model with expanded matrices, whose storage has only a few bytes."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight = torch.nn.Parameter(torch.ones(1).expand(1 << 20, 1 << 20), requires_grad=False)  # 4 TiB if copied
    assert fingerprint(model)


def test_a_fingerprint_is_of_the_base_whatever_is_on_it() -> None:
    plain = fingerprint(models.gpt2())
    model = models.gpt2()
    reparam.attach(model, reparam.LoRA(r=2), targets=["all-linear", "wte"], modules_to_save=["lm_head"], bias=True)
    with reparam.select(model, ["default", None, "default"]), torch.no_grad():
        logits(model)
        assert fingerprint(model) == plain
    assert {name for name, _ in base_tensors(model)} == {name for name, _ in models.gpt2().named_parameters()}
    own = dict(models.gpt2().named_parameters())
    assert all(torch.equal(tensor, own[name]) for name, tensor in base_tensors(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_fingerprint_survives_the_dtype_a_model_is_loaded_in(dtype: torch.dtype) -> None:
    """Saved in 16 bits, and loaded in 16 or 32 bits."""
    model = models.llama().to(dtype)
    assert agree(fingerprint(model), fingerprint(copy.deepcopy(model).float()))


def test_a_fingerprint_tells_models_apart() -> None:
    plain = fingerprint(models.llama())
    model = models.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    models.loss(model, IDS).backward()
    optimizer.step()
    assert not agree(fingerprint(model), plain)
    assert not agree(fingerprint(models.llama(hidden_size=16)), plain)
    assert agree(fingerprint(models.llama()), plain)
