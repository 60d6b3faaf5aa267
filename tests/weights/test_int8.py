"""Int8: a worked example, rounding, invariants of every matrix, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reparam.weights.int8 import Int8, Int8Weight
from reparam.weights.quantized import floats

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
shapes = st.tuples(st.integers(1, 30), st.integers(1, 90))
seeds = st.integers(0, 2**16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(*rows: list[float]) -> Int8Weight:
    return Int8().quantize(torch.tensor(rows))


def test_one_outlier_costs_its_row_the_others() -> None:
    """In steps, 2, 3, 4 and 1000 are 0.254, 0.381, 0.508 and 127."""
    weight = quantized([2.0, 3.0, 4.0, 1000.0], [2.0, 3.0, 4.0, 10.0])
    assert weight.codes.tolist() == [[0, 0, 1, 127], [25, 38, 51, 127]]
    assert floats(weight.absmax).tolist() == [1000, 10]
    assert weight.dense()[0].tolist() == pytest.approx([0, 0, 1000 / 127, 1000])


def test_a_half_is_rounded_to_the_even_number() -> None:
    halves = [0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, 127.0]
    assert quantized(halves).codes.tolist() == [[0, 2, 2, 4, 0, -2, -2, 126, 127]]


def test_a_row_of_zeros_stays_one() -> None:
    weight = quantized([0.0, 0.0, -0.0], [1.0, 0.0, -1.0])
    assert weight.codes.tolist() == [[0, 0, 0], [127, 0, -127]]
    assert weight.dense().tolist() == [[0, 0, 0], [1, 0, -1]]


@given(shape=shapes, seed=seeds, dtype=st.sampled_from(DTYPES), power=st.integers(-60, 99))
def test_no_entry_is_further_away_than_half_a_step(
    shape: tuple[int, int], seed: int, dtype: torch.dtype, power: int
) -> None:
    w = normal(*shape, seed=seed).clamp(-1, 1).to(dtype)
    w = w if dtype == torch.float16 else w * 2.0**power
    weight = Int8().quantize(w)
    found, absmax = weight.dense(), w.float().abs().amax(1, keepdim=True)
    assert bool(((found - w.float()).abs() <= (1 / 254 + 1e-6) * absmax).all())
    assert bool((weight.codes.abs().amax(1) == 127)[absmax[:, 0] > 0].all())
    assert torch.equal(Int8().quantize(found).codes, weight.codes)


@given(shape=shapes, seed=seeds, dtype=st.sampled_from(DTYPES))
def test_every_way_to_ask_a_weight_gives_the_same_numbers(
    shape: tuple[int, int], seed: int, dtype: torch.dtype
) -> None:
    """Whole, by rows, by lookup, and as an operator; all equal the codes times the step."""
    w = normal(*shape, seed=seed, dtype=dtype)
    weight = Int8().quantize(w)
    whole = weight.codes * (w.float().abs().amax(1) / 127)[:, None]
    assert torch.equal(weight.dense(), whole)
    for rows in (slice(1, None), slice(0, 0), slice(shape[0] // 2, shape[0] // 2 + 3)):
        assert torch.equal(weight.dense(rows), whole[rows])
    ids = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]])
    assert torch.equal(weight.rows(ids), whole[ids].to(dtype))
    assert torch.equal(weight.tensor(), whole.to(dtype))
    assert torch.equal(weight(torch.eye(shape[1], dtype=torch.float64)), whole.double().t())


def test_bits_an_entry() -> None:
    """Eight bits, plus a float32 for each row."""
    weight = Int8().quantize(normal(20, 64))
    assert sum(p.nbytes for p in weight.parameters()) * 8 == (8 + 32 / 64) * 20 * 64
    assert {name: p.dtype for name, p in weight.named_parameters()} == {"codes": torch.int8, "absmax": torch.int32}


def test_numbers_at_both_ends_of_what_can_be_quantized() -> None:
    for size in (1e-36, 1e30):
        w = normal(4, 50).clamp(-1, 1) * size
        assert float((Int8().quantize(w).dense() - w).abs().max()) <= size / 250
    tiny = normal(4, 50).clamp(-1, 1) * 1e-42
    assert float((Int8().quantize(tiny).dense() - tiny).abs().max()) <= 1.1e-42


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.ones(64), r"expected a non-empty matrix .* got float32 \[64\]$"),
        (torch.ones(0, 3), r"numbers, got float32 \[0, 3\]$"),
        (Int8().quantize(torch.ones(2, 3)).codes, r"got int8 \[2, 3\]; is it quantized already\?$"),
        (torch.tensor([[1.0, float("nan")]]), r"NaN, infinity .*first at \[0, 1\]"),
        (torch.tensor([[1.0], [float("inf")]]).half(), r"NaN, infinity .*first at \[1, 0\]"),
        (torch.tensor([[1e200, 1.0]]).double(), r"beyond 1e30 .*first at \[0, 0\]"),
    ],
    ids=["vector", "empty", "quantized", "NaN", "infinity", "large"],
)
def test_what_cannot_be_quantized_is_refused_in_a_sentence(w: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^int8: .*{message}"):
        Int8().quantize(w)
