"""The bank of a mixed batch: when slots are written, reused, moved and left unchanged."""

import itertools
from collections.abc import Callable

import models
import pytest
import torch
from selecting import banks, check_rows, close, moved, two, under
from torch import nn

import reparam
from reparam.sites.bank import Bank
from reparam.sites.held import BANK


def optimize(model: nn.Module, adapter: reparam.Adapter) -> None:
    reparam.select(model, adapter.name)
    adapter.requires_grad_()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    models.loss(model).backward()
    optimizer.step()


def overwrite(model: nn.Module, adapter: reparam.Adapter) -> None:
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if ".updates.a." in name}
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("way", [optimize, overwrite])
def test_an_adapter_that_changed_is_written_again(way: Callable[[nn.Module, reparam.Adapter], None]) -> None:
    model = two()
    before = under(model, ["a", "b", None])
    way(model, reparam.adapters(model)["a"])
    after = under(model, ["a", "b", None])
    assert not close(after[0], before[0])
    assert close(after[0], under(model, "a")[0])
    assert torch.equal(after[1:], before[1:])


def test_an_adapter_that_did_not_change_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    written: list[int] = []
    write = Bank.write
    monkeypatch.setattr(Bank, "write", lambda bank, slot, *rest: (written.append(slot), write(bank, slot, *rest)))
    sites = len(reparam.adapters(model)["a"].sites)
    reparam.select(model, ["a", "a", None])
    assert written == [0] * sites  # b is not in use
    reparam.select(model, ["a", "b", None])
    assert written == [0] * sites + [1] * sites
    reparam.select(model, ["b", "a"])
    assert len(written) == 2 * sites


def test_slots_are_used_again_after_removal() -> None:
    model = two()
    moved(model, "c", 3, bias=True)
    under(model, ["a", "b", "c"])
    size = {len(bank.A) for bank in banks(model)}
    names = ["b", "d", "e", "f", "g"]
    for seed, (old, new) in enumerate(itertools.pairwise(names)):
        reparam.remove(model, old)
        moved(model, new, 4 + seed, r=1)
        check_rows(model, [new, "a", "c"])
    assert {len(bank.A) for bank in banks(model)} == size


def test_the_bank_is_no_part_of_the_state() -> None:
    model = two()
    before, count = model.state_dict().keys(), sum(1 for _ in model.parameters())
    under(model, ["a", "b", None])
    assert banks(model)
    assert model.state_dict().keys() == before
    assert sum(1 for _ in model.parameters()) == count


def test_a_bank_moves_with_the_model() -> None:
    model = two()
    under(model, ["a", "b", None])
    model.double()
    check_rows(model, ["b", None, "a"])
    assert under(model, ["b", None, "a"]).dtype == torch.float64


def test_the_bank_of_a_merged_and_restored_model_still_serves() -> None:
    model = two()
    mixed = under(model, ["a", "b", None])
    reparam.merge(model, keep_base=True).restore()
    assert torch.equal(under(model, ["a", "b", None]), mixed)
    check_rows(model, ["b", None, "a"])


def test_every_site_has_one_bank_that_is_used_when_mixed_only() -> None:
    model = two()
    state = model.reparam_state
    reparam.select(model, ["a", "b", None])
    assert {module.active for module in state.sites.values()} == {BANK}
    assert len(banks(model)) == len(state.sites)
    reparam.select(model, "a")
    assert {module.active for module in state.sites.values()} == {"a"}


def test_a_mixed_batch_sees_the_steps_of_a_fused_optimizer() -> None:
    """AdamW with fused=True changes parameters without raising their version counters."""
    model = two()
    adapter = reparam.adapters(model)["a"].requires_grad_()
    before = under(model, ["a", "b", None])
    reparam.select(model, "a")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True)
    models.loss(model).backward()
    optimizer.step()
    after = under(model, ["a", "b", None])
    assert not close(after[0], before[0])
    assert close(after[0], under(model, "a")[0])
    assert torch.equal(after[1:], before[1:])
