"""Invariants of every method and storage from `attach` to `merge`, on small transformers models."""

import copy
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from cases import Family, base_of, error, has_factors, move, starts_exactly, whole_models
from models import IDS, logits

import reparam
from reparam.core.method import Method
from reparam.errors import InputDependentError
from reparam.sites.module import Adapted
from reparam.sites.walk import storages_in


def train(model: torch.nn.Module, adapter: reparam.Adapter, *, steps: int, rate: float = 1e-2) -> list[float]:
    """Train with weight decay and all parameters of the model in the optimizer; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    adapter.bind(optimizer)
    model.train()
    losses = []
    for _ in range(steps):
        loss = models.loss(model)
        if (extra := adapter.penalty()) is not None:
            loss = loss + extra
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    model.eval()
    return losses


@whole_models(0)
def test_a_fresh_adapter_is_the_base_and_so_is_none(family: Family, storage: str, method: Method) -> None:
    model = family.build(storage)
    base = logits(model)
    state = torch.get_rng_state()
    adapter = family.attach(model, method)
    assert torch.equal(torch.get_rng_state(), state)  # attaching draws nothing from the program's generator
    assert torch.equal(logits(model), base) if starts_exactly(adapter) else error(logits(model), base) < 1e-6
    move(adapter, 1)
    assert error(logits(model), base) > 1e-2
    with reparam.select(model, None):
        assert torch.equal(logits(model), base)
    assert error(logits(model), base) > 1e-2


@whole_models(1)
def test_training_lowers_the_loss_and_leaves_the_base_alone(family: Family, storage: str, method: Method) -> None:
    model, adapter = family.adapted(method, storage)
    before = base_of(model)
    start = {name: p.detach().clone() for name, p, _ in adapter.named_parameters()}
    losses = train(model, adapter, steps=6)
    assert losses[-1] < 0.99 * losses[0]
    assert models.same(base_of(model), before)
    assert [name for name, p, _ in adapter.named_parameters() if torch.equal(p, start[name])] == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@whole_models(2)
def test_merging_keeps_the_outputs_and_restores_exactly(family: Family, storage: str, method: Method) -> None:
    model, adapter = family.adapted(method, storage, seed=1)
    before, y = base_of(model), logits(model)
    if not has_factors(adapter):
        with pytest.raises(InputDependentError):
            reparam.merge(model)
        assert models.same(base_of(model), before)
        assert torch.equal(logits(model), y)
        return
    report = reparam.merge(model, keep_base=True)
    assert error(logits(model), y) < 1e-5
    kept = tuple(storages_in(model))
    assert not set(kept) & set(adapter.sites)
    found, plain = (
        {path: type(module) for path, module in m.named_modules() if not path.startswith(kept)}
        for m in (model, family.make())
    )
    assert found == plain
    assert min(report.survival().values()) > 0.999
    assert {site.name for site in report.sites} == set(adapter.sites)
    report.restore()
    assert models.same(base_of(model), before)
    assert torch.equal(logits(model), y)


@whole_models(3)
def test_a_mixed_batch_is_each_row_alone(family: Family, storage: str, method: Method) -> None:
    """Rows with different adapters, ranks and sites, and without adapter, in a forward and in `generate`."""
    model, adapter = family.adapted(method, storage, seed=1)
    move(family.attach(model, reparam.LoRA(r=3), name="wide"), 2, size=0.15)
    move(reparam.attach(model, reparam.LoRA(r=5, alpha=20), targets="attention", name="part"), 3, size=0.15)
    rows = ["one", None, "part", "wide", "one", "part"]
    if not has_factors(adapter):
        with pytest.raises(InputDependentError):
            reparam.select(model, rows)
        assert model.reparam_state.choice == "part"
        rows = [name for name in rows if name != "one"]
    ids = torch.randint(2, models.VOCABULARY, (len(rows), 7), generator=torch.Generator().manual_seed(11))
    length = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    keys = model.state_dict().keys()
    with torch.no_grad(), reparam.select(model, rows):
        mixed, told = logits(model, ids), model.generate(ids, **length)
    with torch.no_grad(), reparam.select(model, None):
        base = logits(model, ids)
    tokens = set()
    for name in dict.fromkeys(rows):
        with torch.no_grad(), reparam.select(model, name):
            alone, told_alone = logits(model, ids), model.generate(ids, **length)
        for row in (row for row, of in enumerate(rows) if of == name):
            assert error(mixed[row], alone[row]) < 1e-5
            assert name is not None or torch.equal(mixed[row], alone[row])
            assert torch.equal(told.sequences[row], told_alone.sequences[row])
            assert error(torch.stack(told.logits)[:, row], torch.stack(told_alone.logits)[:, row]) < 1e-5
            assert (name is None) == torch.equal(base[row], alone[row])
            tokens.add(tuple(told.sequences[row, 7:].tolist()))
    assert len(tokens) > 1
    assert model.state_dict().keys() == keys


@whole_models(4)
def test_saved_and_loaded_is_the_same_bit_for_bit(family: Family, storage: str, method: Method, tmp_path: Path) -> None:
    model, adapter = family.adapted(method, storage)
    train(model, adapter, steps=2)
    adapter.save(tmp_path / "adapter")
    other = family.build(storage)
    again = reparam.load(other, tmp_path / "adapter", name="again")
    assert torch.equal(logits(other), logits(model))
    assert again.method == adapter.method
    assert models.same(again.tensors(), adapter.tensors())
    again.save(tmp_path / "again")
    assert (tmp_path / "again/adapter.safetensors").read_bytes() == (
        tmp_path / "adapter/adapter.safetensors"
    ).read_bytes()


@whole_models(5)
def test_the_same_seed_gives_the_same_adapter(family: Family, storage: str, method: Method) -> None:
    """Whatever was drawn or attached before."""
    _, adapter = family.adapted(method, storage)
    model = family.build(storage)
    torch.manual_seed(99)
    torch.rand(3)
    reparam.attach(model, reparam.LoRA(r=2, seed=5), targets="attention", name="first")
    assert models.same(family.attach(model, method).tensors(), adapter.tensors())


@whole_models(6)
def test_a_copy_of_the_model_is_a_model_of_its_own(family: Family, storage: str, method: Method) -> None:
    model, adapter = family.adapted(method, storage, seed=1)
    twin = copy.deepcopy(model)
    y = logits(model)
    assert torch.equal(logits(twin), y)
    move(reparam.adapters(twin)["one"], 2)
    assert error(logits(twin), y) > 1e-2
    reparam.select(twin, None)
    assert torch.equal(logits(model), y)
    reparam.remove(twin, "one")
    assert torch.equal(logits(model), y)
    assert all(p.requires_grad for p in adapter.parameters())


@whole_models(7)
def test_the_state_dict_goes_round_without_pickle(family: Family, storage: str, method: Method) -> None:
    model, _ = family.adapted(method, storage, seed=1)
    content = safetensors.torch.save({k: v.contiguous() for k, v in model.state_dict().items()})
    other, _ = family.adapted(method, storage)
    other.load_state_dict(safetensors.torch.load(content))
    assert torch.equal(logits(other), logits(model))


@whole_models(8)
def test_removing_the_last_adapter_gives_the_plain_model_back(family: Family, storage: str, method: Method) -> None:
    model = family.build(storage)
    base, shape = logits(model), str(model)
    for name in ("one", "two"):
        move(family.attach(model, method, name=name), 1)
    reparam.remove(model, "one")
    assert reparam.adapters(model).keys() == {"two"}
    assert error(logits(model), base) > 1e-2
    reparam.remove(model, "two")
    assert str(model) == shape
    assert reparam.adapters(model) == {}
    assert storage != "dense" or not any(isinstance(module, Adapted) for module in model.modules())
    assert not model._forward_pre_hooks
    assert torch.equal(logits(model, IDS), base)
