"""NF4's compiled kernels for a CPU: every bit is the reference's, for all shapes, dtypes and numbers of threads."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reparam import NF4
from reparam.kernels import nf4_reference as reference
from reparam.kernels.nf4 import backend
from reparam.kernels.nf4_tables import BLOCKS, CODE, DYNAMIC, THRESHOLDS, TINY, Statistics

pytest.importorskip("numba")
import numba

from reparam.kernels import nf4_cpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [pytest.param(wide, marks=pytest.mark.skipif(wide > nf4_cpu.WIDE, reason="no such instruction"))
          for wide in (1, 8, 16)]  # fmt: skip
counts = st.integers(1, 20000)
blocks = st.sampled_from(BLOCKS)
seeds = st.integers(0, 2**16)
dtypes = st.sampled_from(DTYPES)
KINDS = ("normal", "ties", "any bits", "subnormal", "equal", "zeros")


def numbers(kind: str, count: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Finite numbers of an easy or a hard kind."""
    g = torch.Generator().manual_seed(seed)
    if kind == "any bits":
        size = torch.int32 if dtype == torch.float32 else torch.int16
        limits = torch.iinfo(size)
        bits = torch.randint(limits.min, limits.max + 1, (count,), generator=g, dtype=torch.int64)
        return bits.to(size).view(dtype).nan_to_num(0, 0, 0)
    if kind == "ties":  # thresholds and the numbers beside them, which a one in most blocks leaves as they are
        near = [THRESHOLDS, *(torch.nextafter(THRESHOLDS, torch.tensor(to)) for to in (-2.0, 2.0)), CODE]
        return torch.cat(near)[torch.randint(61, (count,), generator=g)].to(dtype)
    w = torch.randn(count, generator=g)
    if kind == "subnormal":
        w = w * TINY / 2
    elif kind == "equal":
        w = w.sign() * 0.3
    elif kind == "zeros":
        w = w * torch.randint(2, (count,), generator=g) * 0.0
    return w.to(dtype)


