"""A bank takes the memory of the adapters in it, within a budget, and each row still has its own adapter's output."""

import itertools
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_numbers import numbers
from selecting import banks, change, check_rows, close, moved, under
from torch import Tensor

import reparam
from reparam.core.base import Factors
from reparam.sites.bank import Bank
from reparam.sites.routing import Routing
from reparam.weights.dense import DenseWeight

SLACK = 1.25


def size(adapter: reparam.Adapter) -> int:
    """The bytes of an adapter's factors."""
    return sum(p.nbytes for p in adapter.parameters())


def held(model: Any) -> int:
    return sum(tensor.nbytes for bank in banks(model) for tensor in bank.buffers() if tensor.is_floating_point())


def wide(**ranks: int) -> Any:
    model = models.llama(hidden_size=64, intermediate_size=96)
    for seed, (name, rank) in enumerate(ranks.items()):
        moved(model, name, seed, r=rank)
    return model


def test_one_large_adapter_does_not_enlarge_the_others() -> None:
    ranks = {"a": 2, "b": 2, "c": 3, "d": 2, "e": 2, "large": 20}
    model = wide(**ranks)
    check_rows(model, ["a", "large", "c"])
    under(model, ["b", "d", "e"])
    total = sum(size(adapter) for adapter in reparam.adapters(model).values())
    assert total <= held(model) <= SLACK * total
    check_rows(model, ["large", "e", "d"])


@pytest.mark.parametrize("method", ["full", "dora"])
def test_a_change_of_full_rank_takes_one_matrix(method: str) -> None:
    model = models.llama()
    settings = {"norm_axis": "input", "r": 2} if method == "dora" else {}
    for seed, name in enumerate(("a", "b")):
        change(reparam.attach(model, method, name=name, **settings), seed)
    check_rows(model, ["a", None, "b"])
    matrices = sum(m.frozen.out_features * m.frozen.in_features for m in model.reparam_state.sites.values())
    assert held(model) <= SLACK * 2 * 4 * matrices


KINDS = ["low", "gain", "bias", "full", "none", "free"]
Step = tuple[int, str, int]  # slot, what it gets, rank


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 4), st.sampled_from(["low", "gain", "bias", "full", "none", "free"]), st.integers(0, 6)
        ),
        min_size=1,
        max_size=12,
    ),
    exact=st.booleans(),
    embedding=st.booleans(),
)
def test_writing_and_freeing_in_any_order(steps: list[Step], exact: bool, embedding: bool) -> None:
    """After each step, every slot computes what was last written to it, compared with dense matrices in float64."""
    outputs, inputs = 9, 8
    W = numbers(outputs, inputs)
    weight = DenseWeight(W)
    routing = Routing(torch.arange(-1, 5))
    bank = Bank(weight, routing).eval()
    bank.free(4)
    matrices, offsets = [W] * 5, [W.new_zeros(outputs)] * 5
    x, ids = numbers(6, 2, inputs, seed=1), torch.arange(12).view(6, 2) % outputs
    contents: dict[int, tuple[Factors | None, Tensor | None]] = {}
    for seed, (slot, what, rank) in enumerate(steps):
        if what == "free":
            bank.free(slot)
            contents.pop(slot, None)
            matrices[slot], offsets[slot] = W, W.new_zeros(outputs)
        else:
            A, B = numbers(rank, inputs, seed=10 + seed), numbers(outputs, rank, seed=40 + seed)
            if what == "full":
                A, B = torch.eye(inputs, dtype=W.dtype), numbers(outputs, inputs, seed=40 + seed)
            gain = numbers(outputs, seed=70 + seed) if what == "gain" else None
            factors = None if what == "none" else Factors(A, B, gain)
            bias = numbers(outputs, seed=90 + seed) if what == "bias" and not embedding else None
            bank.write(slot, factors, bias, exact)
            contents[slot] = factors, bias
            matrices[slot] = W if factors is None else factors.apply(W)
            offsets[slot] = W.new_zeros(outputs) if bias is None else bias
        if embedding:
            expected = torch.stack([own[i] for own, i in zip([W, *matrices], ids, strict=True)])
            torch.testing.assert_close(bank.rows(ids, weight), expected)
        else:
            pairs = zip(x, [W, *matrices], [torch.zeros(outputs).to(W), *offsets], strict=True)
            expected = torch.stack([row @ own.T + offset for row, own, offset in pairs])
            torch.testing.assert_close(bank(x, weight), expected)
        used = sum(map(bank.bytes_of, range(5)))
        assert used == sum(bank.bytes_for(*held) for held in contents.values())
        assert used <= bank.nbytes
    bank.trim()
    assert bank.nbytes == used


