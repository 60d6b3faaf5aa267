"""The search for d90: sizes, bisection, results and refusals; a toy problem whose dimension is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reparam.core.checks import numbers
from reparam.methods.projections import Projection
from reparam.recipes.intrinsic import SearchPlan, conclusions
from reparam.recipes.subspace import Curve, Point, check_reference, grid, lora_rank, search_dimension


def step(at: int, high: float = 1.0) -> object:
    """A metric that jumps from nearly nothing to `high` at this d."""
    return lambda d: Point(d, 0.1, (high if d >= at else 0.01,))


@pytest.mark.parametrize(
    ("text", "each", "sizes"),
    [
        ("10:10000", 1, (10, 100, 1000, 10000)),
        ("10:10000", 2, (10, 32, 100, 316, 1000, 3162, 10000)),
        ("7:9", 2, (7, 9)),
        ("1:4", 10, (1, 2, 3, 4)),
    ],
)
def test_grids(text: str, each: int, sizes: tuple[int, ...]) -> None:
    assert grid(text, each) == sizes


@pytest.mark.parametrize("text", ["10", "10:", "10:5", "0:10", "a:b", "1:2:3", "10:10", "-1:5"])
def test_grids_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="grid"):
        grid(text)


@given(st.integers(1, 5000))
def test_bisection_comes_close(at: int) -> None:
    """d90 passes, the largest smaller size tried fails, and they are within the tolerance or adjacent."""
    curve = search_dimension(step(at), base=0.0, full=1.0, sizes=grid("1:5000", 1))  # type: ignore[arg-type]
    assert curve.d90 is not None
    assert curve.d90 >= at
    if curve.below is None:
        assert curve.d90 == 1
    else:
        assert curve.below < at
        assert curve.d90 / curve.below <= 1.25 or curve.d90 - curve.below <= 2
    assert curve.odd == ()


def test_not_reached_is_said() -> None:
    curve = search_dimension(step(10**6), base=0.0, full=1.0, sizes=(10, 100))  # type: ignore[arg-type]
    assert curve.d90 is None
    assert len(curve.points) == 2
    assert "not reached. No d up to 100 reached 0.9 x 1 = 0.9" in conclusions(curve, sides=100, rank=None)[0]


def test_the_smallest_may_pass() -> None:
    curve = search_dimension(step(1), base=0.0, full=1.0, sizes=(10, 100))  # type: ignore[arg-type]
    assert (curve.d90, curve.below) == (10, None)
    assert "lower the grid's start" in conclusions(curve, sides=100, rank=1)[1]


def test_a_larger_d_that_fails_is_said() -> None:
    values = {10: 0.2, 100: 0.95, 1000: 0.5, 10000: 1.0}
    curve = search_dimension(
        lambda d: Point(d, 0.1, (values.get(d, 0.0),)), base=0.0, full=1.0, sizes=tuple(values), tolerance=100
    )
    assert (curve.d90, curve.odd) == (100, (1000,))
    assert any("not monotone: 1000 failed" in line for line in conclusions(curve, sides=10, rank=10))


def test_a_run_that_failed_passes_nothing() -> None:
    points = (Point(10, 0.1, (1.0, None)), Point(20, 0.1, ()), Point(30, 0.1, (0.9, 1.0)))
    curve = Curve(0.0, 1.0, 0.9, points)
    assert curve.d90 == 30
    assert points[0].mean == points[1].mean == -math.inf


@pytest.mark.parametrize(
    ("base", "full", "words"),
    [
        (0.5, 0.55, "no dimension would fail"),
        (0.9, 1.0, "no dimension would fail"),
        (0.0, 0.0, "must be above 0"),
        (0.0, -1.0, "must be above 0"),
        (0.0, math.nan, "both must be finite"),
        (math.inf, 1.0, "both must be finite"),
    ],
)
def test_references_of_which_a_share_means_nothing(base: float, full: float, words: str) -> None:
    """Refused before anything is evaluated."""
    with pytest.raises(ValueError, match=words):
        search_dimension(lambda d: pytest.fail("evaluated"), base=base, full=full, sizes=(1, 2))
    check_reference(0.5, 0.85, 0.9)


def test_a_linear_regression_needs_what_its_solution_has() -> None:
    """Targets y = x W where only k of 64 weights matter; the metric is R² by least squares in the subspace.

    d90 grows with the threshold, and is at most the number of weights.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=g, dtype=torch.float64)
    y = x[:, :20] @ torch.randn(20, generator=g, dtype=torch.float64)

    def explained(d: int) -> Point:
        p = Projection("dense", 3, d, 64)
        P = torch.stack([p(e) for e in torch.eye(d, dtype=torch.float64)], 1)
        theta = torch.linalg.lstsq(x @ P, y[:, None]).solution[:, 0]
        left = (y - x @ P @ theta).square().sum() / y.square().sum()
        return Point(d, 0.1, (float(1 - left),))

    found = [
        search_dimension(explained, base=0.0, full=1.0, sizes=(2, 8, 32, 64), share=s).d90
        for s in (0.3, 0.6, 0.9, 0.999)
    ]
    assert all(d is not None for d in found)
    assert found == sorted(found)  # type: ignore[type-var]
    assert found[0] < found[2] <= found[3] <= 64  # type: ignore[operator]


def test_ranks() -> None:
    assert [lora_rank(d, 100) for d in (1, 100, 101, 1000)] == [1, 1, 2, 10]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": "loss"}, "metric 'loss'"),
        ({"maps": 0}, "maps 0"),
        ({"share": 0.0}, "share 0.0"),
        ({"chance": 1.0}, "chance 1.0"),
        ({"rates": ()}, "rates none"),
        ({"full_rates": (0.1, -1.0)}, r"rates \[-1.0\]"),
    ],
)
def test_plans_that_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SearchPlan((1, 2), **settings)  # type: ignore[arg-type]


def test_numbers_of_the_command_line() -> None:
    assert numbers("1e-3, 0.5", "--rates") == (1e-3, 0.5)
    with pytest.raises(ValueError, match="--rates 'fast'"):
        numbers("fast", "--rates")
