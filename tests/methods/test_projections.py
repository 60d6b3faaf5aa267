"""The fixed random maps: linearity, adjoint, unit columns, and the same numbers for a key on every machine."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reparam.methods.projections import Projection, dense, key_of, sparse

MAPS = [("fastfood", "stacked"), ("fastfood", "padded"), ("dense", "stacked"), ("sparse", "stacked")]
every = pytest.mark.parametrize(("kind", "layout"), MAPS)


def explicit(p: Projection) -> Tensor:
    """P [D, d]."""
    return torch.stack([p(e) for e in torch.eye(p.d, dtype=torch.float64)], 1)


def vector(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every
@pytest.mark.parametrize(("d", "rows"), [(1, 1), (3, 50), (50, 3), (20, 700), (40, 40)])
def test_it_is_linear_and_its_adjoint_is_the_transpose(kind: str, layout: str, d: int, rows: int) -> None:
    p = Projection(kind, 5, d, rows, layout)
    P, x, g = explicit(p), vector(d), vector(rows, 1)
    torch.testing.assert_close(p(x), P @ x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(p.forward(x), P @ x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(p.adjoint(g), P.T @ g, rtol=1e-10, atol=1e-10)
    (found,) = torch.autograd.grad(p(x.requires_grad_()) @ g, x)
    torch.testing.assert_close(found, P.T @ g, rtol=1e-10, atol=1e-10)


@every
def test_lengths_are_kept_on_average(kind: str, layout: str) -> None:
    x = vector(12)
    ratios = [float(Projection(kind, key, 12, 90, layout)(x).square().sum() / x.square().sum()) for key in range(400)]
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_columns_have_norm_one(kind: str) -> None:
    norms = explicit(Projection(kind, 3, 30, 900)).norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-5, atol=1e-5)


def test_entries_of_the_sparse_map() -> None:
    """Each entry is nonzero with probability 1/√D, independently, with random sign."""
    counts = []
    for key in range(40):
        p = Projection("sparse", key, 30, 400)
        row, column, value = sparse(p)
        assert bool((row < 400).all())
        assert bool((column < 30).all())
        assert len(set(zip(row.tolist(), column.tolist(), strict=True))) == len(row)
        counts.append((len(row), int((value > 0).sum()), int((row < 200).sum())))
    total, positive, upper = (sum(c) for c in zip(*counts, strict=True))
    expected = 40 * 30 * math.sqrt(400)
    for found, mean in ((total, expected), (positive, expected / 2), (upper, expected / 2)):
        assert abs(found - mean) < 5 * math.sqrt(mean)


def test_the_dense_map_is_normal() -> None:
    matrix = dense(Projection("dense", 9, 50, 2000)) * math.sqrt(2000)
    assert abs(float(matrix.mean())) < 0.02
    assert float((matrix**4).mean()) == pytest.approx(3, abs=0.15)


@every
def test_a_key_is_a_map(kind: str, layout: str) -> None:
    x = vector(8)
    one, other = (Projection(kind, key, 8, 300, layout)(x) for key in (1, 2))
    assert torch.equal(one, Projection(kind, 1, 8, 300, layout)(x))
    assert abs(float(torch.nn.functional.cosine_similarity(one, other, dim=0))) < 0.3


def test_keys_depend_on_seed_and_name() -> None:
    """Golden values: files hold no maps, so these must never change within one version."""
    assert key_of(0, "model.layers.0.q_proj.weight") == GOLDEN
    assert len({key_of(seed, name) for seed in range(3) for name in ("a.weight", "a.bias", "b.weight")}) == 9
    assert 0 <= key_of(7, "x") < 1 << 63


GOLDEN = 7789076084344672079
