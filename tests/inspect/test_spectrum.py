"""Singular values, amplification, similarity and survival, compared with dense matrices."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from adapters import trained
from hypothesis import given
from hypothesis import strategies as st
from inspected import saved, told
from models import llama, save_base
from sampled import FULL

import reparam
from reparam import AdaLoRA, DoRA, FormatError, LoRA
from reparam.combine.compress import compress
from reparam.core.base import Factors
from reparam.hf.models import load_base
from reparam.inspect.amplification import amplification
from reparam.inspect.details import Closely
from reparam.inspect.operators import EXTRA, leading, of_change, of_weight
from reparam.inspect.similarity import overlap, similarity
from reparam.inspect.spectrum import effective_rank, spectra, spectrum, weights
from reparam.inspect.suggest import suggest
from reparam.inspect.survival import kinds, overall, survivals
from reparam.io.record import Record
from reparam.weights.dense import DenseWeight
from reparam.weights.nf4 import NF4

METHODS = {
    "lora": LoRA(r=3, alpha=6),
    "rslora": LoRA(r=4, scaling="rslora", rank_pattern={"q_proj": 2}),
    "adalora": AdaLoRA(init_r=4, target_r=3),
}
GAINS = {
    "dora": DoRA(r=3, alpha=6),
    "dora of columns": DoRA(r=3, norm_axis="input"),
    "magnitudes": DoRA(magnitude_only=True),
    "adalora with magnitudes": AdaLoRA(init_r=3, target_r=3, magnitude=True),
}


def changed(method: Any, *, seed: int = 0) -> tuple[Record, Any, dict[str, torch.Tensor]]:
    """A trained adapter, its base, and its float64 ΔW by site as computed by merging."""
    model = llama().double()
    adapter = trained(model, method=method, seed=seed)
    record, base = adapter.record(), llama().double()
    reparam.merge(model)
    return (
        record,
        base,
        {name: (model.get_submodule(name).weight - base.get_submodule(name).weight).detach() for name in record.sites},
    )


# --- spectra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("based", [False, True])
def test_values_and_directions_are_those_of_the_dense_change(method: str, based: bool) -> None:
    record, base, changes = changed(METHODS[method])
    found = spectra(record, base if based else None)
    assert found.keys() == record.sites.keys()
    for name, seen in found.items():
        expected = torch.linalg.svdvals(changes[name])
        assert seen.kind == "all"
        assert torch.allclose(seen.values, expected[: len(seen.values)], atol=1e-5)
        assert seen.rank == int((expected > 1e-5 * expected[0]).sum())
        assert torch.allclose(seen.u * seen.values @ seen.vh, changes[name], atol=1e-5)
        assert seen.energy == pytest.approx(float(changes[name].square().sum()), rel=1e-5)
        assert seen.held == pytest.approx(1)
        shares = expected.square().cumsum(0) / expected.square().sum()
        for share in (0.5, 0.9, 0.99):
            assert seen.needed(share) == int((shares < share).sum()) + 1
        p = expected[: seen.rank] / expected[: seen.rank].sum()
        assert seen.effective == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)
        assert seen.stable == pytest.approx(float(expected.square().sum() / expected[0] ** 2), rel=1e-4)


@pytest.mark.parametrize("method", GAINS)
def test_a_gain_has_leading_values_with_the_base(method: str) -> None:
    record, base, changes = changed(GAINS[method])
    for name, seen in spectra(record, base).items():
        expected = torch.linalg.svdvals(changes[name])
        assert seen.kind == "leading"
        assert seen.effective is None
        assert (seen.values <= expected[: len(seen.values)] * (1 + 1e-5) + 1e-6).all(), "at most the true ones"
        assert torch.allclose(seen.values, expected[: len(seen.values)], rtol=0.01, atol=1e-5)
        assert seen.energy == pytest.approx(float(changes[name].square().sum()), rel=1e-4)


def test_without_the_base_a_gain_leaves_the_low_rank_part() -> None:
    record, _, _ = changed(GAINS["dora"])
    plain = dataclasses.replace(
        record, method=METHODS["lora"], tensors={k.replace("low_rank.", ""): t for k, t in record.tensors.items()}
    )
    for name, seen in spectra(record).items():
        b, a = (plain.tensors[f"{name}.{part}"].double() for part in "BA")
        assert seen.kind == "low-rank part"
        assert torch.allclose(seen.values, torch.linalg.svdvals(2 * b @ a)[:3], atol=1e-6)
    assert spectra(changed(GAINS["magnitudes"])[0]) == {}


def test_values_that_are_not_known_are_not_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    w = DenseWeight(torch.randn(90, 80, generator=generator, dtype=torch.float64))
    factors = Factors(torch.zeros(1, 80).double(), torch.zeros(90, 1).double(), torch.full((90,), 1.5).double())
    _, values, _ = leading(of_change(w, factors), 32)
    expected = torch.linalg.svdvals(w.matrix / 2)
    assert (values <= expected[:32] + 1e-9).all()
    assert torch.allclose(values, expected[:32], rtol=0.05)


@given(seed=st.integers(0, 50), rows=st.integers(1, 30), columns=st.integers(1, 30), count=st.integers(1, 30))
def test_leading_values_are_exact_where_they_are_nearly_all(seed: int, rows: int, columns: int, count: int) -> None:
    d = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, values, vh = leading(of_weight(DenseWeight(d)), count)
    expected = torch.linalg.svdvals(d)
    assert len(values) == min(count, rows, columns)
    assert (values <= expected[: len(values)] + 1e-9).all()
    assert torch.allclose(u.T @ u, torch.eye(len(values)).double(), atol=1e-9)
    assert torch.allclose(vh @ vh.T, torch.eye(len(values)).double(), atol=1e-9)
    if count + EXTRA >= min(rows, columns):
        assert torch.allclose(values, expected[: len(values)], atol=1e-9)


def test_effective_rank_of_known_spectra() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([4.0, 0.0])) == 1
    assert effective_rank(torch.zeros(3)) == 0
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx((4 / 3) ** 0.75 * 4**0.25)


def test_an_idle_adapter_has_no_rank() -> None:
    record = reparam.attach(llama(), LoRA(r=2), targets=["q_proj"]).record()
    for seen in spectra(record).values():
        assert (seen.rank, seen.effective, seen.stable, seen.energy, seen.needed(0.9)) == (0, 0, 0, 0, 0)


# --- amplification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_amplification_is_that_of_dense_matrices(storage: str) -> None:
    record, base, changes = changed(METHODS["lora"])
    for name, dense in weights(record, base).items():
        assert dense is not None
        weight = dense if storage == "dense" else NF4().quantize(dense.dense())
        seen = spectrum(record, name, weight)
        assert seen is not None
        found = amplification(seen, weight)
        assert found is not None
        w = weight.dense().double()
        u, _, vh = torch.linalg.svd(changes[name])
        own = float((u[:, :3].T @ w @ vh[:3].T).norm())
        assert found.r == 3
        assert found.own == pytest.approx(own, rel=1e-3)
        assert found.factor == pytest.approx(float(changes[name].norm()) / own, rel=1e-3)
        assert found.top == pytest.approx(float(torch.linalg.svdvals(w)[:3].norm()), rel=1e-3)


def test_random_directions_hold_what_is_expected() -> None:
    generator = torch.Generator().manual_seed(0)
    record, base, _ = changed(METHODS["lora"])
    name = "model.layers.0.mlp.up_proj"
    weight = weights(record, base)[name]
    assert weight is not None
    seen = spectrum(record, name, weight)
    assert seen is not None
    found = amplification(seen, weight)
    assert found is not None
    w, squares = weight.dense().double(), []
    for _ in range(300):
        u, v = (torch.linalg.qr(torch.randn(n, 3, generator=generator, dtype=torch.float64))[0] for n in w.shape)
        squares.append((u.T @ w @ v).square().sum())
    assert float(torch.stack(squares).mean().sqrt()) == pytest.approx(found.random, rel=0.05)


def test_the_papers_random_directions() -> None:
    """Table 7 of LoRA's paper: |W_q| = 61.95 of GPT-3, r = 4 and 64, random directions 0.02 and 0.33."""
    for r, printed in ((4, 0.02), (64, 0.33)):
        assert r * 61.95 / 12288 == pytest.approx(printed, abs=0.01)


