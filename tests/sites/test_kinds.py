"""A new kind of site is one class: a toy kind, registered during a test, supports all that a linear map does."""

from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
from cases import error
from torch import Tensor, nn
from toys import Product, ProductSite, registered

import reparam
from reparam.core.base import Site
from reparam.errors import FormatError
from reparam.sites import targets
from reparam.sites.kinds import KINDS, kind, kind_of


@pytest.fixture(autouse=True)
def _product() -> Iterator[None]:
    with registered(product=ProductSite):
        yield


X = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Product(5, 7)).double().eval()


def attach(model: nn.Module, name: str, *, r: int = 2) -> reparam.Adapter:
    return reparam.attach(model, reparam.LoRA(r=r, alpha=4), targets="2", name=name)


def step(model: nn.Module, adapter: reparam.Adapter) -> None:
    """Move B away from 0, and make one step of training."""
    nn.init.normal_(adapter.updates["2"].B, generator=torch.Generator().manual_seed(len(adapter.name)))  # type: ignore[arg-type]
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(X).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(adapter.parameters(), before, strict=True))


def closed(adapter: reparam.Adapter) -> Tensor:
    """The output with W + (alpha / r) B A as the matrix; alpha / r is 1 or 2, so that scaling is exact."""
    first, _, last = make()
    A, B = (adapter.tensors()[f"2.{name}"].detach().double() for name in "AB")
    return torch.tanh(first(X)) @ (last.weight + 4 / len(A) * B @ A).T


def test_it_trains_is_saved_loaded_merged_and_restored(tmp_path: Path) -> None:
    model = make()
    base, shape, held = model(X), str(model), model[2].weight.data_ptr()
    adapter = attach(model, "one")
    assert torch.equal(model(X), base)
    assert adapter.sites == {"2": Site("2", "product", 7, 5)}
    assert adapter.modules["2"].frozen.tensor().data_ptr() == held
    step(model, adapter)
    y = model(X)
    assert error(y, closed(adapter)) < 1e-12
    assert error(y, base) > 1e-2

    adapter.save(tmp_path / "a")
    other = make()
    again = reparam.load(other, tmp_path / "a")
    assert again.sites == adapter.sites
    assert torch.equal(other(X), y)

    report = reparam.merge(model, keep_base=True)
    assert isinstance(model[2], Product)
    assert error(model(X), y) < 1e-12
    report.restore()
    assert torch.equal(model(X), y)
    reparam.remove(model, "one")
    assert str(model) == shape
    assert torch.equal(model(X), base)


def test_a_mixed_batch_is_each_row_alone() -> None:
    model = make()
    one, other = attach(model, "one"), attach(model, "other", r=4)
    for adapter in (one, other):
        with reparam.select(model, adapter.name):
            adapter.requires_grad_()
            step(model, adapter)
    with torch.no_grad(), reparam.select(model, ["other", None, "one"]):
        mixed = model(X)
    for row, expected in enumerate((closed(other), make()(X), closed(one))):
        assert error(mixed[row], expected[row]) < 1e-12


def test_targets_reach_it_and_name_it() -> None:
    model = make()
    for wanted in ("all-linear", "everything", "re:.*"):
        assert targets.resolve(model, wanted) == ["0", "2"]
    empty = nn.Sequential(Product(5, 0))
    with pytest.raises(ValueError, match="0: a product without rows"):
        targets.resolve(empty, "0")
    with pytest.raises(ValueError, match=r"Tanh is not supported; adapters support .*norms and products"):
        targets.resolve(model, "1")
    with pytest.raises(ValueError, match="ReLU is not a product"):
        ProductSite.wrap(nn.ReLU())
    with pytest.raises(ValueError, match="Tanh is not supported"):
        targets.wrap(nn.Tanh())


def test_a_storage_takes_its_matrix() -> None:
    model = nn.Sequential(Product(64, 64))
    base = model(torch.ones(1, 64))
    reparam.quantize(model, "int8", targets="0")
    assert error(model(torch.ones(1, 64)), base) < 0.1
    reparam.quantize(model, "dense", targets="0")
    assert isinstance(model[0], Product)


def test_a_bias_that_it_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="this product has no bias"):
        reparam.attach(make(), reparam.BitFit(create=True), targets="2")


def test_files_of_a_kind_that_is_gone_are_refused(tmp_path: Path) -> None:
    attach(make(), "one").save(tmp_path / "a")
    found = KINDS.pop("product")
    try:
        with pytest.raises(FormatError, match=r"kind: expected one of .*'vector', found 'product'"):
            reparam.load(make(), tmp_path / "a")
    finally:
        KINDS["product"] = found


@pytest.mark.parametrize("name", models.ALL)
def test_at_most_one_kind_claims_a_module(name: str) -> None:
    for path, module in models.ALL[name]().named_modules():
        claiming = [cls for cls in KINDS.values() if cls.claims(module)]
        assert len(claiming) <= 1, path
        assert kind_of(module) is (claiming[0] if claiming else None)


def test_names_are_unique() -> None:
    with pytest.raises(AssertionError, match="two kinds of sites are called linear"):
        kind("linear")(ProductSite)
