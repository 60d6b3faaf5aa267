"""The Walsh-Hadamard transform: the explicit matrix, invariants, and any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reparam.kernels.fwht import backend, fwht, fwht_reference, power_of_two

LENGTHS = [1 << k for k in range(18)]


def sylvester(n: int) -> Tensor:
    """The matrix by its definition, in float64."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_golden_vector() -> None:
    assert fwht(torch.tensor([1.0, 2, 3, 4])).tolist() == [10, -2, -4, 0]


@pytest.mark.parametrize("transform", [fwht, fwht_reference])
@pytest.mark.parametrize("n", LENGTHS[:11])
def test_it_is_the_explicit_matrix(n: int, transform: object) -> None:
    """Integers are summed exactly in any order."""
    x = torch.randint(-50, 50, (3, n), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(transform(x).double(), x.double() @ sylvester(n))  # type: ignore[operator]


def test_it_is_scipys_matrix() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x = random(5, 256, dtype=torch.float64)
    expected = x @ torch.from_numpy(linalg.hadamard(256)).double()
    torch.testing.assert_close(fwht(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", LENGTHS)
def test_twice_is_n_times(n: int) -> None:
    x = random(2, n)
    torch.testing.assert_close(fwht(fwht(x)) / n, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(fwht(x).double().norm(), n**0.5 * x.double().norm(), rtol=1e-5, atol=0)


@given(st.integers(0, 12), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_it_is_linear_and_symmetric(power: int, rows: int, seed: int) -> None:
    n = 1 << power
    x, y = random(rows, n, seed=seed), random(rows, n, seed=seed + 1)
    size = n**0.5 * 1e-5
    torch.testing.assert_close(fwht(2 * x - 3 * y), 2 * fwht(x) - 3 * fwht(y), rtol=0, atol=20 * size)
    one, other = (fwht(x).double() * y).sum(), (x * fwht(y).double()).sum()
    torch.testing.assert_close(one, other, rtol=1e-5, atol=n * 1e-5)


@pytest.mark.parametrize("n", LENGTHS)
def test_the_compiled_kernel_is_the_reference(n: int) -> None:
    """Also for rows that are not contiguous; x is unchanged and shares no memory with the result."""
    x = random(n, 3).t()
    before = x.clone()
    y = fwht(x)
    torch.testing.assert_close(y.double(), fwht_reference(x.double()), rtol=0, atol=4e-6 * n**0.5)
    assert torch.equal(x, before)
    y.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = random(2, 1024, dtype=dtype)
    assert torch.equal(fwht(x), fwht(x.float()).to(dtype))


def test_the_number_of_threads_changes_no_bit() -> None:
    x = {n: random(1 << 19, seed=n).view(-1, 1 << n) for n in (3, 10, 16, 17, 19)}
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append({n: fwht(rows) for n, rows in x.items()})
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other[n], found[0][n]) for other in found[1:] for n in x)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (4, 12), ()])
def test_other_lengths_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="power of two"):
        fwht(torch.ones(shape))


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        fwht(torch.ones(4, dtype=torch.int64))


def test_an_empty_batch_is_empty() -> None:
    assert fwht(torch.ones(0, 8)).shape == (0, 8)


def test_the_smallest_power_of_two() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 1000, 1024, 1025)] == [1, 2, 4, 1024, 1024, 2048]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_a_good_op(dtype: torch.dtype) -> None:
    x = random(2, 32, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.reparam.fwht.default, (x,))
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(fwht, (x,))
        assert torch.autograd.gradgradcheck(fwht, (x,))


def test_without_numba_the_reference_runs() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; from reparam.kernels.fwht import backend, fwht\n"
        "print(backend(), fwht(torch.tensor([1.0, 2, 3, 4])).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.split("\n")[0] == "torch [10.0, -2.0, -4.0, 0.0]"
    assert backend() in ("numba", "torch")
