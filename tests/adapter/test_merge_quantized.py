"""Merging into quantized matrices: what is written, what survives of the update, and when it is refused."""

import models
import pytest
import torch
from adapters import trained
from hypothesis import given
from hypothesis import strategies as st
from models import logits
from torch import Tensor, nn

import reparam
from reparam import LoRA
from reparam.core.base import Factors, Storage
from reparam.core.registry import STORAGES
from reparam.sites.walk import storages_in
from reparam.weights.rounding import moves

STORES = [
    pytest.param(cls(**settings), id=f"{name}{index}")
    for name, cls in STORAGES.items()
    for index, settings in enumerate(cls.examples)
    if name != "dense"
]
every = pytest.mark.parametrize("storage", STORES)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def update(outputs: int, inputs: int, *, size: float, rank: int = 4, seed: int = 0, gained: bool = False) -> Factors:
    """An update of rank `rank` whose norm is `size` times that of a matrix of N(0, 1)."""
    A, B = numbers(rank, inputs, seed=seed), numbers(outputs, rank, seed=seed + 1)
    return Factors(A, size * B / rank**0.5, 1 + size * numbers(outputs, seed=seed + 2) if gained else None)


def kept(weight: nn.Module, merged: nn.Module, factors: Factors) -> float:
    """The share of the update that survives in what was written."""
    old = weight.dense()
    delta, written = factors.change(old), merged.dense() - old
    return float((written * delta).sum() / delta.square().sum())


@every
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("size", [0.01, 0.1, 0.5])
def test_rounding_with_the_update_in_view_keeps_it(storage: Storage, size: float, gained: bool) -> None:
    weight = storage.quantize(numbers(96, 256, seed=5))
    factors = update(96, 256, size=size, gained=gained)
    merged = weight.requantize(factors, "aware")
    assert merged.storage == storage
    assert kept(weight, merged, factors) == pytest.approx(1, abs=0.03)


def test_rounding_to_the_nearest_loses_a_small_update_in_four_bits() -> None:
    """Of an update of 1 % of W, nearest rounding keeps under 2 % and aware rounding nearly all."""
    weight = reparam.NF4().quantize(numbers(512, 512, seed=5))
    factors = update(512, 512, size=0.01, rank=16)
    assert kept(weight, weight.requantize(factors, "nearest"), factors) < 0.02
    assert kept(weight, weight.requantize(factors, "aware"), factors) > 0.97


@every
def test_the_effect_is_kept_for_inputs_that_the_update_sees(storage: Storage) -> None:
    """For x from the rows of A, the error is a small part of ΔW x; with nearest rounding in 4 bits it is most of it."""
    weight = storage.quantize(numbers(128, 512, seed=5))
    factors = update(128, 512, size=0.02)
    x = factors.A.T @ numbers(4, 32, seed=9)  # [I, 32]
    old = weight.dense()
    wanted = factors.change(old) @ x

    def missed(rounding: str) -> float:
        found = (weight.requantize(factors, rounding).dense() - old) @ x
        return float((found - wanted).norm() / wanted.norm())

    assert missed("aware") < 0.1
    assert missed("aware") < 0.5 * missed("nearest")


@every
def test_a_zero_update_changes_nothing(storage: Storage) -> None:
    weight = storage.quantize(numbers(33, 65, seed=1))
    same = weight.requantize(Factors(torch.zeros(2, 65), torch.zeros(33, 2)), "aware")
    assert models.same(dict(same.state_dict()), dict(weight.state_dict()))


def test_the_magnitudes_of_four_bits_stay_where_the_update_is_small() -> None:
    weight = reparam.NF4().quantize(numbers(33, 65, seed=1))
    moved = weight.requantize(update(33, 65, size=0.05), "aware")
    for name, tensor in weight.state_dict().items():
        assert torch.equal(moved.state_dict()[name], tensor) == (name != "codes")


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_what_is_left_in_the_basis_never_grows(rows: int, inputs: int, seed: int) -> None:
    rank = min(3, inputs)
    basis = torch.linalg.qr(numbers(inputs, rank, seed=seed))[0]
    delta = 0.1 * numbers(rows, inputs, seed=seed + 1)
    up, down = numbers(rows, inputs, seed=seed + 2).abs(), -numbers(rows, inputs, seed=seed + 3).abs()
    up[:, 0] = down[:, -1] = 0  # codes at the ends of the scale
    steps = moves(delta, up, down, basis[None])
    written = torch.where(steps > 0, up, down) * (steps != 0)
    before, after = delta @ basis, (delta - written) @ basis
    assert (after.norm(dim=1) <= before.norm(dim=1) * (1 + 1e-5)).all()
    assert steps[:, 0].max() <= 0 or (up[:, 0] == 0).all()
    assert not (steps[:, 0] > 0).any()
    assert not (steps[:, -1] < 0).any()


