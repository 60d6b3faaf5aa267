"""The bank of a mixed batch on one site."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_numbers import numbers

from reparam.core.base import Factors
from reparam.sites.bank import Bank, Routing
from reparam.weights.dense import DenseWeight


@given(
    rows=st.lists(st.integers(-1, 3), min_size=1, max_size=6),
    tokens=st.integers(1, 3),
    kind=st.sampled_from(["plain", "gain", "bias", "both"]),
    embedding=st.booleans(),
    seed=st.integers(0, 50),
)
def test_each_row_of_a_bank_is_its_own_matrix(
    rows: list[int], tokens: int, kind: str, embedding: bool, seed: int
) -> None:
    """Compared with dense matrices; slots with different ranks, one without an update, gains in some."""
    o, i = (9, 5) if embedding else (4, 5)
    W, base_bias = numbers(o, i, seed=seed), None if embedding else numbers(o, seed=seed + 1)
    weight = DenseWeight(W)
    routing = Routing(torch.tensor(rows))
    bank = Bank(weight, routing).eval()
    gains, biases = kind in ("gain", "both"), kind in ("bias", "both") and not embedding
    matrices, offsets = [], []
    for slot, rank in enumerate((2, 0, 5, 1)):
        gain = numbers(o, seed=seed + 10 + slot) if gains and slot % 2 else None
        offset = numbers(o, seed=seed + 20 + slot) if biases and slot != 2 else None
        factors = Factors(numbers(rank, i, seed=seed + slot), numbers(o, rank, seed=seed + 30 + slot), gain)
        bank.write(slot, factors if rank else None, offset)
        matrices.append(factors.apply(W) if rank else W)
        offsets.append(torch.zeros(o, dtype=W.dtype) if offset is None else offset)
    if embedding:
        ids = torch.randint(o, (len(rows), tokens), generator=torch.Generator().manual_seed(seed))
        found = bank.rows(ids, weight)
        expected = torch.stack([(W if s < 0 else matrices[s])[ids[b]] for b, s in enumerate(rows)])
    else:
        assert base_bias is not None
        x = numbers(len(rows), tokens, i, seed=seed + 5)
        found = bank(x, weight, base_bias)
        expected = torch.stack(
            [
                x[b] @ (W if s < 0 else matrices[s]).T + base_bias + (0 if s < 0 else offsets[s])
                for b, s in enumerate(rows)
            ]
        )
        routing.tokens = tokens
        torch.testing.assert_close(bank(x.view(-1, i), weight, base_bias), expected.view(-1, o))
    torch.testing.assert_close(found, expected)


def test_a_slot_that_is_written_again_keeps_nothing_of_before() -> None:
    weight = DenseWeight(numbers(4, 5))
    bank = Bank(weight, Routing(torch.tensor([0]))).eval()
    x = numbers(1, 2, 5)
    bank.write(0, Factors(numbers(6, 5), numbers(4, 6), numbers(4)), numbers(4))
    bank.write(0, Factors(numbers(1, 5, seed=1), numbers(4, 1, seed=2)))
    torch.testing.assert_close(bank(x, weight), x @ (weight.matrix + numbers(4, 1, seed=2) @ numbers(1, 5, seed=1)).T)
    bank.write(0, None)
    torch.testing.assert_close(bank(x, weight), weight(x))


def test_rows_and_tokens_are_told_from_the_shape() -> None:
    routing = Routing(torch.tensor([0, 1, -1]))
    assert routing.split(torch.Size([3, 7, 5])) == (3, 7)
    assert routing.split(torch.Size([3, 5])) == (3, 1)
    assert routing.split(torch.Size([3, 2, 2, 5])) == (3, 4)
    for shape in ([21, 5], [1, 7, 5], [7, 3, 5]):
        with pytest.raises(ValueError, match="rows of the mixed batch; select one adapter at a time"):
            routing.split(torch.Size(shape))
    routing.tokens = 7
    assert routing.split(torch.Size([21, 5])) == (3, 7)
    with pytest.raises(
        ValueError, match=r"cannot map an activation of shape \[14, 5\] to the 3 rows of the mixed batch"
    ):
        routing.split(torch.Size([14, 5]))


def test_writing_a_slot_of_a_twin_leaves_the_bank_in_use_as_it_is() -> None:
    W = numbers(4, 5, seed=0)
    weight, routing = DenseWeight(W), Routing(torch.tensor([0, 1, -1]))
    bank = Bank(weight, routing).eval()
    own = [Factors(numbers(2, 5, seed=s), numbers(4, 2, seed=s + 1), numbers(4, seed=s + 2)) for s in (1, 5, 9)]
    for slot in (0, 1):
        bank.write(slot, own[slot])
    x = numbers(3, 2, 5, seed=3)
    before = bank(x, weight)
    twin = bank.twin()
    twin.write(2, own[2], more=4)
    assert torch.equal(bank(x, weight), before)
    assert torch.equal(twin(x, weight), before)
    routing.route(torch.tensor([2, 1, -1]))
    assert twin.has_room(3, own[2], None) is False  # the slot is not known yet; its rows are there
    assert twin.places["A"].size == 6 + 4 * 2
    assert torch.allclose(twin(x, weight)[0], x[0] @ own[2].apply(W).T, atol=1e-5)
