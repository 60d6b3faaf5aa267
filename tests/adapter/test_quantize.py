"""Quantizing whole models, with and without adapters, and the report of it."""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import models
import pytest
import torch
from adapters import trained
from models import IDS, llama, logits
from quantized_models import ENTRIES, error, every, matrices, quantized, stock
from torch import Tensor, nn

import reparam
from reparam import NF4, LoRA
from reparam.core.base import Factors, Role, Site, Storage, Update, Weight
from reparam.core.method import Method
from reparam.sites.embedding import Embedding
from reparam.sites.linear import Linear
from reparam.sites.module import Adapted

# ---- what quantizing does


@every
def test_a_quantized_model_is_the_model_with_rounded_matrices(storage: Storage) -> None:
    model = quantized(storage)
    found = matrices(model)
    assert len(found) == 14
    assert error(logits(model), logits(stock(llama(), found))) < 1e-5
    assert 1e-4 < error(logits(model), logits(llama())) < 0.5
    original = llama()
    for path, matrix in found.items():
        assert torch.equal(matrix, storage.quantize(original.get_submodule(path).weight).dense())


@every
def test_before_an_adapter_or_after_it_is_the_same_bit_for_bit(storage: Storage) -> None:
    settings: dict[str, Any] = {"method": LoRA(r=3), "targets": "all-linear"}
    before = quantized(storage)
    base = logits(before)
    trained(before, **settings)
    after = llama()
    trained(after, **settings)
    reparam.quantize(after, storage)
    assert torch.equal(logits(after), logits(before))
    assert after.state_dict().keys() == before.state_dict().keys()
    assert error(logits(after), base) > 1e-2
    for model in (before, after):
        with reparam.select(model, None):
            assert torch.equal(logits(model), base)


@every
def test_quantizing_under_several_adapters_and_a_mixed_batch(storage: Storage) -> None:
    """Each row equals the output of its adapter alone on the quantized base."""
    model = llama()
    for seed, (name, targets) in enumerate({"a": "all-linear", "b": "attention"}.items()):
        trained(model, seed=seed, name=name, targets=targets, method=LoRA(r=2 + seed))
    rows = ["b", None, "a"]
    reparam.select(model, rows)
    dense = logits(model)
    reparam.quantize(model, storage)
    assert model.reparam_state.choice == rows
    mixed = logits(model)
    assert error(mixed, dense) > 1e-4
    for row, name in enumerate(rows):
        reparam.select(model, name)
        assert error(mixed[row], logits(model)[row]) < 1e-5
    assert torch.equal(mixed[1], logits(quantized(storage))[1])


class Rescaled(Update):
    """Scales the rows of W to length `size`, so its factors in a bank depend on the frozen matrix."""

    roles: ClassVar[Mapping[str, Role]] = {"size": "gain"}

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.size = nn.Parameter(weight.dense().norm(dim=1) * 1.5)  # [O]

    def factors(self, weight: Weight) -> Factors:
        none = self.size.new_zeros(1, weight.in_features), self.size.new_zeros(weight.out_features, 1)
        return Factors(*none, self.size / weight.dense().norm(dim=1))

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return weight(x) * self.factors(weight).gain


@dataclasses.dataclass(frozen=True)
class Rescale(Method):
    name: ClassVar[str] = "rescale"

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        return Rescaled(weight)


@every
def test_a_mixed_batch_follows_the_matrix_that_its_adapters_look_at(storage: Storage) -> None:
    model = llama()
    reparam.attach(model, Rescale(), name="a")
    reparam.select(model, [None, "a"])
    dense = logits(model, IDS[:2])
    reparam.quantize(model, storage)
    mixed = logits(model, IDS[:2])
    reparam.select(model, "a")
    assert error(mixed[1], dense[1]) > 1e-4
    assert error(mixed[1], logits(model, IDS[:2])[1]) < 1e-5


def test_an_adapter_on_some_sites_leaves_the_others_quantized() -> None:
    model = quantized()
    base = logits(model)
    trained(model, targets="q_proj")
    assert len(matrices(model)) == 14
    reparam.remove(model, "default")
    assert len(matrices(model)) == 14
    assert torch.equal(logits(model), base)
    trained(model, targets=["up_proj", "lm_head"], name="other")
    with reparam.select(model, None):
        assert torch.equal(logits(model), base)
    reparam.remove(model, "other")
    assert isinstance(model.lm_head, nn.Linear)


def test_the_head_and_the_embedding_stay_unless_they_are_named() -> None:
    model = quantized()
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    model = quantized(targets=["embed_tokens", "lm_head", "re:.*layers.1.*q_proj"])
    assert set(matrices(model)) == {"lm_head", "model.embed_tokens", "model.layers.1.self_attn.q_proj"}
    assert isinstance(model.model.embed_tokens, Embedding)
    table = model.model.embed_tokens.frozen.dense()
    assert torch.equal(model.model.embed_tokens(IDS), table[IDS])
    assert error(logits(model), logits(stock(llama(), matrices(model)))) < 1e-5