# ---- whole models


def quantized(storage: Storage, *, size: float = 0.02) -> tuple[nn.Module, reparam.Adapter]:
    """A model in this storage, with an adapter whose update has about this size."""
    model = models.llama(hidden_size=64, intermediate_size=96)
    reparam.quantize(model, storage)
    adapter = trained(model, method=LoRA(r=4, alpha=4), targets="all-linear")
    with torch.no_grad():
        for update in adapter.updates.values():
            update.B.mul_(size / 0.2)
    return model, adapter


@every
def test_a_model_is_merged_into_its_own_storage(storage: Storage) -> None:
    model, adapter = quantized(storage)
    y = logits(model)
    before = models.frozen(model)
    report = reparam.merge(model, into=storage.name, keep_base=True)
    assert report.survival().keys() == {storage.name}
    assert report.survival()[storage.name] == pytest.approx(1, abs=0.03)
    assert all(site.noise is not None and site.noise < 3 for site in report.sites)
    assert f"in {storage.name}, plus rounding noise of" in str(report)
    assert reparam.adapters(model) == {}
    assert {p.dtype for p in model.model.layers.parameters()} <= {torch.uint8, torch.int8, torch.int32, torch.float32}
    report.restore()
    assert models.same(models.frozen(model), before)
    assert torch.equal(logits(model), y)
    assert reparam.adapters(model) == {adapter.name: adapter}


def test_too_small_a_share_is_refused_and_nothing_is_changed() -> None:
    model, _ = quantized(reparam.NF4(), size=0.004)
    before, y = models.frozen(model), logits(model)
    with pytest.raises(ValueError, match=r"would keep 0\.\d+ of the update .*nothing was merged.*round with 'aware'"):
        reparam.merge(model, into="nf4", rounding="nearest")
    assert models.same(models.frozen(model), before)
    assert torch.equal(logits(model), y)
    with pytest.warns(UserWarning, match=r"merging into nf4 kept 0\.\d+ of the update"):
        report = reparam.merge(model, into="nf4", rounding="nearest", force=True)
    assert report.survival()["nf4"] < 0.9


def test_what_cannot_be_merged_into_says_why() -> None:
    model, _ = quantized(reparam.NF4())
    with pytest.raises(ValueError, match=r"into='int8' needs matrices stored in int8, but .*q_proj is nf4"):
        reparam.merge(model, into="int8")
    with pytest.raises(ValueError, match="rounding='up': expected one of aware, nearest"):
        reparam.merge(model, into="nf4", rounding="up")
    dense = models.llama()
    trained(dense)
    with pytest.raises(ValueError, match=r"storage 'dense' does not support merging"):
        reparam.merge(dense, into="dense")


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_default_quantized_matrices_become_dense_in_the_models_dtype(storage: Storage, dtype: torch.dtype) -> None:
    """The result is the dequantized W that the adapter was trained on, plus ΔW."""
    model = models.llama().to(dtype)
    reparam.quantize(model, storage)
    adapter = trained(model)
    wanted = {
        path: update.factors(adapter.modules[path].frozen).apply(adapter.modules[path].frozen.dense())
        for path, update in adapter.updates.items()
    }
    report = reparam.merge(model)
    for path, matrix in wanted.items():
        assert torch.equal(model.get_submodule(path).weight, matrix.to(dtype))
    assert report.survival()[dtype] > 0.99
    left = {path for path, _ in model.named_modules() if path.endswith("k_proj")}
    assert left <= storages_in(model).keys()  # the adapter does not go on these
