"""NF4 against its definition: tables derived here, golden bytes, what holds for every matrix, what cannot be quantized.

The golden bytes and the table of mean errors are bitsandbytes'. What the compiled kernels compute is in
`test_nf4_cpu.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reparam.kernels.nf4 import compress_scales, dequantize, quantize
from reparam.kernels.nf4_reference import expand
from reparam.kernels.nf4_tables import BLOCKS, CODE, DYNAMIC, NESTED_BLOCK, THRESHOLDS, TINY, Statistics
from reparam.weights.nf4 import NF4, NF4Weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WORST = 0.15191  # half the widest gap between two levels, that from -1 to -0.696
DYNAMIC_WORST = 0.007032  # half the widest gap of the dynamic map, or the whole one from -1 to its lowest entry
f32 = np.float32
blocks = st.sampled_from(BLOCKS)
shapes = st.tuples(st.integers(1, 40), st.integers(1, 150))
seeds = st.integers(0, 2**16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def indices(codes: Tensor, count: int) -> list[int]:
    """The 4-bit codes of `count` entries."""
    return torch.stack([codes >> 4, codes & 15], 1).view(-1)[:count].tolist()


def dequantized(w: Tensor, block: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """`w` quantized with plain statistics and back, in its shape."""
    codes, absmax = quantize(w, block)
    return dequantize(codes, Statistics(absmax), block=block, count=w.numel(), dtype=dtype).view(w.shape)


def largest(w: Tensor, block: int) -> Tensor:
    """For each entry, the largest magnitude of its block; a loop, as one would write it down."""
    flat = w.detach().float().reshape(-1)
    return torch.cat([part.abs().max().expand(len(part)) for part in flat.split(block)]).view(w.shape)


# ---- the tables


def linspace(start: float, end: float, count: int, *, kind: type = f32, fused: bool = False) -> np.ndarray:
    """As torch computes it: from both ends to the middle, in `kind`; `fused` rounds a product and its sum once."""
    start, end = kind(start), kind(end)
    step = kind((end - start) / kind(count - 1))
    wide = np.float64 if fused else kind  # a product of 24 and 7 bits and a sum near it are exact in float64
    ups = [kind(wide(start) + wide(step) * wide(i)) for i in range(count // 2)]
    downs = [kind(wide(end) - wide(step) * wide(count - 1 - i)) for i in range(count // 2, count)]
    return np.array(ups + downs, dtype=kind)


def levels(kind: type) -> np.ndarray:
    """The construction of the code: quantiles of the normal distribution, over the largest of them."""
    quantile = NormalDist().inv_cdf
    above = [quantile(float(p)) for p in linspace(0.9677083, 0.5, 9, kind=kind)[:-1]]
    below = [-quantile(float(p)) for p in linspace(0.9677083, 0.5, 8, kind=kind)[:-1]]
    found = np.sort(np.array([*above, 0.0, *below], dtype=f32))
    return found / found.max()


def test_the_levels_are_the_quantiles_of_the_construction_bit_for_bit() -> None:
    assert torch.equal(torch.from_numpy(levels(f32)), CODE)
    assert CODE.dtype == torch.float32
    assert sha256(CODE) == "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
    assert CODE.tolist() == sorted(set(CODE.tolist()))
    assert (CODE[0], CODE[7], CODE[15]) == (-1, 0, 1)


def test_probabilities_in_float64_would_give_other_levels() -> None:
    other = torch.from_numpy(levels(np.float64))
    assert not torch.equal(other, CODE)
    assert float((other - CODE).abs().max()) < 2e-7


def test_a_threshold_is_the_middle_of_two_levels() -> None:
    middles = (CODE[1:].numpy() + CODE[:-1].numpy()) / f32(2)
    assert torch.equal(THRESHOLDS, torch.from_numpy(middles))
    literals = [
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
        -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
        0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ]  # fmt: skip
    assert torch.equal(THRESHOLDS, torch.tensor(literals))


def test_a_tie_goes_to_the_lower_code_and_the_next_number_to_the_upper() -> None:
    above = torch.nextafter(THRESHOLDS, torch.tensor(2.0))
    for numbers, first in ((THRESHOLDS, 0), (above, 1)):
        codes, _ = quantize(torch.cat([numbers, torch.ones(1)]), 64)
        assert indices(codes, 15) == list(range(first, first + 15))


def dynamic(*, fused: bool) -> Tensor:
    """The construction of the dynamic map: the middles of 2^e equal steps from 0.1 to 1, for each power of ten."""
    found = []
    for e in range(7):
        edges = linspace(0.1, 1, 2**e + 1, fused=fused)
        found += list((edges[:-1] + edges[1:]) / f32(2) * f32(10.0 ** (e - 6)))
    return torch.from_numpy(np.sort(np.array([*(-v for v in found), 0, *found, 1], dtype=f32)))


def test_the_dynamic_map_is_that_of_the_construction_bit_for_bit() -> None:
    assert torch.equal(dynamic(fused=True), DYNAMIC)
    assert sha256(DYNAMIC) == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert len(DYNAMIC) == 256
    assert torch.equal(DYNAMIC[:127], -DYNAMIC[128:255].flip(0))
    assert (DYNAMIC[127], DYNAMIC[255]) == (0, 1)
    assert int((dynamic(fused=False) != DYNAMIC).sum()) == 42


# ---- golden bytes


def golden() -> Tensor:
    i = torch.arange(38400)
    return (((i * 7919) % 2001 - 1000).float() / 1000) * ((1 + (i // 64) % 17).float() / 16)


def test_the_golden_bytes() -> None:
    w = golden()
    codes, absmax = quantize(w, 64)
    assert bytes(codes[:32].tolist()).hex() == "0feeedccba98765433211100ffeeddcba987655432211100feeedccba9876543"
    assert sha256(codes) == "d36c78e982a90c193ceb7293c9786a452ae4368cbc226901dd04e2b350a6dcec"
    assert sha256(absmax) == "4f48dc349602b29d23150ecc8c620fd7612d67b06cc433b3ebca4ec550f9147b"
    found = dequantize(codes, Statistics(absmax), block=64, count=38400, dtype=torch.float32)
    assert sha256(found) == "36f360920fe716f70862e162032b85236d5dcfad4b04d7d69a1d3c9baff94e49"
    assert float((found - w).square().mean().sqrt()) == pytest.approx(0.0339065, abs=5e-8)


def test_the_golden_statistics() -> None:
    _, absmax = quantize(golden(), 64)
    stats = compress_scales(absmax)
    assert stats.nested is not None
    assert stats.offset is not None
    assert stats.offset.tolist() == [0.5543290376663208]
    assert stats.nested.tolist() == [float(f32(v)) for v in (0.50710845, 0.50817096, 0.50817096)]
    assert stats.absmax[:17].tolist() == [2, 10, 19, 28, 37, 45, 53, 62, 161, 193, 201, 209, 219, 228, 236, 244, 253]
    assert sha256(stats.absmax) == "00d8ffdff30943df5c962bdd279ca0d76997462d319eed16397df77afd2e1159"
    assert float((expand(stats) - absmax).abs().max()) == pytest.approx(0.0035727, abs=5e-8)


def test_the_first_of_a_pair_is_in_the_high_half() -> None:
    codes, absmax = quantize(torch.tensor([1.0, -1.0, 0.0, 0.5]), 64)
    assert bytes(codes.tolist()).hex() == "f07c"
    assert absmax.tolist() == [1.0]
    assert quantize(torch.tensor([1.0, -1.0, 0.0]), 64)[0].tolist() == [0xF0, 0x77]  # a virtual zero follows


def test_the_mean_error_for_normal_numbers_is_that_of_bitsandbytes() -> None:
    w = normal(1 << 20)
    expected = (0.067746, 0.072798, 0.076831, 0.080337, 0.083547, 0.086610, 0.089592, 0.092547)
    for block, size in zip(BLOCKS, expected, strict=True):
        assert float((dequantized(w, block) - w).abs().mean()) == pytest.approx(size, abs=3e-4), block


def test_it_is_closer_to_normal_numbers_than_fifteen_equal_steps() -> None:
    w = normal(1 << 14, 64)
    steps = w.abs().amax(1, keepdim=True) / 7
    equal = float(((w / steps).round() * steps - w).square().mean())
    found = float((dequantized(w) - w).square().mean())
    assert found == pytest.approx(0.008452, rel=0.01)
    assert equal == pytest.approx(0.011577, rel=0.01)


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
    """Not on the dtype that holds them, nor on how the matrix lies in memory."""
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
    """Levels themselves, in blocks whose magnitude a one at their start fixes."""
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
    """A block below the smallest normal number may come back as zeros or as anything of that size."""
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
    """Few different values, many, and values that are far apart."""
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
    """So that a model quantized on one machine is the model quantized on another."""
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


# ---- the storage


def bits(weight: NF4Weight) -> int:
    return 8 * sum(parameter.nbytes for parameter in weight.parameters())


@pytest.mark.parametrize("shape", [(128, 128), (64, 512), (256, 320), (1, 16384)], ids=str)
def test_bits_an_entry(shape: tuple[int, int]) -> None:
    """Exactly, where blocks of blocks are whole: 4.5, and 4.127 with one float32 for the whole matrix on top."""
    w = normal(*shape)
    assert bits(NF4(double=False).quantize(w)) == 4.5 * w.numel()
    assert bits(NF4().quantize(w)) == 4.126953125 * w.numel() + 32


@given(shape=shapes, block=blocks, double=st.booleans())
def test_bytes_of_any_matrix(shape: tuple[int, int], block: int, double: bool) -> None:
    n = shape[0] * shape[1]
    N = -(-n // block)
    weight = NF4(block, double).quantize(normal(*shape))
    extra = N + 4 * -(-N // NESTED_BLOCK) + 4 if double else 4 * N
    assert bits(weight) == 8 * (-(-n // 2) + extra)


@given(shape=shapes, block=blocks, double=st.booleans(), seed=seeds, dtype=st.sampled_from(DTYPES))
def test_every_way_to_ask_a_weight_gives_the_same_numbers(
    shape: tuple[int, int], block: int, double: bool, seed: int, dtype: torch.dtype
) -> None:
    """Whole, by rows, by a lookup, by entry, and as an operator."""
    w = normal(*shape, seed=seed, dtype=dtype)
    weight = NF4(block, double).quantize(w)
    codes, absmax = quantize(w, block)
    stats = compress_scales(absmax) if double else Statistics(absmax)
    whole = dequantize(codes, stats, block=block, count=w.numel(), dtype=torch.float32).view(shape)
    assert (weight.out_features, weight.in_features) == weight.shape == shape
    assert torch.equal(weight.dense(), whole)
    for rows in (slice(1, None), slice(0, 0), slice(shape[0] // 2, shape[0] // 2 + 3), slice(-1, None), slice(3, 1)):
        assert torch.equal(weight.dense(rows), whole[rows])
    ids = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]])
    assert torch.equal(weight.rows(ids), whole[ids].to(dtype))
    assert torch.equal(weight.at(torch.arange(w.numel())), whole.view(-1))
    assert torch.equal(weight.tensor(), whole.to(dtype))
    assert weight.dtype == dtype
    unit = torch.eye(shape[1], dtype=torch.float64)
    assert torch.equal(weight(unit), whole.double().t())


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_an_id_that_is_no_row_is_refused(bad: int) -> None:
    """Where an index from the end, or one that padding answers, would be something else than an embedding's."""
    for shape in ((9, 7), (9, 1)):
        weight = NF4().quantize(normal(*shape))
        with pytest.raises(RuntimeError, match="an id is not one of the 9 rows"):
            weight.rows(torch.tensor([0, bad]))
        ids = torch.tensor([8, 0], dtype=torch.int32)
        assert torch.equal(weight.rows(ids), weight.dense()[ids])


