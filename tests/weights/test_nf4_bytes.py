"""Invariants of the NF4 bytes of every matrix, with plain and doubly quantized statistics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nf4_cases import DTYPES, DYNAMIC_WORST, WORST, blocks, dequantized, f32, indices, largest, normal, seeds, shapes

from reparam.kernels.nf4 import compress_scales, dequantize, quantize
from reparam.kernels.nf4_reference import expand
from reparam.kernels.nf4_tables import BLOCKS, CODE, DYNAMIC, NESTED_BLOCK, TINY, Statistics

# ---- what holds for every matrix


@given(shape=shapes, block=blocks, seed=seeds, dtype=st.sampled_from(DTYPES))
def test_no_entry_is_further_away_than_half_the_widest_gap(
    shape: tuple[int, int], block: int, seed: int, dtype: torch.dtype
) -> None:
    w = normal(*shape, seed=seed, dtype=dtype)
    found, c = dequantized(w, block), largest(w, block)
    assert bool(((found - w.float()).abs() <= WORST * c).all())
    at_most = w.float().abs() == c
    assert torch.equal(found[at_most], w.float()[at_most])  # the largest of each block is exact


@given(shape=shapes, block=blocks, seed=seeds, dtype=st.sampled_from(DTYPES))
def test_bytes_depend_on_the_values_alone(shape: tuple[int, int], block: int, seed: int, dtype: torch.dtype) -> None:
    """Not on their dtype, nor on the memory layout of the matrix."""
    w = normal(*shape, seed=seed, dtype=dtype)
    codes, absmax = quantize(w, block)
    assert (codes.dtype, codes.numel()) == (torch.uint8, -(-w.numel() // 2))
    assert (absmax.dtype, absmax.numel()) == (torch.float32, -(-w.numel() // block))
    for same in (w.float(), w.t().contiguous().t(), w.reshape(-1)):
        again = quantize(same, block)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], absmax)


@given(shape=shapes, block=blocks, seed=seeds)
def test_quantizing_what_was_unpacked_gives_the_same_bytes(shape: tuple[int, int], block: int, seed: int) -> None:
    w = normal(*shape, seed=seed)
    codes, absmax = quantize(w, block)
    again = quantize(dequantized(w, block), block)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], absmax)


@given(shape=shapes, block=blocks, seed=seeds, power=st.integers(-60, 60))
def test_a_power_of_two_changes_the_magnitudes_alone(shape: tuple[int, int], block: int, seed: int, power: int) -> None:
    w = normal(*shape, seed=seed)
    codes, absmax = quantize(w, block)
    scaled = quantize(w * 2.0**power, block)
    assert torch.equal(scaled[0], codes)
    assert torch.equal(scaled[1], absmax * 2.0**power)


@given(count=st.integers(1, 12), block=blocks, seed=seeds, data=st.data())
def test_blocks_in_another_order_are_bytes_in_another_order(
    count: int, block: int, seed: int, data: st.DataObject
) -> None:
    w = normal(count, block, seed=seed)
    order = data.draw(st.permutations(range(count)))
    codes, absmax = quantize(w, block)
    moved = quantize(w[order], block)
    assert torch.equal(moved[0].view(count, -1), codes.view(count, -1)[order])
    assert torch.equal(moved[1], absmax[order])


@given(index=st.lists(st.integers(0, 15), min_size=1, max_size=200), scale=st.floats(1e-30, 1e30))
def test_quantizing_keeps_every_code_at_even_and_at_odd_lengths(index: list[int], scale: float) -> None:
    """The levels themselves, in blocks whose magnitude is fixed by a leading one."""
    count = len(index)
    for place in range(0, count, 64):
        index[place] = 15
    codes, absmax = quantize(CODE[index] * scale, 64)
    assert indices(codes, count) == index
    assert count % 2 == 0 or int(codes[-1]) & 15 == 7
    found = dequantize(codes, Statistics(absmax), block=64, count=count, dtype=torch.float32)
    assert torch.equal(found, CODE[index] * absmax[0])


def test_the_negative_is_another_set_of_levels() -> None:
    w = normal(64)
    assert not torch.equal(dequantized(-w), -dequantized(w))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("double", [False, True])
def test_a_part_from_any_block_on_is_the_part_of_the_whole(block: int, double: bool) -> None:
    count = 5 * block + block // 2 + 1
    codes, absmax = quantize(normal(count), block)
    stats = compress_scales(absmax) if double else Statistics(absmax)
    for dtype in DTYPES:
        whole = dequantize(codes, stats, block=block, count=count, dtype=dtype)
        assert whole.dtype == dtype
        for first in range(6):
            for size in {1, block - 1, min(block + 1, count - first * block), count - first * block}:
                size = min(size, count - first * block)
                part = dequantize(codes, stats, block=block, first=first, count=size, dtype=dtype)
                assert torch.equal(part, whole[first * block : first * block + size])


def test_nothing_is_read_or_written_beyond_the_tensors() -> None:
    codes, absmax = quantize(normal(128), 64)
    for count, first, out in ((129, 0, None), (65, 1, None), (64, 0, torch.empty(64, 2)[:, 0])):
        with pytest.raises(AssertionError):
            dequantize(codes, Statistics(absmax), block=64, count=count, first=first, dtype=torch.float32, out=out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_rounded_once_from_float32(dtype: torch.dtype) -> None:
    w = normal(9, 100)
    assert torch.equal(dequantized(w, dtype=dtype), dequantized(w).to(dtype))


def test_a_block_of_zeros_has_the_code_of_zero() -> None:
    codes, absmax = quantize(torch.cat([torch.zeros(64), -torch.zeros(64), torch.ones(32), torch.zeros(33)]), 64)
    assert set(codes[:64].tolist()) == {0x77}
    assert absmax.tolist() == [0, 0, 1, 0]
    found = dequantize(codes, Statistics(absmax), block=64, count=193, dtype=torch.float32)
    assert not found[:128].any()
    doubly = dequantize(codes, compress_scales(absmax), block=64, count=193, dtype=torch.float32)
    assert not doubly[:128].any()


@given(exponent=st.integers(-149, -110), seed=seeds)
def test_numbers_at_the_end_of_float32_stay_finite(exponent: int, seed: int) -> None:
    """A block below the smallest normal number may become zeros or anything of that size."""
    w = (normal(130, seed=seed) / 8).clamp(-1, 1) * 2.0**exponent
    found, c = dequantized(w), largest(w, 64)
    small = c < TINY
    assert bool(((found - w).abs() <= torch.where(small, c, WORST * c + 2.0**-149)).all())


# ---- double quantization


@given(
    values=st.lists(st.floats(0, 8, width=32), min_size=1, max_size=8),
    count=st.integers(1, 700),
    seed=seeds,
)
def test_a_doubly_quantized_magnitude_is_near_by_the_spread_of_its_block(
    values: list[float], count: int, seed: int
) -> None:
    """With few different values, with many, and with values far apart."""
    a = normal(count, seed=seed).abs()
    a[: len(values)] = torch.tensor(values)[:count]
    stats = compress_scales(a)
    assert stats.offset is not None
    assert stats.nested is not None
    assert (stats.absmax.dtype, stats.nested.numel()) == (torch.uint8, -(-count // NESTED_BLOCK))
    far = (a - stats.offset).abs()
    spread = torch.cat([part.max().expand(len(part)) for part in far.split(NESTED_BLOCK)])
    torch.testing.assert_close(stats.nested, torch.stack([p.max() for p in far.split(NESTED_BLOCK)]), rtol=0, atol=0)
    ulp = 4 * torch.finfo(torch.float32).eps * float(a.max())
    assert bool(((expand(stats) - a).abs() <= DYNAMIC_WORST * spread + ulp).all())


def test_equal_magnitudes_stay_as_they_are() -> None:
    assert torch.equal(expand(compress_scales(torch.full((300,), 0.75))), torch.full((300,), 0.75))
    assert torch.equal(expand(compress_scales(torch.zeros(300))), torch.zeros(300))


def test_the_mean_is_the_nearest_number_to_it_whatever_the_number_of_threads() -> None:
    """So that a model is quantized identically on every machine."""
    before = torch.get_num_threads()
    try:
        for seed in range(4):
            a = normal(100_000 + seed, seed=seed).abs()
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                offset = compress_scales(a).offset
                assert offset is not None
                assert float(offset) == f32(math.fsum(a.tolist()) / len(a))
    finally:
        torch.set_num_threads(before)


def test_an_own_map_is_used() -> None:
    codes, absmax = quantize(normal(40000), 64)
    stats = compress_scales(absmax)
    assert stats.nested is not None
    halved = stats._replace(nested=stats.nested * 2, map=DYNAMIC / 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        expected = dequantize(codes, stats, block=64, count=40000, dtype=dtype)
        assert torch.equal(dequantize(codes, halved, block=64, count=40000, dtype=dtype), expected)