# --- similarity ------------------------------------------------------------------------------------------------------


def test_directions_in_common() -> None:
    one, other = (spectra(changed(LoRA(r=r), seed=r)[0]) for r in (3, 4))
    for name in one:
        found = similarity(one[name], other[name])
        assert found is not None
        for side, u, v in (("left", one[name].u, other[name].u), ("right", one[name].vh.T, other[name].vh.T)):
            grid = getattr(found, side)
            assert grid.shape == (3, 4)
            for i in range(1, 4):
                for j in range(1, 5):
                    expected = (u[:, :i].T @ v[:, :j]).square().sum() / min(i, j)
                    assert float(grid[i - 1, j - 1]) == pytest.approx(float(expected), abs=1e-12)
        back = similarity(other[name], one[name])
        assert back is not None
        assert torch.allclose(back.left, found.left.T)
        same = similarity(one[name], one[name])
        assert same is not None
        assert torch.allclose(same.right.diag(), torch.ones(3).double())


def test_random_spaces_have_in_common_what_is_expected() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(300):
        one, other = (torch.linalg.qr(torch.randn(40, r, generator=generator, dtype=torch.float64))[0] for r in (3, 5))
        draws.append(overlap(one, other)[-1, -1])
    assert float(torch.stack(draws).mean()) == pytest.approx(5 / 40, rel=0.05)


