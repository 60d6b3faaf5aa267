"""Compression compared with the SVD of the dense ΔW, with the original's outputs, and with PEFT."""

import dataclasses
import itertools
import json
from bisect import bisect_left
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import assert_equal_but_for_rounding, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from models import gpt2, llama, logits
from safetensors import safe_open
from torch import Tensor

import reparam
from reparam import AdaLoRA, DoRA, FormatError, LoRA
from reparam.combine.components import by_bytes, held, parts_of, within
from reparam.combine.compress import compress
from reparam.io.record import Record

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": LoRA(r=4, alpha=8)},
    "rslora": {"method": LoRA(r=4, alpha=4, scaling="rslora")},
    "alpha": {"method": LoRA(r=3, alpha=0.5, scaling="alpha")},
    "none": {"method": LoRA(r=3, scaling="none")},
    "patterns": {
        "method": LoRA(r=4, rank_pattern={"q_proj": 6}, alpha_pattern={"up_proj": 3, "1.self_attn.q_proj": 5})
    },
    "adalora": {"method": AdaLoRA(init_r=5, target_r=4, rank_pattern={"up_proj": 3})},
    "embedding": {"method": LoRA(r=4), "targets": ["embed_tokens", "q_proj"]},
    "dora": {"method": DoRA(r=4, alpha=8)},
    "dora of columns": {"method": DoRA(r=4, scaling="rslora", norm_axis="input")},
    "adalora with magnitudes": {"method": AdaLoRA(init_r=5, target_r=4, magnitude=True)},
}


def saved(kind: str, model: Any = None, *, seed: int = 0, **more: Any) -> Record:
    """The record of a folder with a trained adapter."""
    return trained(llama() if model is None else model, seed=seed, **(KINDS[kind] | more)).record()


def dense(record: Record) -> dict[str, Tensor]:
    """Dense B A of every site in float64, from the tensors and the formulas of the papers."""
    found = {}
    for name in record.sites:
        own = {k.removeprefix(f"{name}.").removeprefix("low_rank."): t.double() for k, t in record.tensors.items()}
        if isinstance(record.method, AdaLoRA):
            scale = record.method.alpha / (record.method.init_r + 1e-5)
            found[name] = scale * own["B"] @ own["E"].diag() @ own["A"]
            continue
        assert isinstance(record.method, LoRA)
        r, alpha = record.method.at(name)
        scale = {"alpha_over_r": alpha / r, "rslora": alpha / r**0.5, "alpha": alpha, "none": 1.0}[
            record.method.scaling
        ]
        found[name] = scale * own["B"] @ own["A"]
    return found


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm().clamp(min=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_stays_is_the_nearest_of_its_rank(kind: str, rank: int) -> None:
    record = saved(kind)
    found = compress(record, rank=rank)
    before, after = dense(record), dense(found.record)
    for site in found.sites:
        u, s, vh = torch.linalg.svd(before[site.name], full_matrices=False)
        assert site.rank == rank
        assert_near(after[site.name], u[:, :rank] * s[:rank] @ vh[:rank])
        assert site.change == pytest.approx(float(s.norm()), rel=1e-6)
        assert site.lost**2 == pytest.approx(float(s[rank:].square().sum()), rel=1e-5, abs=1e-12)
        assert site.lost == pytest.approx(float((after[site.name] - before[site.name]).norm()), rel=1e-4, abs=1e-6)
    total = sum(float((after[name] - before[name]).square().sum()) for name in before)
    whole = sum(float(change.square().sum()) for change in before.values())
    assert found.error == pytest.approx((total / whole) ** 0.5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_not_below_is_the_same_adapter(kind: str) -> None:
    record = saved(kind)
    for found in (compress(record, rank=9), compress(record, bytes=held(record)), compress(record, energy=1.0)):
        assert found.record.method == record.method
        assert list(found.record.tensors) == list(record.tensors)
        assert all(torch.equal(found.record.tensors[key], tensor) for key, tensor in record.tensors.items())
        assert found.error == 0
        assert found.bytes == found.before


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_the_energy_is_the_same_function_at_the_rank_that_the_change_has(kind: str) -> None:
    model = llama()
    record = saved(kind, model)
    for key, tensor in record.tensors.items():
        if key.endswith(".B"):
            tensor[:, -2:] = tensor[:, :2]
    reparam.remove(model, "default")
    compress(record, rank=9).put(model)
    expected = logits(model)
    reparam.remove(model, "default")
    found = compress(record, energy=1.0)
    assert all(site.before - site.rank == 2 for site in found.sites)
    assert found.error < 1e-6
    found.put(model)
    assert_equal_but_for_rounding(logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["reparam", "peft"])
def test_the_written_folder_is_the_record(kind: str, format: str, tmp_path: Path) -> None:
    model = llama()
    record = saved(kind, model)
    reparam.remove(model, "default")
    found = compress(record, energy=0.6)
    if format == "peft" and kind in ("dora of columns", "adalora with magnitudes"):
        with pytest.raises(FormatError, match="PEFT has no equivalent"):
            found.save(tmp_path / "small", format=format)
        return
    found.save(tmp_path / "small", format=format)
    found.put(model, name="direct")
    expected = logits(model)
    reparam.remove(model, "direct")
    reparam.load(model, tmp_path / "small")
    assert_equal_but_for_rounding(logits(model), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "rslora", "patterns", "dora", "adalora", "embedding"])
def test_peft_computes_with_it_what_we_do(kind: str, tmp_path: Path) -> None:
    model = llama()
    record = saved(kind, model)
    reparam.remove(model, "default")
    found = compress(record, energy=0.7)
    found.put(model)
    expected = logits(model)
    found.save(tmp_path / "small", format="peft")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "small")
    assert_equal_but_for_rounding(logits(theirs), expected)


