"""What quantizing a model refuses."""

from __future__ import annotations

import models
import pytest
from models import llama, logits
from quantized_models import quantized
from torch import nn

import reparam
from reparam import NF4
from reparam.core.base import Storage


@pytest.mark.parametrize("first", ["nf4", "int8"])
@pytest.mark.parametrize("second", ["nf4", "int8", NF4(32)])
def test_quantizing_twice_is_refused(first: str, second: str | Storage) -> None:
    model = quantized(first, targets="v_proj")
    before = models.frozen(model)
    for targets in ("all-linear", "v_proj"):
        with pytest.raises(ValueError, match=rf"layers.0.self_attn.v_proj is {first} already.*load the original"):
            reparam.quantize(model, second, targets=targets)
    assert models.same(models.frozen(model), before)
    reparam.quantize(model, second, targets=["q_proj", "k_proj"])


def test_many_problems_are_told_at_once_and_shortened() -> None:
    model = quantized()
    with pytest.raises(ValueError, match="quantizing again adds error") as caught:
        reparam.quantize(model, "nf4")
    assert str(caught.value).count("already") == 5
    assert str(caught.value).endswith("; and 9 more")


def test_tied_matrices_are_refused_with_a_way_out() -> None:
    model = models.tied_llama()
    before = models.frozen(model)
    for targets in ("embed_tokens", "lm_head", ["embed_tokens", "lm_head", "all-linear"]):
        with pytest.raises(ValueError, match=r"shares its weight with .*reparam\.untie\(model\) or leave it out"):
            reparam.quantize(model, "nf4", targets=targets)
    assert models.same(models.frozen(model), before)
    reparam.quantize(model, "nf4")
    reparam.untie(model)
    reparam.quantize(model, "nf4", targets="embed_tokens")
    assert isinstance(model.lm_head, nn.Linear)


def test_unknown_names_are_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"unknown storage 'nf5' \(did you mean 'nf4'\?\)"):
        reparam.quantize(model, "nf5")
    with pytest.raises(ValueError, match=r"'q_prj' matches no module \(did you mean 'q_proj'"):
        reparam.quantize(model, "nf4", targets="q_prj")
    with pytest.raises(ValueError, match="norm"):
        reparam.quantize(model, "nf4", targets="model.norm")
    assert models.same(models.frozen(model), models.frozen(llama()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_matrix_with_nan_is_named_and_the_model_stays_usable(name: str) -> None:
    """Matrices before it are quantized already; this one and all after it are unchanged."""
    end = {"llama": "layers.1.self_attn.q_proj", "gpt2": "h.1.attn.c_attn"}[name]
    model = models.ALL[name]()
    path = next(path for path, _ in model.named_modules() if path.endswith(end))
    bad = model.get_submodule(path).weight
    bad.data[0, 1] = float("nan")
    with pytest.raises(ValueError, match=rf"{path}: nf4: the matrix contains NaN"):
        reparam.quantize(model, "nf4")
    module = model.get_submodule(path)
    assert type(module) is type(models.ALL[name]().get_submodule(path))
    assert module.weight.shape == bad.shape
    assert module.weight.requires_grad
    assert int(module.weight.isnan().sum()) == 1
    module.weight.data.nan_to_num_()
    assert logits(model).isfinite().all()
    left = [other for other, m in model.named_modules() if isinstance(m, type(module)) and other != "lm_head"]
    assert left[0] == path
    reparam.quantize(model, "nf4", targets=left)
    assert logits(model).isfinite().all()