def test_changes_of_different_matrices_are_refused() -> None:
    found = spectra(changed(METHODS["lora"])[0])
    with pytest.raises(ValueError, match="one ΔW is 48 x 32, and the other is 32 x 32"):
        similarity(found["model.layers.0.mlp.up_proj"], found["model.layers.0.self_attn.q_proj"])


# --- survival --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:merging into")
@pytest.mark.parametrize("method", [METHODS["lora"], GAINS["dora"]])
def test_survival_is_what_merging_reports(method: Any, tmp_path: Path) -> None:
    adapter = saved(tmp_path, method)
    base = str(tmp_path / "base")
    record = adapter.record()
    found = {name: survivals(record, name, w) for name, w in weights(record, load_base(base)).items() if w is not None}
    assert found.keys() == record.sites.keys()
    for kind in kinds():
        name, _, rounding = kind.partition(" ")
        model = load_base(base, dtype=name if not rounding else "auto")
        if rounding:
            reparam.quantize(model, name)
        reparam.load(model, tmp_path / "adapter", check_base=False)
        more = {"into": name, "rounding": rounding, "force": True} if rounding else {}
        for site in reparam.merge(model, **more).sites:  # type: ignore[arg-type]
            assert found[site.name][kind].survival == pytest.approx(site.survival, abs=2e-3), kind
            assert found[site.name][kind].change == pytest.approx(site.change, rel=1e-3)
    total = overall(list(found.values()))
    assert list(total) == kinds()
    assert total["nf4 aware"] > total["nf4 nearest"]


def test_what_a_storage_cannot_hold_is_left_out() -> None:
    model = llama()
    record = trained(model, method=LoRA(r=2), targets=["embed_tokens", "q_proj"]).record()
    base = llama()
    base.model.layers[0].self_attn.q_proj.weight.data[0, 0] = 1e6
    found = {name: survivals(record, name, w) for name, w in weights(record, base).items() if w is not None}
    assert list(found["model.embed_tokens"]) == ["bfloat16", "float16"]
    assert "float16" not in found["model.layers.0.self_attn.q_proj"]
    assert "bfloat16" in found["model.layers.0.self_attn.q_proj"]


