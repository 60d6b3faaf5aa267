"""Sums of adapters compared with dense sums, with themselves and with PEFT's, and all refusals."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import assert_equal_but_for_rounding, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bert, gpt2, llama, logits
from torch import Tensor

import reparam
from reparam import AdaLoRA, DoRA, FormatError, LoRA
from reparam.combine.blend import blend
from reparam.combine.lowrank import dare, factored, reduced, stacked, summed, ties
from reparam.combine.operands import base_weight, factors_of
from reparam.core.base import Factors
from reparam.core.registry import METHODS
from reparam.io import files
from reparam.io.record import Record

KINDS = {
    "plain": {"method": LoRA(r=2, alpha=4)},
    "rank 3": {"method": LoRA(r=3, alpha=1)},
    "rslora": {"method": LoRA(r=4, alpha=4, scaling="rslora")},
    "alpha": {"method": LoRA(r=1, alpha=0.5, scaling="alpha")},
    "none": {"method": LoRA(r=2, scaling="none", rank_pattern={"q_proj": 5})},
    "adalora": {"method": AdaLoRA(init_r=3, target_r=2)},
    "other sites": {"method": LoRA(r=2, alpha=4), "targets": ["v_proj", "up_proj"]},
    "embedding": {"method": LoRA(r=2, alpha=4), "targets": ["embed_tokens", "q_proj"]},
}
GAINS = {"dora": {"method": DoRA(r=2, alpha=4)}, "dora columns": {"method": DoRA(r=2, norm_axis="input")}}


def saved(seed: int, model: Any = None, **kind: Any) -> Record:
    """The record of a folder with a trained adapter."""
    return trained(llama() if model is None else model, seed=seed, **kind).record()


@torch.no_grad()
def changes(record: Record, base: Any = None) -> dict[str, Tensor]:
    """Dense ΔW of every site in float64."""
    found = {}
    for name, site in record.sites.items():
        weight = None if base is None else base_weight(base, site)
        factors = factors_of("", record, name, weight)
        w = torch.zeros(1, 1, dtype=torch.float64) if weight is None else weight.tensor()
        found[name] = factors.B @ factors.A if factors.gain is None else factors.change(w)
    return found


def assert_change(record: Record, expected: dict[str, Tensor], *, tolerance: float = 1e-6) -> None:
    found = changes(record)
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert (found[name] - change).norm() <= tolerance * change.norm(), name


def added(parts: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part, w in zip(parts, weights, strict=True):
        for name, change in part.items():
            total[name] = total.get(name, torch.zeros_like(change)) + w * change
    return total


# --- the algebra, in float64 ---------------------------------------------------------------------------------------


@st.composite
def several(draw: st.DrawFn, *, same_rank: bool = False) -> tuple[list[Factors], list[float]]:
    seed, n = draw(st.integers(0, 1000)), draw(st.integers(1, 4))
    o, i, r = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(seed)
    ranks = [r if same_rank else 1 + (r + k) % 5 for k in range(n)]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weights = draw(st.lists(st.floats(-2, 2), min_size=n, max_size=n))
    return [Factors(normal(rank, i), normal(o, rank)) for rank in ranks], weights


@settings(deadline=None)
@given(several())
def test_stacked_factors_are_the_dense_sum(case: tuple[list[Factors], list[float]]) -> None:
    factors, weights = case
    found = stacked(factors, weights)
    dense = sum(w * f.B @ f.A for f, w in zip(factors, weights, strict=True))
    torch.testing.assert_close(found.B @ found.A, dense, rtol=1e-12, atol=1e-12)
    assert len(found.A) == sum(len(f.A) for f in factors)


@settings(deadline=None)
@given(several(), st.integers(1, 6))
def test_what_is_lost_is_the_tail_of_singular_values(case: tuple[list[Factors], list[float]], rank: int) -> None:
    factors = stacked(*case)
    dense = factors.B @ factors.A
    tail = torch.linalg.svdvals(dense)[rank:].norm()
    for found, size, lost in (reduced(factors, rank), factored(dense, rank)):
        apart = (found.B @ found.A - dense).norm()
        torch.testing.assert_close(
            torch.tensor([size, lost]), torch.stack([dense.norm(), tail]).float(), atol=1e-6, rtol=1e-6
        )
        assert abs(apart - tail) <= 1e-10 + 1e-8 * dense.norm()
        assert len(found.A) <= rank


@settings(deadline=None)
@given(several(same_rank=True), st.floats(-2, 2))
def test_lorahubs_sum_is_even_and_quadratic_and_the_other_linear(
    case: tuple[list[Factors], list[float]], c: float
) -> None:
    factors, weights = case
    dense = {rule: (f := rule(factors, weights)).B @ f.A for rule in (summed, stacked)}
    again = {rule: (f := rule(factors, [c * w for w in weights])).B @ f.A for rule in (summed, stacked)}
    torch.testing.assert_close(again[summed], c * c * dense[summed], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(again[stacked], c * dense[stacked], rtol=1e-10, atol=1e-10)


def test_two_equal_adapters() -> None:
    f = Factors(torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64))
    for rule, factor in ((summed, (0.3 + 0.9) ** 2), (stacked, 0.3 + 0.9)):
        found = rule([f, f], [0.3, 0.9])
        torch.testing.assert_close(found.B @ found.A, factor * f.B @ f.A, rtol=1e-12, atol=1e-12)


def ties_by_hand(changes: list[Tensor], weights: list[float], density: float) -> Tensor:
    """TIES entry by entry, as in the paper's algorithm 1, with the weighted sum for the vote."""
    out = torch.zeros_like(changes[0])
    keep = max(1, round(density * out.numel()))
    least = [sorted(c.abs().flatten().tolist(), reverse=True)[keep - 1] for c in changes]
    for i, j in itertools.product(*map(range, out.shape)):
        values = [
            w * float(c[i, j]) if abs(float(c[i, j])) >= b else 0.0
            for c, w, b in zip(changes, weights, least, strict=True)
        ]
        vote = sum(values)
        side = [v for v in values if v * vote > 0]
        out[i, j] = sum(side) / len(side) if side else 0.0
    return out


