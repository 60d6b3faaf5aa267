"""Back from quantized models: dequantizing, merging, and adapters trained on other bases."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from adapters import trained
from models import llama, logits
from quantized_models import error, every, matrices, quantized, stock
from torch import nn

import reparam
from reparam import NF4, Int8
from reparam.core.base import Storage
from reparam.sites.fingerprint import agree, fingerprint
from reparam.sites.module import Adapted

# ---- the way back


@every
def test_unpacking_gives_the_stock_modules_back_with_the_rounded_values(storage: Storage) -> None:
    model = quantized(storage)
    y, found = logits(model), matrices(model)
    report = reparam.quantize(model, "dense")
    assert [type(m) for m in model.modules()] == [type(m) for m in llama().modules()]
    assert models.same(models.frozen(model), models.frozen(stock(llama(), found)))
    assert error(logits(model), y) < 1e-5
    assert report.bits == 32


def test_unpacking_under_an_adapter_keeps_it() -> None:
    model = quantized()
    adapter = trained(model)
    y = logits(model)
    reparam.quantize(model, "dense")
    assert matrices(model) == {}
    assert error(logits(model), y) < 1e-5
    assert isinstance(model.get_submodule("model.layers.0.self_attn.k_proj"), nn.Linear)
    assert set(adapter.modules) == {p for p, m in model.named_modules() if isinstance(m, Adapted)}
    reparam.remove(model, "default")
    assert [type(m) for m in model.modules()] == [type(m) for m in llama().modules()]


@every
def test_merging_gives_a_dense_model_and_restoring_the_quantized_one(storage: Storage) -> None:
    model = quantized(storage)
    trained(model, targets=["q_proj", "up_proj"])
    before, y = models.frozen(model), logits(model)
    report = reparam.merge(model, keep_base=True)
    assert min(report.survival().values()) > 0.999
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), nn.Linear)
    assert len(matrices(model)) == 10  # those without the adapter stay quantized
    assert error(logits(model), y) < 1e-5
    report.restore()
    assert models.same(models.frozen(model), before)
    assert torch.equal(logits(model), y)
    reparam.select(model, None)
    assert torch.equal(logits(model), logits(quantized(storage)))


# ---- adapters from elsewhere


@every
def test_an_adapter_goes_from_a_quantized_base_to_the_dense_one_and_back(storage: Storage, tmp_path: Path) -> None:
    sources = {"quantized": quantized(storage), "dense": llama()}
    for name, model in sources.items():
        trained(model, targets="all-linear").save(tmp_path / name)
    for saved in sources:
        for model in (quantized(storage), llama()):
            again = reparam.load(model, tmp_path / saved)
            assert models.same(again.tensors(), reparam.adapters(sources[saved])["default"].tensors())


def test_a_base_that_was_quantized_otherwise_is_told_apart(tmp_path: Path) -> None:
    ways = [quantized(NF4()), quantized(NF4(128)), quantized(NF4(double=False)), quantized(Int8())]
    prints = [fingerprint(model) for model in ways]
    for one in range(len(ways)):
        for other in range(len(ways)):
            same = one == other or 3 in (one, other)  # another storage altogether is not compared
            assert agree(prints[one], prints[other]) == same
    trained(ways[0]).save(tmp_path / "adapter")
    with pytest.raises(reparam.FormatError, match="trained on a base with different weights"):
        reparam.load(quantized(NF4(128)), tmp_path / "adapter")
    other = llama()
    other.model.norm.weight.data[0] += 0.01  # what is not quantized is compared between storages
    assert not agree(fingerprint(other), prints[0])


def test_the_fingerprint_of_a_quantized_base_does_not_depend_on_adapters() -> None:
    model = quantized()
    before = fingerprint(model)
    trained(model, targets=["q_proj", "lm_head", "embed_tokens"])
    assert fingerprint(model) == before
    reparam.remove(model, "default")
    assert fingerprint(model) == before