def test_a_folder_of_peft_becomes_smaller(tmp_path: Path) -> None:
    model = gpt2()
    trained(model, method=LoRA(r=4), targets=["c_attn", "c_fc"], bias=True).save(tmp_path / "theirs", format="peft")
    found = compress(tmp_path / "theirs", rank=2)
    found.save(tmp_path / "ours")
    found.save(tmp_path / "small", format="peft")
    assert found.bytes < found.before
    assert all(f"{site.name}.bias" in found.record.tensors for site in found.sites)
    for folder in ("ours", "small"):
        fresh = gpt2()
        reparam.load(fresh, tmp_path / folder)
        one = logits(fresh)
        reparam.remove(fresh, "default")
        found.put(fresh)
        assert_equal_but_for_rounding(one, logits(fresh))


def test_files_in_sixteen_bits_stay_so(tmp_path: Path) -> None:
    record = saved("lora")
    half = dataclasses.replace(record, tensors={key: t.bfloat16() for key, t in record.tensors.items()})
    found = compress(half, rank=2)
    assert {t.dtype for t in found.record.tensors.values()} == {torch.bfloat16}
    assert found.bytes * 2 == found.before


# --- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(energy=st.floats(0.01, 1))
def test_energy_is_the_lowest_rank_that_keeps_the_share(kind: str, energy: float) -> None:
    record = _once(kind)
    found = compress(record, energy=energy)
    for site in found.sites:
        s = torch.linalg.svdvals(dense(record)[site.name]).square()
        shares = s.cumsum(0) / s.sum()
        assert shares[site.rank - 1] >= energy - 1e-9
        assert site.rank == 1 or shares[site.rank - 2] < energy + 1e-9
        assert 1 - site.error**2 >= energy - 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_less_is_never_nearer(kind: str) -> None:
    record = _once(kind)
    full = held(record)
    sizes = range(0, full, 8)
    least = sizes[bisect_left(sizes, True, key=lambda size: _fits(record, size))]
    for setting, values in (
        ("energy", [0.1, 0.5, 0.9, 0.99, 1.0]),
        ("rank", [1, 2, 4, 5]),
        ("bytes", [least, *range(least + 97, full, (full - least) // 3), full]),
    ):
        found = [compress(record, **{setting: value}) for value in values]
        for small, large in itertools.pairwise(found):
            assert small.error >= large.error
            assert small.bytes <= large.bytes
            ranks = {site.name: site.rank for site in large.sites}
            assert all(site.rank <= ranks[site.name] for site in small.sites)


def _fits(record: Record, size: int) -> bool:
    try:
        by_bytes(parts_of(record, ""), size, held(record))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.95])
def test_bytes_are_kept_to_in_the_file_and_used_up(kind: str, share: float, tmp_path: Path) -> None:
    record = _once(kind)
    most = int(share * held(record))
    if not _fits(record, most):
        pytest.skip("magnitudes and single components take more")
    found = compress(record, bytes=most)
    found.save(tmp_path / "small")
    with safe_open(tmp_path / "small" / "adapter.safetensors", "pt") as file:
        written = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert written == found.bytes <= most
    assert found.before - found.bytes == sum(site.saved for site in found.sites)
    dropped = [p.cost for p in parts_of(record, "").values()]
    assert most - found.bytes < max(dropped)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_a_share_of_all_energy_is_what_its_bytes_keep(kind: str, energy: float) -> None:
    record = _once(kind)
    parts = parts_of(record, "")
    ranks = within(parts, energy)
    size = held(record) - sum(part.cost * (part.rank - ranks[name]) for name, part in parts.items())
    found = compress(record, bytes=size)
    assert {site.name: site.rank for site in found.sites} == ranks
    assert 1 - found.error**2 >= energy - 1e-9
    if any(ranks[name] > part.least for name, part in parts.items()) and _fits(record, size - 1):
        assert 1 - compress(record, bytes=size - 1).error ** 2 < energy


def test_sites_that_hold_little_leave() -> None:
    record = saved("lora")
    weak = "model.layers.0.self_attn.q_proj"
    record.tensors[f"{weak}.B"].mul_(1e-4)
    model = llama()
    found = compress(record, bytes=held(record) // 2)
    assert weak not in found.record.sites
    assert not [key for key in found.record.tensors if key.startswith(weak)]
    assert next(site for site in found.sites if site.name == weak).error == 1
    assert list(found.put(model).sites) == [name for name in record.sites if name != weak]


def test_patterns_of_sites_that_leave_go_with_them(tmp_path: Path) -> None:
    record = saved("patterns")
    for key in record.tensors:
        if "q_proj" in key and key.endswith(".B"):
            record.tensors[key].zero_()
    found = compress(record, energy=0.9)
    assert [name for name in found.record.sites if "q_proj" in name] == []
    found.save(tmp_path / "small")
    reparam.load(llama(), tmp_path / "small")
    assert json.loads((tmp_path / "small" / "adapter.json").read_text())["sites"].keys() == found.record.sites.keys()


def test_adalora_keeps_sites_without_components() -> None:
    record = saved("adalora")
    for key in record.tensors:
        if key.startswith("model.layers.0.mlp") and key.endswith(".E"):
            record.tensors[key].zero_()
    found = compress(record, energy=0.9)
    assert found.record.sites == record.sites
    assert len(found.record.tensors["model.layers.0.mlp.up_proj.E"]) == 0
    found.put(llama())


def test_adaloras_factors_are_orthogonal_again() -> None:
    found = compress(saved("adalora"), rank=2).record
    for name in found.sites:
        p, q = found.tensors[f"{name}.B"], found.tensors[f"{name}.A"]
        assert torch.allclose(p.T @ p, torch.eye(2), atol=1e-6)
        assert torch.allclose(q @ q.T, torch.eye(2), atol=1e-6)


@pytest.mark.parametrize("kind", ["dora", "dora of columns", "adalora with magnitudes"])
def test_magnitudes_stay_and_the_direction_is_measured_anew(kind: str) -> None:
    model = llama()
    record = saved(kind, model)
    reparam.remove(model, "default")
    found = compress(record, rank=2)
    weights = {name: model.get_submodule(name).weight.detach().double() for name in record.sites}
    found.put(model)
    reparam.merge(model)
    for name, change in dense(found.record).items():
        magnitude = record.tensors[f"{name}.magnitude"].double()
        assert torch.equal(found.record.tensors[f"{name}.magnitude"], record.tensors[f"{name}.magnitude"])
        dim = 0 if kind == "dora of columns" else 1
        moved = weights[name] + change
        expected = moved * (magnitude / moved.norm(dim=dim)).unsqueeze(dim)
        assert_near(model.get_submodule(name).weight.detach().double(), expected, 1e-5)


_RECORDS: dict[str, Record] = {}


def _once(kind: str) -> Record:
    """Cache one record for all examples of a property."""
    if kind not in _RECORDS:
        _RECORDS[kind] = saved(kind)
    return _RECORDS[kind]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({}, "expected exactly one of energy, rank and bytes, found 0"),
        ({"rank": 1, "energy": 0.5}, "found 2"),
        ({"energy": 0}, "energy=0: expected a number"),
        ({"energy": 1.01}, "energy=1.01"),
        ({"energy": float("nan")}, "energy=nan"),
        ({"rank": 0}, "rank=0: expected a whole number"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"bytes": -1}, "bytes=-1"),
        ({"bytes": 8}, "bytes=8: this adapter needs at least 320 bytes; it has"),
    ],
)
def test_settings_that_cannot_be(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(_once("lora"), **settings_)


def test_adapters_that_cannot_be() -> None:
    with pytest.raises(FormatError, match="only magnitudes"):
        compress(trained(llama(), method=DoRA(magnitude_only=True)).record(), rank=1)
    fresh = reparam.attach(llama(), LoRA(r=2)).record()
    with pytest.raises(FormatError, match="changes nothing"):
        compress(fresh, rank=1)
    with pytest.raises(FormatError, match="no such folder"):
        compress("nowhere", rank=1)
    from reparam.methods.mixture import Mixture

    mixture = trained(llama(), method=Mixture()).record()
    with pytest.raises(
        FormatError, match="no components that could be dropped one by one; lora, dora, adalora, lora_bias have"
    ):
        compress(mixture, rank=1)