@pytest.mark.parametrize("seed", range(8))
def test_ties_is_what_it_is_by_hand(seed: int) -> None:
    torch.manual_seed(seed)
    found = [torch.randn(5, 7, dtype=torch.float64) for _ in range(3)]
    weights, density = torch.randn(3, dtype=torch.float64).tolist(), [0.2, 0.5, 1.0][seed % 3]
    torch.testing.assert_close(ties(found, weights, density), ties_by_hand(found, weights, density))
    torch.testing.assert_close(ties(found[:1], [1.0], 1.0), found[0])


def test_dare_keeps_the_mean_and_the_share() -> None:
    change = torch.ones(300, 300, dtype=torch.float64)
    found = dare([change], [2.0], 0.1, torch.Generator().manual_seed(0))
    assert set(found.unique().tolist()) == {0.0, 20.0}
    assert abs(float((found != 0).double().mean()) - 0.1) < 4 * (0.1 * 0.9 / 90000) ** 0.5
    assert torch.equal(found, dare([change], [2.0], 0.1, torch.Generator().manual_seed(0)))
    assert torch.equal(dare([change], [2.0], 1.0, torch.Generator()), 2 * change)


# --- saved adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_with_weight_1_is_itself(kind: str) -> None:
    record = saved(1, **KINDS[kind])
    other = saved(2, **KINDS["plain"])
    assert blend([record], [1.0]).record is record
    assert blend([record, other], [1.0, 0.0]).record is record
    double = blend([record], [2.0]).record
    assert_change(double, added([changes(record)], [2.0]))


@pytest.mark.parametrize("kind", [*KINDS, *GAINS])
def test_one_adapter_through_the_sum_computes_what_it_did(kind: str) -> None:
    """Two times weight ½ goes through factors, the files' dtypes and the result's scale."""
    model = llama()
    record = saved(1, model, **{**KINDS, **GAINS}[kind])
    expected = logits(model)
    fresh = llama()
    blend(
        [record, record], [0.5, 0.5], base=llama() if kind in GAINS else None, rank=32 if kind in GAINS else None
    ).put(fresh, name="sum")
    assert_equal_but_for_rounding(logits(fresh), expected)


