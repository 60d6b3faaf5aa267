"""8-bit blocks: bitsandbytes' maps bit for bit, and the exact nearest level for every float32."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reparam.optim.blockwise import codebook, dequantize, dynamic_map, quantize

SIGNS = pytest.mark.parametrize("signed", [True, False])
TINY = torch.finfo(torch.float32).tiny


@SIGNS
def test_the_maps_are_those_of_bitsandbytes(signed: bool) -> None:
    judge = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed=signed), judge.create_dynamic_map(signed=signed))


@pytest.mark.parametrize(
    ("signed", "expected"),
    [
        (True, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        (False, "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
    ],
)
def test_the_maps_are_the_same_on_every_machine(signed: bool, expected: str) -> None:
    """SHA-256 of the maps of bitsandbytes 0.50.2."""
    assert hashlib.sha256(dynamic_map(signed=signed).numpy().tobytes()).hexdigest() == expected


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The code of the nearest level (the lower one of a tie), by comparing with all float32 midpoints."""
    middle = ((levels[:-1] + levels[1:]) / 2).double()
    return (x.double()[:, None] > middle).sum(1)


@SIGNS
def test_every_bucket_of_the_look_up_is_exact_at_its_ends_and_thresholds(signed: bool) -> None:
    """Codes change only at thresholds, so codes that are right at all of these are right for every number."""
    levels = dynamic_map(signed=signed)
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    ends = torch.cat([upper, upper | 0xFFFF]).view(torch.float32)
    middle = (levels[:-1] + levels[1:]) / 2
    near = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), levels])
    x = torch.cat([ends, near])
    x = x[(x.abs() <= 1) & ((x >= 0) | signed)]
    x = torch.cat([x, torch.zeros(-len(x) % 255)]).view(-1, 255)
    block = torch.cat([x, torch.ones(len(x), 1)], dim=1)  # a one in each block makes its scale one
    codes, scales = quantize(block, codebook(signed=signed))
    assert torch.equal(scales, torch.ones_like(scales))
    expected = nearest(block.view(-1), levels)
    if not signed:
        expected[(expected == 0) & (block.view(-1) > 0)] = 1  # nothing above zero becomes zero
    assert torch.equal(codes.view(-1).long(), expected)


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 30), signed=st.booleans())
def test_rounding_errors_are_within_half_a_step_of_the_map(seed: int, exponent: int, signed: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 256, generator=draw) * 2.0**exponent
    values = values if signed else values.square()
    book = codebook(signed=signed)
    codes, scales = quantize(values, book)
    back = dequantize(codes, scales, book)
    assert torch.equal(scales, values.abs().amax(1, keepdim=True))
    # The largest gaps: from -1 to the lowest level, or within the top decade.
    gap = 0.0070313 if signed else 0.0035157
    assert ((back - values).abs() <= gap * scales * 1.0001).all()
    assert (back[values > 0] > 0).all() or signed


def test_zeros_stay_zeros_and_leave_no_nan() -> None:
    for signed in (True, False):
        book = codebook(signed=signed)
        codes, scales = quantize(torch.zeros(2, 256), book)
        assert torch.equal(dequantize(codes, scales, book), torch.zeros(2, 256))
        assert torch.equal(scales, torch.full((2, 1), TINY))


def test_subnormal_blocks_survive() -> None:
    book = codebook(signed=True)
    values = torch.full((1, 256), TINY / 8)
    assert ((dequantize(*quantize(values, book), book) - values).abs() <= 0.0071 * TINY).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_block(bad: float) -> None:
    book = codebook(signed=True)
    values = torch.ones(3, 256)
    values[1, 7] = bad
    back = dequantize(*quantize(values, book), book)
    assert torch.equal(back[[0, 2]], values[[0, 2]])
    assert not torch.isfinite(back[1, 7])
