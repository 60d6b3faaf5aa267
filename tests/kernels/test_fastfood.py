"""Fastfood: a worked example, the explicit matrix, the adjoint, invariants, and reproducible numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reparam.kernels import fastfood as f
from reparam.kernels.fastfood import fastfood, fastfood_adjoint
from reparam.kernels.fwht import power_of_two

KEY = 0x1234_5678_9ABC_DEF
SIZES = [(1, 1, 1), (1, 7, 1), (3, 2, 4), (5, 40, 8), (20, 21, 32), (100, 1000, 128), (9, 300, 512), (600, 2048, 1024)]


def matrix(d: int, rows: int, n: int, key: int = KEY) -> Tensor:
    """P [D, d] in float64, from the diagonals, the permutation and explicit Hadamard matrices."""
    H = f.fwht(torch.eye(n, dtype=torch.float64))
    parts = []
    for block in range(-(-rows // n)):
        words = f.words(key, block * n, n)[None]
        B, order, G = f.signs(words)[0].double(), f.orders(words)[0], f.normals(words)[0].double()
        part = H @ torch.diag(G) @ torch.eye(n, dtype=torch.float64)[order] @ H @ torch.diag(B)
        parts.append(part[:, :d] / (n * G.square().sum()).sqrt() / (rows / n) ** 0.5)
    return torch.cat(parts)[:rows]


def vector(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_worked_vector_of_the_released_code() -> None:
    B, G, order = torch.tensor([[1.0, -1, 1, -1]]), torch.tensor([[1, 2, 0.5, 1]]), torch.tensor([[2, 0, 3, 1]])
    found = f.apply(torch.tensor([1.0, 2.0]), B, order, G, 3)
    torch.testing.assert_close(found, torch.tensor([0.3464102, -0.1154701, -1.7320508]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("d", "rows", "n"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_explicit_matrix(d: int, rows: int, n: int, dtype: torch.dtype) -> None:
    """Map and adjoint, compiled and in torch; the adjoint has no extra factor."""
    P, x, g = matrix(d, rows, n), vector(d), vector(rows, 1)
    small = 1e-5 if dtype == torch.float32 else 1e-12
    for found, expected in (
        (fastfood(x.to(dtype), KEY, n, rows), P @ x),
        (f.fastfood_reference(x.to(dtype), KEY, n, rows), P @ x),
        (fastfood_adjoint(g.to(dtype), KEY, n, d), P.T @ g),
        (f.fastfood_adjoint_reference(g.to(dtype), KEY, n, d), P.T @ g),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=small, atol=small)


@pytest.mark.parametrize(("d", "rows", "n"), SIZES)
def test_the_gradient_is_the_adjoint(d: int, rows: int, n: int) -> None:
    """The released code's gradient is 1/n of the correct one: this test fails there for every n above 1."""
    x, g = vector(d).requires_grad_(), vector(rows, 1)
    (found,) = torch.autograd.grad(fastfood(x, KEY, n, rows) @ g, x)
    torch.testing.assert_close(found, matrix(d, rows, n).T @ g)
    assert torch.autograd.gradcheck(lambda x: fastfood(x, KEY, n, rows), (x,), fast_mode=d > 9)


def test_columns_have_norm_one_where_blocks_are_whole() -> None:
    norms = matrix(100, 1024, 128).norm(dim=0)
    torch.testing.assert_close(norms, torch.ones(100, dtype=torch.float64))
    norms = matrix(100, 1000, 128).norm(dim=0)
    assert norms.min() > 0.97
    assert norms.max() < 1.03
    assert torch.linalg.matrix_rank(matrix(100, 1000, 128)) == 100


def test_lengths_are_kept_on_average() -> None:
    x = vector(10)
    for rows, n in ((70, 16), (70, 128), (11, 16)):
        ratios = [float(fastfood(x, key, n, rows).square().sum() / x.square().sum()) for key in range(600)]
        assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.06), (rows, n)


def test_one_key_is_one_map_and_another_is_another() -> None:
    x = vector(50, dtype=torch.float32)
    one = fastfood(x, KEY, 64, 5000)
    assert torch.equal(one, fastfood(x, KEY, 64, 5000))
    other = fastfood(x, KEY + 1, 64, 5000)
    assert abs(float(torch.nn.functional.cosine_similarity(one, other, dim=0))) < 0.1


def test_the_number_of_threads_changes_no_bit() -> None:
    x, g = vector(700, dtype=torch.float32), vector(300_000, 1, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append((fastfood(x, KEY, 1024, 300_000), fastfood_adjoint(g, KEY, 1024, 700)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_the_drawn_numbers_are_what_they_were() -> None:
    """Golden values: a change of them needs a new `VERSION`, because saved vectors lose their meaning."""
    words = f.words(KEY, 0, 8)
    assert f.signs(words).tolist() == GOLDEN_SIGNS
    assert f.orders(words[None])[0].tolist() == GOLDEN_ORDER
    torch.testing.assert_close(f.normals(words), torch.tensor(GOLDEN_NORMALS), rtol=0, atol=1e-6)


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs for the seed 1234567, as published for this generator."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(z) % (1 << 64) for z in f.words(1234567, 0, 4)] == published


def test_the_numbers_are_random() -> None:
    words = f.words(KEY, 0, 1 << 16)
    B, G = f.signs(words).double(), f.normals(words).double()
    assert abs(float(B.mean())) < 0.02
    assert abs(float(G.mean())) < 0.02
    assert float(G.var()) == pytest.approx(1, abs=0.02)
    assert float((G**4).mean()) == pytest.approx(3, abs=0.15)
    assert abs(float((B * G).mean())) < 0.02
    assert abs(float((G[1:] * G[:-1]).mean())) < 0.02
    orders = f.orders(words.view(-1, 16))
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand_as(orders))
    firsts = torch.bincount(orders[:, 0], minlength=16) / len(orders)
    assert float((firsts - 1 / 16).abs().max()) < 0.02


def test_a_block_shorter_than_the_vector_is_refused() -> None:
    """The released code silently truncates the vector."""
    with pytest.raises(ValueError, match="ignore the end"):
        fastfood(torch.ones(9), KEY, 8, 100)
    with pytest.raises(ValueError, match="power of two"):
        fastfood(torch.ones(9), KEY, 12, 100)
    with pytest.raises(ValueError, match="ignore the end"):
        fastfood_adjoint(torch.ones(100), KEY, 8, 9)
    with pytest.raises(ValueError, match="a vector"):
        fastfood(torch.ones(2, 4), KEY, 8, 100)


def test_they_are_good_ops() -> None:
    x, g = vector(5, dtype=torch.float32).requires_grad_(), vector(40, dtype=torch.float32).requires_grad_()
    n = power_of_two(5)
    torch.library.opcheck(torch.ops.reparam.fastfood.default, (x, KEY, n, 40))
    torch.library.opcheck(torch.ops.reparam.fastfood_adjoint.default, (g, KEY, n, 5))


GOLDEN_SIGNS: list[float] = [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0]
GOLDEN_ORDER: list[int] = [4, 5, 0, 2, 7, 3, 6, 1]
GOLDEN_NORMALS: list[float] = [0.965876, -0.330412, -0.252178, 0.885108, 0.000765, -0.246181, 0.237674, 0.8394]
