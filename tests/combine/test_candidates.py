"""Rows with their own weights: each equals the sum that `blend` writes, and the model stays unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters import assert_equal_but_for_rounding, trained
from models import IDS, frozen, gpt2, llama, logits, same, t5

import reparam
from reparam import DoRA, FormatError, LoRA
from reparam.combine.blend import blend
from reparam.combine.candidates import candidates
from reparam.combine.operands import Operand

WEIGHTS = torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (llama, ["q_proj", "up_proj"]),
    "embedding": (llama, ["embed_tokens", "v_proj"]),
    "conv1d": (gpt2, ["c_attn", "c_fc"]),
    "encoder and decoder": (t5, ["q", "wi"]),
}


def parts(make: Callable[[], Any], targets: list[str], **settings: Any) -> list[Operand]:
    methods = [LoRA(r=2, alpha=4), LoRA(r=2, alpha=1), LoRA(r=2, scaling="rslora")]
    return [
        Operand(str(seed), trained(make(), seed=seed, targets=targets, **{"method": method, **settings}).record())
        for seed, method in enumerate(methods)
    ]


@pytest.mark.parametrize("space", ["delta", "factor"])
@pytest.mark.parametrize("case", MODELS)
def test_each_row_is_the_sum_that_is_written(case: str, space: str) -> None:
    make, targets = MODELS[case]
    operands = parts(make, targets)
    model = make()
    before, base = frozen(model), logits(model)
    with candidates(model, operands, space=space) as gates:
        gates.rows = WEIGHTS
        found = logits(model)
        gates.rows = None
        assert torch.equal(logits(model), base)
    assert same(frozen(model), before)
    for row, weights in enumerate(WEIGHTS.tolist()):
        one = make()
        blend([s.record for s in operands], weights, space=space).put(one)
        assert_equal_but_for_rounding(found[row], logits(one)[row])
        assert row == 1 or (found[row] - base[row]).abs().max() > 0.01
    assert torch.equal(found[1], base[1])


def test_adapters_of_different_ranks_and_sites_in_delta() -> None:
    one = Operand("one", trained(llama(), seed=1, method=LoRA(r=3)).record())
    two = Operand("two", trained(llama(), seed=2, targets=["v_proj", "up_proj"]).record())
    model = llama()
    with candidates(model, [one, two]) as gates:
        gates.rows = WEIGHTS[:, :2]
        found = logits(model)
    expected = llama()
    blend([one.record, two.record], WEIGHTS[0, :2].tolist()).put(expected)
    assert_equal_but_for_rounding(found[0], logits(expected)[0])
    with pytest.raises(FormatError, match="adapt different modules"), candidates(model, [one, two], space="factor"):
        pass


def test_the_model_is_as_it_was_after_an_exception_too() -> None:
    model = llama()
    model.lm_head.requires_grad_(False)
    trained(model, name="own")
    reparam.select(model, "own")
    expected, trains = logits(model), [name for name, p in model.named_parameters() if p.requires_grad]

    def broken() -> None:
        with candidates(model, parts(llama, ["q_proj"])) as gates:
            gates.rows = WEIGHTS
            raise KeyError("f failed")

    with pytest.raises(KeyError):
        broken()
    assert torch.equal(logits(model), expected)
    assert list(reparam.adapters(model)) == ["own"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trains
    plain = llama()
    kinds = {name: type(m) for name, m in plain.named_modules()}
    with candidates(plain, parts(llama, ["q_proj"])):
        pass
    assert {name: type(m) for name, m in plain.named_modules()} == kinds
    assert all(p.requires_grad for p in plain.parameters())


def test_what_cannot_be_searched() -> None:
    model = llama()
    good = parts(llama, ["q_proj"])

    def refused(operands: list[Operand], message: str, space: str = "delta") -> None:
        with pytest.raises(ValueError, match=message), candidates(model, operands, space=space):
            pass
        assert not hasattr(model, "reparam_state")

    refused([], "no adapters are given")
    refused(good, "expected 'delta' or 'factor'", space="ties")
    refused([Operand("d", trained(llama(), method=DoRA(r=2)).record())], "its gain also scales the frozen matrix")
    refused(parts(llama, ["q_proj"], modules_to_save=["lm_head"]), "trains lm_head whole")
    wide = trained(llama(hidden_size=64)).record()
    refused([Operand("w", wide)], "different weights than the given base")
    bare = Operand("w", type(wide)(wide.method, wide.sites, wide.tensors))
    refused([bare], r"linear, 32 x 32, in the base, not 64 x 64")
    with candidates(model, good) as gates:
        gates.rows = WEIGHTS[:2].expand(2, 3)
        with pytest.raises(ValueError, match="21 tokens cannot be divided among 2 rows"):
            logits(model, IDS)