# --- suggestions, and the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_a_suggestion_is_what_compressing_to_its_bytes_gives(energy: float) -> None:
    record, _, changes = changed(METHODS["rslora"])
    found = suggest(record, energy)
    small = compress(record, bytes=found.bytes)
    assert small.record.method == found.compression.record.method
    assert small.bytes == found.bytes == found.before - sum(site.saved for site in found.sites)
    assert energy <= found.kept == pytest.approx(1 - sum(site.of_all for site in found.sites))
    assert [site.saved for site in found.sites] == sorted((site.saved for site in found.sites), reverse=True)
    for site in found.sites:
        squares = torch.linalg.svdvals(changes[site.name]).square()
        assert site.lost == pytest.approx(float(squares[site.rank :].sum() / squares.sum()), abs=1e-6)


def test_a_share_must_be_one() -> None:
    for energy in (0, 1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            suggest(changed(METHODS["lora"])[0], energy)


ALL = {"deep": True, "survival": True, "suggest": 0.9}


@pytest.mark.parametrize("method", [METHODS["rslora"], GAINS["dora"]] if FULL else [GAINS["dora"]])
def test_what_is_shown_is_in_the_json_and_drawn(method: Any, tmp_path: Path) -> None:
    saved(tmp_path, method)
    base = str(tmp_path / "base")
    asked = Closely(**ALL, against=tmp_path / "adapter")  # type: ignore[arg-type]
    text = told(tmp_path, base=base, asked=asked, plot=tmp_path / "plots")
    for part in ("singular values", "amplification", "share of ΔW that a merge would keep", "directions in common"):
        assert part in text
    found = json.loads(told(tmp_path, base=base, asked=asked, json=True))
    first = found["deep"][0]
    assert first["spectrum"]["values"] == sorted(first["spectrum"]["values"], reverse=True)
    assert first["amplification"]["factor"] > 0
    assert list(first["survival"]) == kinds()
    assert found["survival"]["bfloat16"] == pytest.approx(1, abs=0.01)
    assert found["similarity"][0]["left"][-1][-1] == pytest.approx(1)
    assert f"OUTPUT --bytes {found['suggestion']['bytes']}" in text
    for name in ("spectra", "amplification", "survival", "similarity"):
        assert matplotlib.image.imread(tmp_path / "plots" / f"{name}.png").std() > 0.05, name


def test_without_a_flag_nothing_of_it_is_shown(tmp_path: Path) -> None:
    saved(tmp_path, METHODS["lora"])
    assert "singular values" not in told(tmp_path)
    assert {"deep", "survival", "similarity", "suggestion"}.isdisjoint(json.loads(told(tmp_path, json=True)))


def test_what_is_known_without_the_base_says_so(tmp_path: Path) -> None:
    saved(tmp_path, GAINS["dora"])
    assert "values of s B A, the change of the direction" in told(tmp_path, asked=Closely(deep=True))
    assert "ΔW has full rank, because a gain" in told(tmp_path, asked=Closely(deep=True), base=str(tmp_path / "base"))


def test_options_that_cannot_be(tmp_path: Path) -> None:
    saved(tmp_path, METHODS["lora"])
    with pytest.raises(ValueError, match="--data is for --suggest"):
        told(tmp_path, asked=Closely(data=tmp_path))
    with pytest.raises(ValueError, match="depends on the base weights"):
        told(tmp_path, asked=Closely(survival=True))
    with pytest.raises(ValueError, match="are for adapters only"):
        told(tmp_path, asked=Closely(deep=True), probe=tmp_path)
    other = tmp_path / "other"
    save_base(other / "base")
    trained(load_base(str(other / "base")), targets=["lm_head"]).save(other / "adapter")
    with pytest.raises(FormatError, match="have no site in common"):
        told(tmp_path, asked=Closely(against=other / "adapter"))
