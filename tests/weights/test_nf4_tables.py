"""The tables of NF4, derived here, and golden bytes, which are bitsandbytes'."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch
from nf4_cases import dequantized, f32, indices, normal, sha256
from torch import Tensor

from reparam.kernels.nf4 import compress_scales, dequantize, quantize
from reparam.kernels.nf4_reference import expand
from reparam.kernels.nf4_tables import BLOCKS, CODE, DYNAMIC, THRESHOLDS, Statistics

# ---- the tables


def linspace(start: float, end: float, count: int, *, kind: type = f32, fused: bool = False) -> np.ndarray:
    """torch's linspace: from both ends to the middle, in `kind`; `fused` rounds product and sum once."""
    start, end = kind(start), kind(end)
    step = kind((end - start) / kind(count - 1))
    wide = np.float64 if fused else kind  # a product of 24 and 7 bits and a sum near it are exact in float64
    ups = [kind(wide(start) + wide(step) * wide(i)) for i in range(count // 2)]
    downs = [kind(wide(end) - wide(step) * wide(count - 1 - i)) for i in range(count // 2, count)]
    return np.array(ups + downs, dtype=kind)


def levels(kind: type) -> np.ndarray:
    """The levels by construction: quantiles of the normal distribution over the largest of them."""
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