def test_all_kinds_together_are_the_dense_sum_in_any_order() -> None:
    records = [saved(seed, **kind) for seed, kind in enumerate(KINDS.values())]
    weights = [0.5, -1.5, 0.25, 1.0, 2.0, -0.75, 0.4, 1.1]
    found = blend(records, weights)
    assert found.error == 0
    assert_change(found.record, added([changes(r) for r in records], weights))
    assert_change(blend(records[::-1], weights[::-1]).record, changes(found.record))
    assert {site.name: site.rank for site in found.sites} == {
        name: min(
            s.out_features, s.in_features, sum(len(factors_of("", r, name).A) for r in records if name in r.sites)
        )
        for name, s in found.record.sites.items()
    }


def test_a_lower_rank_loses_what_it_says(tmp_path: Path) -> None:
    records = [saved(seed, method=LoRA(r=3)) for seed in range(3)]
    whole, cut = blend(records, [1, 1, 1]), blend(records, [1, 1, 1], rank=4)
    exact, kept = changes(whole.record), changes(cut.record)
    for site in cut.sites:
        apart = (kept[site.name] - exact[site.name]).norm() / exact[site.name].norm()
        assert site.rank == 4
        assert abs(float(apart) - site.error) < 1e-5
        assert 0 < site.error < 1
    lost = sum((kept[n] - exact[n]).square().sum() for n in exact) / sum(c.square().sum() for c in exact.values())
    assert abs(float(lost) ** 0.5 - cut.error) < 1e-5
    assert abs(cut.survival - (1 - cut.error**2)) < 1e-12


@pytest.mark.parametrize("space", ["ties", "dare"])
def test_sums_with_dropped_entries_keep_the_nearest_of_a_rank(space: str) -> None:
    records = [saved(seed) for seed in range(2)]
    whole = blend(records, [1, 0.5], space=space, density=0.5, rank=48, seed=3)
    cut = blend(records, [1, 0.5], space=space, density=0.5, seed=3)
    assert whole.error < 1e-9
    assert 0 < cut.error < 1
    assert {site.rank for site in cut.sites} == {4}
    exact, kept = changes(whole.record), changes(cut.record)
    for site in cut.sites:
        tail = torch.linalg.svdvals(exact[site.name])[4:].norm()
        assert abs(float((kept[site.name] - exact[site.name]).norm() - tail)) < 1e-4
        assert abs(site.lost - float(tail)) < 1e-4
    if space == "ties":
        parts = [changes(r) for r in records]
        for name, change in exact.items():
            expected = ties_by_hand([p[name] for p in parts], [1, 0.5], 0.5)
            torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-5)


def test_gains_need_the_base_and_are_dense_then() -> None:
    records, base = [saved(1, **GAINS["dora"]), saved(2)], llama()
    with pytest.raises(FormatError, match="a sum needs the base"):
        blend(records, [0.5, 0.5])
    found = blend(records, [0.5, 0.5], base=base, rank=32)
    assert_change(found.record, added([changes(r, base) for r in records], [0.5, 0.5]), tolerance=1e-5)
    assert 0 < blend(records, [0.5, 0.5], base=base).error < 1
    assert blend(records, [1.0, 0.0]).record is records[0]


@pytest.mark.parametrize("make", [gpt2, bert])
def test_biases_are_changes_of_the_bases(make: Any) -> None:
    one, two = (saved(s, make(), method=LoRA(r=2), targets="all-linear", bias=True) for s in (1, 2))
    with pytest.raises(FormatError, match="give the base"):
        blend([one, two], [0.5, 0.5])
    base = make()
    found = blend([one, two], [0.3, 0.6], base=base)
    name = next(key for key in one.tensors if key.endswith(".bias"))
    before = base.get_parameter(name)
    expected = 0.1 * before + 0.3 * one.tensors[name] + 0.6 * two.tensors[name]
    torch.testing.assert_close(found.record.tensors[name], expected)
    found.put(base, name="sum")


def test_a_weight_of_0_leaves_the_base(tmp_path: Path) -> None:
    model = llama()
    before = logits(model)
    blend([saved(1), saved(2)], [0, 0]).put(model)
    assert torch.equal(logits(model), before)