def statistics(absmax: Tensor, how: str) -> Statistics:
    """Plain or doubly quantized magnitudes, or doubly quantized with a map from a file."""
    if how == "plain":
        return Statistics(absmax)
    stats = reference.compress_scales(absmax)
    return stats if how == "double" else stats._replace(map=DYNAMIC.flip(0) * 0.7)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree bit for bit; -0.0 differs from 0.0."""
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@given(count=counts, block=blocks, seed=seeds, dtype=dtypes)
def test_quantizing_gives_the_bytes_of_the_reference(
    kind: str, count: int, block: int, seed: int, dtype: torch.dtype
) -> None:
    w = numbers(kind, count, seed, dtype)
    codes, absmax = nf4_cpu.quantize(w, block)
    expected = reference.quantize_reference(w, block)
    assert same(codes, expected[0])
    assert same(absmax, expected[1])


@pytest.mark.parametrize("how", ["plain", "double", "own map"])
@given(count=counts, block=blocks, seed=seeds, dtype=dtypes, data=st.data())
def test_dequantizing_gives_the_bits_of_the_reference(
    how: str, count: int, block: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """The whole matrix, and any range that begins at a block."""
    codes, absmax = reference.quantize_reference(numbers("normal", count, seed, torch.float32), block)
    stats = statistics(absmax, how)
    whole = reference.dequantize_reference(codes, stats, block=block, count=count, dtype=dtype)
    first = data.draw(st.integers(0, len(absmax) - 1))
    size = data.draw(st.integers(1, count - first * block))
    for start, length in ((0, count), (first, size)):
        out = torch.full((length,), float("nan"), dtype=dtype)
        nf4_cpu.dequantize(out, codes, stats, block, start)
        assert same(out, whole[start * block : start * block + length])


@given(count=counts, block=blocks, seed=seeds, dtype=dtypes, kind=st.sampled_from(["any bits", "subnormal"]))
def test_magnitudes_of_any_size_give_the_bits_of_the_reference(
    count: int, block: int, seed: int, dtype: torch.dtype, kind: str
) -> None:
    """Also if the result overflows or underflows in 16 bits."""
    codes = torch.randint(256, ((count + 1) // 2,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    stats = Statistics(numbers(kind, -(-count // block), seed, torch.float32))
    out = torch.empty(count, dtype=dtype)
    nf4_cpu.dequantize(out, codes, stats, block)
    assert same(out, reference.dequantize_reference(codes, stats, block=block, count=count, dtype=dtype))


@given(count=st.integers(1, 3000), seed=seeds, kind=st.sampled_from(["normal", "middles", "any bits"]))
def test_the_nearest_of_the_dynamic_map_is_that_of_the_reference(count: int, seed: int, kind: str) -> None:
    middles = (DYNAMIC[1:] + DYNAMIC[:-1]) / 2
    near = torch.cat([middles, *(torch.nextafter(middles, torch.tensor(to)) for to in (-2.0, 2.0))])
    x = near if kind == "middles" else numbers(kind, count, seed, torch.float32)
    assert same(nf4_cpu.nearest_code(x), reference.nearest_code(x))
    assert same(nf4_cpu.nearest_code(x[:6].view(1, -1)), reference.nearest_code(x[:6].view(1, -1)))


@settings(max_examples=10)
@given(block=blocks, seed=seeds, dtype=dtypes, shares=st.integers(2, 7), more=st.integers(0, 5000))
def test_threads_do_not_change_a_bit(block: int, seed: int, dtype: torch.dtype, shares: int, more: int) -> None:
    """With enough entries for several threads, in unequal shares."""
    w = numbers("normal", (5 << 17) + more, seed, dtype)
    found = []
    for count in (1, 2, shares):
        with threads(count):
            codes, absmax = nf4_cpu.quantize(w, block)
            stats = Statistics(nf4_cpu.nearest_code(absmax), torch.ones(len(absmax) // 256 + 1), torch.ones(1))
            out = torch.empty_like(w)
            nf4_cpu.dequantize(out, codes, stats, block)
            part = torch.empty_like(w[block:])
            nf4_cpu.dequantize(part, codes, stats, block, 1)
        assert same(part, out[block:])
        found.append((codes, absmax, out))
    assert all(same(one, other) for one, *others in zip(*found, strict=True) for other in others)
    assert same(found[0][0], reference.quantize_reference(w, block)[0])


def test_many_magnitudes_are_searched_by_several_threads() -> None:
    x = numbers("normal", 600_001, 0, torch.float32)
    with threads(2):
        assert same(nf4_cpu.nearest_code(x), reference.nearest_code(x))


def large() -> Tensor:
    """A matrix large enough for several threads, with a short last block."""
    return numbers("normal", (5 << 17) + 33, 1, torch.float32)


def there_and_back(w: Tensor) -> Tensor:
    codes, absmax = nf4_cpu.quantize(w, 64)
    out = torch.empty_like(w)
    nf4_cpu.dequantize(out, codes, Statistics(absmax), 64)
    return out


def test_calls_from_several_threads_at_once() -> None:
    w = large()
    with threads(2):
        expected = there_and_back(w)
        with ThreadPoolExecutor(4) as callers:
            assert all(same(found, expected) for found in callers.map(lambda _: there_and_back(w), range(12)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_makes_its_own_threads() -> None:
    w = large()
    with threads(2):
        expected = there_and_back(w)  # the parent's threads exist now
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # a hang is a failure too
            code = 1
            try:
                # Compared by numpy: torch's own OpenMP threads would hang in a forked child.
                code = 0 if np.array_equal(there_and_back(w).numpy(), expected.numpy()) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- the code for processors that do not look sixteen codes up at once


@pytest.mark.parametrize("wide", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_way_to_look_codes_up_gives_the_same(dtype: torch.dtype, wide: int) -> None:
    """256 groups of 32 entries as one block, with all codes and ties."""
    name = str(dtype)[6:]
    unpack, pack = nf4_cpu.unpacker(name, wide=wide), nf4_cpu.quantizer(name, wide=wide)

    @numba.njit
    def run(out: Any, codes: Any, w: Any, scale: Any, groups: Any) -> None:
        pack(codes, w, numba.float32(1) / scale, groups)
        unpack(out, codes, scale, groups)

    w = torch.cat([torch.ones(1, dtype=dtype), *(numbers(kind, 4000, 2, dtype) for kind in ("ties", "normal"))])
    w = w[:7936].clamp(-1, 1)
    codes, out = torch.empty(len(w) // 2, dtype=torch.uint8), torch.empty_like(w)
    addresses = [np.uintp(t.data_ptr()) for t in (out, codes, w)]
    run(*addresses, np.float32(1), len(w) // 32)
    expected = reference.quantize_reference(w, len(w))
    assert same(codes, expected[0])
    assert set((codes & 15).tolist()) == set((codes >> 4).tolist()) == set(range(16))
    values = reference.dequantize_reference(codes, Statistics(expected[1]), block=len(w), count=len(w), dtype=dtype)
    assert same(out, values)


# ---- without numba


def example() -> list[Tensor]:
    """A quantized matrix whose rows are no multiple of a block, its statistics, and some of its rows."""
    weight = NF4().quantize(torch.linspace(-1, 2, 90 * 90).view(90, 90).sin())
    assert weight.nested is not None
    return [weight.codes, weight.absmax, weight.nested, weight.dense(slice(40, 50)), weight.rows(torch.tensor([3, 89]))]


WITHOUT = """
import sys
import torch
from torch import Tensor
from reparam import NF4
from reparam.kernels.nf4 import backend
print("numba" in sys.modules)
sys.modules["numba"] = None  # what an import finds where the package is missing
{example}
torch.save(example(), sys.argv[1])
print(backend())
"""


def test_without_numba_the_reference_runs_and_gives_the_same(tmp_path: Path) -> None:
    code = WITHOUT.format(example=inspect.getsource(example))
    command = [sys.executable, "-c", code, str(tmp_path / "found.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "torch"]
    assert backend() == "numba"
    found = torch.load(tmp_path / "found.pt")
    assert all(same(one, other) for one, other in zip(found, example(), strict=True))