def test_what_is_in_use_does_not_move_while_free_rows_suffice() -> None:
    weight = DenseWeight(numbers(40, 40))
    bank = Bank(weight, Routing(torch.tensor([0, 1, 2]))).eval()
    for slot, rank in enumerate((3, 4, 2)):
        bank.write(slot, Factors(numbers(rank, 40, seed=slot), numbers(40, rank, seed=slot + 9)))
    place, spans = bank.A.data_ptr(), bank.spans.clone()
    for rank in (4, 2, 3, 1, 4):
        bank.free(1)
        bank.write(1, Factors(numbers(rank, 40, seed=rank), numbers(40, rank, seed=rank + 9)))
        assert bank.A.data_ptr() == place
        assert torch.equal(bank.spans[[0, 2]], spans[[0, 2]])


def test_removing_a_large_adapter_gives_its_memory_back() -> None:
    model = wide(a=2, b=2, large=20)
    before = under(model, ["a", "large", "b"])
    reparam.remove(model, "large")
    rest = sum(size(adapter) for adapter in reparam.adapters(model).values())
    assert held(model) <= 2 * rest
    after = under(model, ["a", None, "b"])
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_a_budget_is_kept() -> None:
    names = {"a": 2, "b": 3, "c": 2, "d": 5, "e": 1}
    model = wide(**names)
    sizes = {name: size(adapter) for name, adapter in reparam.adapters(model).items()}
    budget = sizes["b"] + sizes["d"]  # the two largest
    for pair in [*itertools.permutations(names, 2), *itertools.combinations(names, 2)]:
        rows = [pair[0], None, pair[1]]
        with reparam.select(model, rows, budget=budget):
            mixed = models.logits(model)
            assert held(model) <= budget
        for row, name in enumerate(rows):
            assert close(mixed[row], under(model, name)[row])


def test_the_least_recently_used_adapter_leaves_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide(a=2, b=2, c=2, d=2)
    budget = 3 * size(reparam.adapters(model)["a"])
    reparam.select(model, ["a", "b", "c"], budget=budget)
    reparam.select(model, ["a", "b", "b"], budget=budget)
    reparam.select(model, ["d", "b", "b"], budget=budget)  # c leaves
    written: list[int] = []
    write = Bank.write
    monkeypatch.setattr(Bank, "write", lambda bank, slot, *rest: (written.append(slot), write(bank, slot, *rest)))
    reparam.select(model, ["a", "b", "d"], budget=budget)
    assert not written
    check_rows(model, ["a", "b", "d"])
    reparam.select(model, ["a", "d", "c"], budget=budget)
    assert len(written) == len(banks(model))


def test_a_batch_that_needs_more_than_the_budget_changes_nothing() -> None:
    model = wide(a=2, b=2, large=20)
    sizes = {name: size(adapter) for name, adapter in reparam.adapters(model).items()}
    reparam.select(model, ["a", None, "b"], budget=sizes["large"])
    before, tables = models.logits(model), [bank.A.clone() for bank in banks(model)]
    message = (
        rf"2 adapters of this batch need {sizes['a'] + sizes['large']:,} bytes in the banks, above the budget of "
        rf"{sizes['large']:,}; the largest is 'large' with {sizes['large']:,}"
    )
    with pytest.raises(ValueError, match=message):
        reparam.select(model, ["large", "a", "a"], budget=sizes["large"])
    assert torch.equal(models.logits(model), before)
    assert all(torch.equal(bank.A, table) for bank, table in zip(banks(model), tables, strict=True))


def test_a_selection_that_ends_keeps_the_budget_of_the_one_before() -> None:
    model = wide(a=2, b=2, c=2)
    budget = 2 * size(reparam.adapters(model)["a"])
    reparam.select(model, ["a", "b", None], budget=budget)
    with reparam.select(model, ["a", "b", "c"]):
        check_rows(model, ["a", "b", "c"])
    assert held(model) <= budget * SLACK
    reparam.select(model, ["b", "c", None], budget=budget)
    assert held(model) <= budget


def test_a_selection_in_inference_mode_can_be_extended_outside() -> None:
    model = wide(a=2, b=2, c=2)
    with torch.inference_mode():
        reparam.select(model, ["a", None, "a"])
    check_rows(model, ["a", "b", "c"])


def test_a_site_that_comes_later_has_a_slot_for_every_adapter() -> None:
    model = models.llama()
    for seed, name in enumerate("abc"):
        moved(model, name, seed, targets=["q_proj"])
    check_rows(model, ["a", "b", "c"])
    reparam.remove(model, "a")
    moved(model, "d", 9, targets=["v_proj"])
    check_rows(model, ["c", "d", "b"])
