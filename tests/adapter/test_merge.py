"""Merging an adapter into the weights: what is written, the report, and restoring."""

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import IDS, logits
from torch import Tensor, nn

import reparam
from reparam.adapter.fold import fold
from reparam.core.base import Factors
from reparam.weights.dense import DenseWeight


def adapted(make: Callable[[], Any] = models.llama, *, size: float = 0.15, **settings: Any) -> tuple[Any, Any]:
    """A model and an adapter whose parameters differ from their initial values."""
    model = make()
    settings.setdefault("targets", "all-linear")
    adapter = reparam.attach(model, reparam.LoRA(r=3, alpha=6), name="a", **settings)
    fill(adapter, size)
    return model, adapter


@torch.no_grad()
def fill(adapter: reparam.Adapter, size: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


# ---- the report


def survival(old: Tensor, written: Tensor, delta: Tensor) -> float:
    """The surviving share of `delta`, computed from dense float64 matrices."""
    change = written.double() - old.double()
    return float((change * delta).sum() / (delta * delta).sum())


@pytest.mark.filterwarnings("ignore:merging into")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("gained", [False, True])
def test_survival_is_that_of_dense_float64(dtype: torch.dtype, size: float, gained: bool) -> None:
    """With one block and with several: 300 x 400 elements do not fit one block."""
    generator = torch.Generator().manual_seed(4)
    W = torch.randn(300, 400, generator=generator).to(dtype)
    A, B = torch.randn(3, 400, generator=generator), size * torch.randn(300, 3, generator=generator)
    gain = 1 + size * torch.randn(300, generator=generator) if gained else None
    delta = B.double() @ A.double() + (0 if gain is None else (gain.double() - 1)[:, None] * W.double())
    weight, report = fold("here", DenseWeight(W.clone()), Factors(A, B, gain))
    written = weight.tensor()
    assert written.dtype == report.dtype == dtype
    precision = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    assert relative(written, W.double() + delta) < precision
    assert report.change == pytest.approx(float(delta.norm()), rel=1e-4)
    assert report.survival == pytest.approx(survival(W, written, delta), abs=2e-4)


@given(seed=st.integers(0, 99), rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_what_is_written_is_the_nearest_number(seed: int, rows: int, columns: int) -> None:
    """Accumulated in float32 and rounded once."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator).bfloat16()
    A, B = torch.randn(1, columns, generator=generator), torch.randn(rows, 1, generator=generator)
    weight, _ = fold("here", DenseWeight(W.clone()), Factors(A, B))
    assert torch.equal(weight.tensor(), (W.float() + B @ A).bfloat16())


def test_the_report_is_by_site_and_by_dtype() -> None:
    model, adapter = adapted()
    model.model.layers[0].mlp.bfloat16()
    for update in [u for site, u in adapter.updates.items() if "layers.0.mlp" in site]:
        update.float()
    before = {path: module.frozen.tensor().clone() for path, module in adapter.modules.items()}
    deltas = {path: u.factors(adapter.modules[path].frozen) for path, u in adapter.updates.items()}
    deltas = {path: (f.B.double() @ f.A.double()).detach() for path, f in deltas.items()}
    report = reparam.merge(model)
    assert [site.name for site in report.sites] == list(adapter.sites)
    assert {site.dtype for site in report.sites if "layers.0.mlp" in site.name} == {torch.bfloat16}
    for dtype, share in report.survival().items():
        mine = [site for site in report.sites if site.dtype == dtype]
        written = {site.name: model.get_submodule(site.name).weight for site in mine}
        flat = [torch.cat([t[s.name].double().flatten() for s in mine]) for t in (before, written, deltas)]
        assert share == pytest.approx(survival(*flat), abs=2e-4)
    assert set(report.survival()) == {torch.float32, torch.bfloat16}
    assert "merged 'a' into 14 sites" in str(report)
    assert "1.0000 in float32" in str(report)
    assert "in bfloat16" in str(report)


def test_a_change_that_is_rounded_away_is_a_warning() -> None:
    model, adapter = adapted(lambda: models.llama().bfloat16(), size=0.0)
    with torch.no_grad():
        for update in adapter.updates.values():
            update.B.fill_(1e-6)
    before = models.frozen(models.llama().bfloat16())
    with pytest.warns(UserWarning, match=r"merging into bfloat16 kept 0\.\d+ of the update.*float32") as caught:
        report = reparam.merge(model)
    assert caught[0].filename == __file__
    assert report.survival()[torch.bfloat16] < 0.5
    close = [torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()]
    assert sum(close) > len(close) / 2


def test_a_change_that_is_kept_is_none() -> None:
    for dtype in (torch.float32, torch.float16):
        model, _ = adapted(lambda dtype=dtype: models.llama().to(dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert min(reparam.merge(model).survival().values()) > 0.99


def test_a_fresh_adapter_merges_to_the_base() -> None:
    model = models.gpt2()
    reparam.attach(model, reparam.LoRA(), targets=["all-linear", "wte"])
    report = reparam.merge(model)
    assert report.survival() == {torch.float32: 1.0}
    assert {site.change for site in report.sites} == {0.0}
    assert models.same(models.frozen(model), models.frozen(models.gpt2()))


# ---- what is written


@pytest.mark.parametrize("make", [models.llama, models.tied_llama, models.gpt2, models.bert, models.t5, models.mixtral])
@pytest.mark.filterwarnings("ignore:targets. skipped .*experts")
def test_the_merged_model_is_plain_and_computes_the_same(make: Callable[[], Any]) -> None:
    model, adapter = adapted(make)
    y, plain = logits(model), make()
    assert relative(logits(plain), y) > 1e-2
    reparam.merge(model)
    assert relative(logits(model), y) < 2e-5
    assert str(model) == str(plain)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert vars(model).keys() == vars(plain).keys()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, plain.state_dict()[n])}
    assert changed == {
        re.sub(r"experts\.\d+\.(\w+)\.weight$", r"experts.\1", f"{site}.weight") for site in adapter.sites
    }
    assert all(t.is_contiguous() for t in model.state_dict().values())


def test_a_float64_model_keeps_its_precision() -> None:
    model, adapter = adapted(lambda: models.llama().double())
    with torch.no_grad():
        for module in adapter.modules.values():
            module.frozen.tensor().mul_(1 + 1e-12)  # values that float32 does not have
    y = logits(model)
    reparam.merge(model)
    assert relative(logits(model), y) < 1e-12


def test_dropout_has_no_part_in_it() -> None:
    model = models.llama()
    adapter = reparam.attach(model, reparam.LoRA(r=3, dropout=0.5))
    fill(adapter, 0.15)
    y = logits(model)
    model.train()
    reparam.merge(model)
    assert model.training
    assert relative(logits(model), y) < 1e-5


def test_biases_embeddings_and_modules_trained_whole_are_folded_too() -> None:
    model, _ = adapted(models.gpt2, targets=["all-linear", "wte"], bias=True, modules_to_save=["lm_head", "ln_f"])
    y, before = logits(model), models.frozen(models.gpt2())
    report = reparam.merge(model, keep_base=True)
    assert relative(logits(model), y) < 1e-5
    assert set(report.replaced) == {"lm_head", "transformer.ln_f"}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"transformer.wte.weight", "transformer.h.0.mlp.c_fc.bias", "lm_head.weight"} < changed
    assert {"transformer.ln_f.weight", "transformer.ln_f.bias"} < changed
    assert not any("ln_1" in name or "wpe" in name for name in changed)
    report.restore()
    assert torch.equal(logits(model), y)
    reparam.remove(model, "a")
    assert models.same(models.frozen(model), before)


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert])
def test_stock_tools_load_the_merged_model(make: Callable[[], Any], tmp_path: Path) -> None:
    model, _ = adapted(make)
    reparam.merge(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not any(type(m).__module__.startswith("reparam") for m in again.modules())


def test_the_biases_of_a_16_bit_model_are_trained_in_float32() -> None:
    model = models.gpt2().bfloat16()
    with torch.no_grad():
        base = logits(model)
        adapter = reparam.attach(model, reparam.LoRA(r=2), bias=True)
        assert torch.equal(logits(model), base)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    models.loss(model).backward()
    assert all(p.grad is not None for p in adapter.parameters())
    fill(adapter, 0.15)
    y = logits(model)
    reparam.merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert relative(logits(model), y) < 3e-2


# ---- refused, with nothing changed


def poison(tensor: Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[-1] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["down_proj.B", "q_proj.A", "lm_head.weight", "c_attn.bias"])
def test_numbers_that_are_not_finite_are_refused(what: str, value: float) -> None:
    make = models.gpt2 if "bias" in what else models.llama
    model, adapter = adapted(make, bias=True, modules_to_save=["lm_head"])
    name, tensor = next((n, p) for n, p, _ in adapter.named_parameters() if n.endswith(what))
    poison(tensor, value)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"adapter 'a': NaN or infinity in {name}; nothing was merged"):
        reparam.merge(model)
    assert all(torch.equal(t.nan_to_num(), before[k].nan_to_num()) for k, t in model.state_dict().items())
    with reparam.select(model, None):
        assert torch.equal(logits(model), logits(make()))


def test_a_weight_that_would_overflow_is_refused() -> None:
    """The factors are finite, and their product is beyond float16's range."""
    model, adapter = adapted(lambda: models.llama().half(), size=0.0)
    with torch.no_grad():
        adapter.updates["model.layers.1.mlp.down_proj"].B.fill_(3e5)
    with pytest.raises(ValueError, match=r"down_proj: the merged weight may overflow float16"):
        reparam.merge(model)
    with reparam.select(model, None):
        assert torch.equal(logits(model), logits(models.llama().half()))


@pytest.mark.parametrize("which", [None, ["a", None, "a"]], ids=str)
def test_merging_needs_one_adapter_to_be_selected(which: Any) -> None:
    model, _ = adapted()
    reparam.select(model, which)
    with pytest.raises(ValueError, match=r"merge needs one selected adapter, but .* is selected; select one of a"):
        reparam.merge(model)


def test_merging_twice_is_an_error_not_a_second_addition() -> None:
    model, _ = adapted()
    reparam.merge(model)
    state = models.frozen(model)
    with pytest.raises(ValueError, match="has no adapter on it"):
        reparam.merge(model)
    assert models.same(models.frozen(model), state)


# ---- the way back


@pytest.mark.filterwarnings("ignore:merging into")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [models.llama, models.gpt2])
def test_restore_is_exact_however_often(make: Callable[[], Any], dtype: torch.dtype) -> None:
    model, _ = adapted(lambda: make().to(dtype), targets=["all-linear", "lm_head"])
    before, y = {k: t.clone() for k, t in model.state_dict().items()}, logits(model)
    for _ in range(3):
        report = reparam.merge(model, keep_base=True)
        assert not torch.equal(logits(model), y) or dtype == torch.float32
        report.restore()
        assert models.same(models.frozen(model), before)
        assert torch.equal(logits(model), y)


def test_restore_brings_back_all_adapters_and_trains_on() -> None:
    model, adapter = adapted()
    fill(reparam.attach(model, reparam.LoRA(r=2), name="b", targets="mlp"), 0.15, seed=2)
    with torch.no_grad():
        b = logits(model)
        reparam.select(model, "a")
        a = logits(model)
        report = reparam.merge(model, keep_base=True)
        assert reparam.adapters(model) == {}
        report.restore()
        assert torch.equal(logits(model), a)
        reparam.select(model, "b")
        assert torch.equal(logits(model), b)
    reparam.select(model, "a")
    adapter.requires_grad_()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.bind(optimizer)
    before = models.loss(model)
    before.backward()
    optimizer.step()
    assert models.loss(model) < before


def test_restore_undoes_what_was_done_to_the_merged_model() -> None:
    model, _ = adapted()
    y = logits(model)
    report = reparam.merge(model, keep_base=True)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(1.5 if parameter.ndim == 2 else 1.0)
    report.restore()
    assert torch.equal(logits(model), y)


def test_without_the_base_there_is_no_way_back() -> None:
    model, _ = adapted()
    report = reparam.merge(model)
    with pytest.raises(ValueError, match="the merge did not keep the base; merge with keep_base=True, or reload"):
        report.restore()


def test_an_adapter_on_the_merged_model_is_apart_from_the_first() -> None:
    model, _ = adapted()
    y = logits(model)
    reparam.merge(model)
    second = reparam.attach(model, reparam.LoRA(r=2, seed=9), name="a")
    assert relative(logits(model), y) < 1e-5
    fill(second, 0.15, seed=2)
    z = logits(model)
    reparam.merge(model)
    assert relative(logits(model), z) < 1e-5
    assert relative(z, y) > 1e-2


def test_a_copy_is_merged_apart() -> None:
    model, _ = adapted()
    twin, y = copy.deepcopy(model), logits(model)
    reparam.merge(twin)
    assert torch.equal(logits(model), y)
    assert relative(logits(twin), y) < 1e-5


def test_the_matrix_is_written_in_place() -> None:
    """No temporary has the size of the weight, and the module keeps its parameter object."""
    model, _ = adapted()
    places = {path: m.frozen.tensor().data_ptr() for path, m in reparam.adapters(model)["a"].modules.items()}
    reparam.merge(model)
    assert places
    for path, place in places.items():
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        assert module.weight.data_ptr() == place


def test_greedy_decoding_is_the_same() -> None:
    model, _ = adapted()
    length = {"max_new_tokens": 8, "do_sample": False}
    before = model.generate(IDS, **length)
    reparam.merge(model)
    assert torch.equal(model.generate(IDS, **length), before)