def test_it_is_an_ordinary_adapter_in_files_of_both_kinds(tmp_path: Path) -> None:
    for seed, kind in enumerate((KINDS["none"], KINDS["other sites"], KINDS["rslora"])):
        trained(llama(), seed=seed, **kind).save(tmp_path / str(seed), format="peft" if seed == 2 else "reparam")
    found = blend([tmp_path / "0", str(tmp_path / "1"), tmp_path / "2"], [0.7, -0.2, 0.5])
    model = llama()
    found.put(model)
    expected = logits(model)
    for format in ("reparam", "peft"):
        found.save(tmp_path / format, format=format)
        again = llama()
        reparam.load(again, tmp_path / format)
        assert_equal_but_for_rounding(logits(again), expected)
    base = files.read(tmp_path / "reparam").base
    assert base is not None
    assert base.digests
    merged = llama()
    reparam.load(merged, tmp_path / "reparam")
    reparam.merge(merged)
    assert_equal_but_for_rounding(logits(merged), expected)


def test_pefts_concatenation_agrees(tmp_path: Path) -> None:
    for seed, method in enumerate((LoRA(r=2, alpha=4), LoRA(r=3, alpha=1))):
        trained(llama(), seed=seed, method=method).save(tmp_path / str(seed), format="peft")
    model = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "0"), adapter_name="a")
    model.load_adapter(str(tmp_path / "1"), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum", combination_type="cat")
    model.set_adapter("sum")
    ours = llama()
    blend([tmp_path / "0", tmp_path / "1"], [0.7, 0.4]).put(ours)
    assert_equal_but_for_rounding(logits(ours), logits(model.eval()))


def test_lorahubs_sum_of_saved_adapters(tmp_path: Path) -> None:
    records = [saved(seed, method=LoRA(r=2, alpha=4)) for seed in range(3)]
    found = blend(records, [0.5, 0.25, -1], space="factor")
    for name in records[0].sites:
        a = sum(w * r.tensors[f"{name}.A"] for w, r in zip((0.5, 0.25, -1), records, strict=True))
        b = sum(w * r.tensors[f"{name}.B"] for w, r in zip((0.5, 0.25, -1), records, strict=True))
        torch.testing.assert_close(changes(found.record)[name].float(), 2.0 * b @ a, rtol=1e-4, atol=1e-5)
    assert {site.rank for site in found.sites} == {2}


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "arguments", "message"),
    [
        (0, {"weights": []}, "no adapters are given"),
        (2, {"weights": [1.0]}, "expected one weight per adapter \\(2\\), found 1"),
        (1, {"weights": [float("nan")]}, "weight 1 is nan: expected a finite number"),
        (1, {"weights": [float("inf")]}, "weight 1 is inf"),
        (1, {"weights": [1.0], "space": "sum"}, "expected one of delta, factor, ties, dare"),
        (1, {"weights": [1.0], "rank": 0}, "rank=0: expected a whole number of at least 1"),
        (1, {"weights": [1.0], "density": 0.0}, "density=0.0: expected a number above 0"),
    ],
)
def test_settings_that_cannot_be(count: int, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blend([saved(1)] * count, arguments.pop("weights"), **arguments)


def test_adapters_that_cannot_be_summed() -> None:
    one = saved(1)
    wide = saved(1, llama(hidden_size=64))
    with pytest.raises(FormatError, match=r"different bases"):
        blend([one, wide], [1, 1])
    bare = [dataclasses.replace(r, base=None) for r in (one, wide)]
    with pytest.raises(
        FormatError, match=r"q_proj is linear, 32 x 32, in the first and linear, 64 x 64, in the second"
    ):
        blend(bare, [1, 1])
    with pytest.raises(FormatError, match="different weights than the given base"):
        blend([one, saved(2)], [1, 1], base=llama(initializer_range=0.2))
    with pytest.raises(FormatError, match=r"trains lm_head whole"):
        blend([one, saved(1, modules_to_save=["lm_head"])], [1, 1])
    with pytest.raises(FormatError, match=r"q_proj: A is \[2, 32\] in adapter 1 and \[3, 32\] in adapter 2"):
        blend([one, saved(1, method=LoRA(r=3))], [1, 1], space="factor")
    with pytest.raises(FormatError, match=r"adapt different modules: .*v_proj"):
        blend([one, saved(1, **KINDS["other sites"])], [1, 1], space="factor")
    gated = saved(1, method=METHODS["task_gated"](n=2, r=4, tasks=("a", "b")))
    with pytest.raises(FormatError, match="shares state such as gates between sites"):
        blend([one, gated], [1, 1])