@every
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "qwen_moe"])
def test_other_architectures(name: str, storage: Storage) -> None:
    """`Conv1D`, biases, an encoder, an encoder-decoder, and fused experts."""
    make = models.ALL[name]
    model = make()
    with warnings.catch_warnings(record=name == "qwen_moe"):
        reparam.quantize(model, storage)
        found = matrices(model)
        assert found
        if name != "gpt2":
            assert error(logits(model), logits(stock(make(), found))) < 1e-5
        trained(model, targets="all-linear")
        y = logits(model)
        reparam.merge(model)
    assert not matrices(model)
    assert error(logits(model), y) < 1e-5


def test_a_transposed_matrix_is_quantized_as_it_is_applied() -> None:
    plain, model = models.gpt2(), models.gpt2()
    reparam.quantize(model, "nf4", targets="c_attn")
    block, original = model.transformer.h[0].attn.c_attn, plain.transformer.h[0].attn.c_attn
    assert (block.frozen.out_features, block.frozen.in_features) == (96, 32)
    assert torch.equal(block.frozen.dense(), NF4().quantize(original.weight.t()).dense())
    x = torch.randn(2, 32)
    torch.testing.assert_close(block(x), x @ block.frozen.dense().T + original.bias)
    reparam.quantize(model, "dense", targets="c_attn")
    back = model.transformer.h[0].attn.c_attn
    assert type(back) is type(original)
    assert back.weight.shape == original.weight.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@every
def test_a_model_keeps_its_dtype(storage: Storage, dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    reparam.quantize(model, storage)
    assert logits(model).dtype == dtype
    whole = matrices(model)
    moved = quantized(storage).to(dtype)  # quantized from float32, so that the matrices are others
    assert logits(moved).dtype == dtype
    assert error(logits(moved).float(), logits(model).float()) < 0.1
    reparam.quantize(model, "dense")
    for path, matrix in whole.items():
        assert torch.equal(model.get_submodule(path).weight, matrix.to(dtype))


@every
def test_the_dense_matrices_are_let_go(storage: Storage) -> None:
    for attached in (False, True):
        model = llama()
        if attached:
            trained(model, targets="all-linear")
        weights = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear | Linear)]
        refs = [weakref.ref(w if isinstance(w, Tensor) else w.dense_or_none) for w in weights]
        assert len(refs) == 14
        del weights
        reparam.quantize(model, storage)
        gc.collect()
        assert [ref() for ref in refs] == [None] * 14
        inside = [p for m in model.modules() if isinstance(m, Adapted) for p in m.origin[0].parameters()]
        assert all(p.is_meta or p.ndim == 1 for p in inside)


# ---- what is told about it


def test_the_report_says_what_is_held_and_what_was() -> None:
    model = llama()
    report = reparam.quantize(model, NF4(32, double=False))
    assert report.storage == NF4(32, double=False)
    assert sum(site.entries for site in report.sites) == ENTRIES
    assert sum(site.before for site in report.sites) == 4 * ENTRIES
    assert sum(site.bytes for site in report.sites) == ENTRIES // 2 + 4 * ENTRIES // 32
    assert report.bits == 5
    assert report.left == {"model.embed_tokens.weight": 97 * 32 * 4, "lm_head.weight": 97 * 32 * 4}
    assert str(report) == (
        "quantized 14 matrices into nf4 (block=32, double=False): 60 KiB -> 9.375 KiB, 5 bits per entry; not "
        "quantized: model.embed_tokens.weight, lm_head.weight (24.25 KiB)"
    )
    held = [p for m in model.modules() if isinstance(m, Adapted) for p in m.frozen.parameters()]
    assert sum(p.nbytes for p in held) == sum(site.bytes for site in report.sites)


def test_the_report_lists_everything_large_that_is_left() -> None:
    """Parameters of an adapted model, of modules trained whole, and of the root module."""
    model = llama()
    model.register_parameter("prefix", nn.Parameter(torch.zeros(3, 32)))
    trained(model, targets=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    report = reparam.quantize(model, "int8", targets="q_proj")
    names = {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    ends = [name.split(".")[-2] for name in report.left if ".layers." in name]
    assert sorted(ends) == sorted(2 * list(names))
    assert {name for name in report.left if ".layers." not in name} == {
        "prefix", "model.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip


def test_experts_are_quantized_and_dequantized_again() -> None:
    model = models.mixtral()
    before = models.frozen(model)
    report = reparam.quantize(model, "nf4")
    assert len(report.sites) == 24
    assert not [name for name in report.left if "experts" in name]
    assert not [name for name, p in model.named_parameters() if p.ndim == 3]
    dense = {path: site.frozen.dense().clone() for path, site in model.named_modules() if hasattr(site, "frozen")}
    y = logits(model)
    reparam.quantize(model, "dense")
    assert str(model) == str(models.mixtral())
    assert torch.equal(logits(model), y)
    after = models.frozen(model)
    assert after.keys() == before.keys()
    assert torch.equal(
        after["model.layers.1.mlp.experts.down_proj"][3], dense["model.layers.1.mlp.experts.3.down_proj"]
    )