def test_a_parameter_is_quantized_and_nothing_of_it_trains() -> None:
    w = torch.nn.Parameter(normal(8, 8))
    weight = NF4().quantize(w)
    assert not any(p.requires_grad for p in weight.parameters())
    assert weight.storage == NF4()
    assert NF4(32, double=False).quantize(w).storage == NF4(32, double=False)


def test_a_matrix_without_values_has_the_same_tensors() -> None:
    """On the meta device: what a model takes can be told before it is loaded."""
    for storage in (NF4(), NF4(32, double=False)):
        real, empty = (storage.quantize(normal(24, 50).to(device)) for device in ("cpu", "meta"))
        assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in real.state_dict().items()
        }


# ---- what is refused


@pytest.mark.parametrize("block", [0, -64, 1, 48, 63, 8192, True, 64.0, "64", None])
def test_a_block_size_that_the_format_does_not_have_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match=r"NF4: block=.*expected one of 32, 64, .*4096"):
        NF4(block)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "a vector": (lambda: torch.ones(64), r"expected a matrix .* got float32 \[64\]$"),
    "three dimensions": (lambda: torch.ones(2, 4, 4), r"expected a matrix .* got float32 \[2, 4, 4\]$"),
    "no rows": (lambda: torch.ones(0, 64), r"expected a matrix .* with entries, got float32 \[0, 64\]$"),
    "no columns": (lambda: torch.ones(64, 0), r"expected a matrix .* with entries, got float32 \[64, 0\]$"),
    "integers": (lambda: torch.ones(4, 4, dtype=torch.int64), r"got int64 \[4, 4\]; is it quantized already\?"),
    "quantized": (
        lambda: NF4().quantize(normal(4, 8)).codes[:, None],
        r"got uint8 \[16, 1\]; is it quantized already\?",
    ),
    "eight bits": (lambda: torch.ones(4, 4).to(torch.float8_e4m3fn), r"got float8_e4m3fn \[4, 4\]"),
    "NaN": (lambda: spoilt(float("nan"), torch.float32), r"NaN.*first at \[2, 5\]"),
    "infinity": (lambda: spoilt(float("-inf"), torch.bfloat16), r"NaN.*first at \[2, 5\]"),
    "beyond float32": (lambda: spoilt(1e300, torch.float64), r"first at \[2, 5\]"),
    "sums beyond float32": (lambda: spoilt(3e38, torch.float32), r"first at \[2, 5\]"),
}


def spoilt(value: float, dtype: torch.dtype) -> Tensor:
    w = normal(4, 9, dtype=dtype)
    w[2, 5] = value
    w[3, 1] = value
    return w


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_quantized_is_refused_in_a_sentence(what: str) -> None:
    make, message = REFUSED[what]
    w = make()
    with pytest.raises(ValueError, match=f"^nf4: .*{message}") as caught:
        NF4().quantize(w)
    assert len(str(caught.value)) < 200


def test_large_numbers_below_the_limit_are_quantized() -> None:
    w = normal(64, 64) * 1e29
    error = (NF4().quantize(w).dense() - w).abs()
    assert bool((error <= 0.2 * w.abs().max()).all())
