"""The search for weights: within its box and budget, never worse than where it starts, and near the least value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reparam.search import search


class Counted:
    """A function with a record of where it was asked, and in what generations."""

    def __init__(self, f: object) -> None:
        self.f = f
        self.generations: list[Tensor] = []

    def __call__(self, points: Tensor) -> list[float]:
        self.generations.append(points)
        return [float(self.f(point)) for point in points]  # type: ignore[operator]

    @property
    def points(self) -> Tensor:
        return torch.cat(self.generations)


def quadratic(n: int, seed: int) -> tuple[Tensor, object]:
    """A well-shaped bowl, and where its least value is: within the box [-1.4, 1.4]^n."""
    generator = torch.Generator().manual_seed(seed)
    least = torch.rand(n, generator=generator, dtype=torch.float64) * 2.8 - 1.4
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    H = turn * torch.linspace(1, 3, n, dtype=torch.float64) @ turn.T
    return least, lambda w: (w - least) @ H @ (w - least)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(7, 60), st.integers(0, 10**6), st.floats(-2, 0), st.floats(0.1, 2))
def test_box_budget_and_the_best_that_was_tried(n: int, budget: int, seed: int, low: float, high: float) -> None:
    f = Counted(quadratic(n, seed)[1])
    found = search(f, n, low=low, high=high, budget=budget)
    assert len(f.points) <= budget
    assert bool((f.points >= low).all() and (f.points <= high).all())
    assert torch.equal(f.points[0], torch.zeros(n, dtype=torch.float64))
    assert found.value == min(tried.value for tried in found.history) <= found.history[0].value
    assert found.value == float(f.f(torch.tensor(found.weights, dtype=torch.float64)))  # type: ignore[operator]
    assert [tried.weights for tried in found.history] == [tuple(point) for point in f.points.tolist()]


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_least_value_of_a_bowl(n: int, seed: int) -> None:
    least, f = quadratic(n, seed)
    found = search(Counted(f), n, budget=25 * n + 15)
    assert (torch.tensor(found.weights, dtype=torch.float64) - least).norm() < 0.05


def test_it_finds_a_corner_of_the_box() -> None:
    found = search(Counted(lambda w: w @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)), 3, budget=60)
    assert found.weights == pytest.approx((-1.5, 1.5, -1.5))


def test_the_first_points_are_one_generation() -> None:
    f = Counted(quadratic(4, 0)[1])
    search(f, 4, budget=40, radius=0.5)
    expected = torch.cat([torch.zeros(1, 4, dtype=torch.float64), 0.5 * torch.eye(4, dtype=torch.float64)])
    assert torch.equal(f.generations[0], expected)


def test_the_same_function_gives_the_same_result() -> None:
    one, two = (search(Counted(quadratic(5, 1)[1]), 5, budget=50) for _ in range(2))
    assert one == two


def test_nan_is_infinite_and_warned_of_once() -> None:
    def f(points: Tensor) -> list[float]:
        return [math.nan if point[0] > 0.2 else float((point + 1).square().sum()) for point in points]

    with pytest.warns(UserWarning, match="NaN") as told:
        found = search(f, 2, budget=60)
    assert len(told) == 1
    assert found.weights == pytest.approx((-1, -1), abs=0.05)
    assert math.isinf(found.history[1].value)
    with pytest.warns(UserWarning, match="NaN"):
        assert math.isinf(search(lambda points: [math.nan] * len(points), 2).value)


def test_a_small_budget_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="below the 4 points"):
        assert len(search(Counted(quadratic(3, 0)[1]), 3, budget=2).history) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1.0, "high": 1.0}, "expected a box with 0 in it"),
        ({"low": 0.5}, "expected a box with 0 in it"),
        ({"high": math.inf}, "expected a box with 0 in it"),
        ({"budget": 0}, "expected at least 1 of each"),
        ({"radius": 0.0}, "expected a finite number above 0"),
    ],
)
def test_what_cannot_be(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(lambda points: [0.0] * len(points), 2, **arguments)  # type: ignore[arg-type]
