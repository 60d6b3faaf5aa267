"""The search for weights: it respects bounds and budget, never ends worse than its start, and nears the minimum."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reparam.combine.search import OPTIMIZERS, search

pytestmark = pytest.mark.filterwarnings("ignore:a budget of")


class Counted:
    """An objective that records the points and the generations it was called with."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f = f
        self.generations: list[Tensor] = []

    def __call__(self, points: Tensor) -> list[float]:
        self.generations.append(points)
        return [float(self.f(point)) for point in points]

    @property
    def points(self) -> Tensor:
        return torch.cat(self.generations)


def bowl(n: int, seed: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A well-conditioned quadratic, and its minimizer in the box [-1.4, 1.4]^n."""
    generator = torch.Generator().manual_seed(seed)
    least = torch.rand(n, generator=generator, dtype=torch.float64) * 2.8 - 1.4
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    H = turn * torch.linspace(1, 3, n, dtype=torch.float64) @ turn.T
    return least, lambda w: (w - least) @ H @ (w - least)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(OPTIMIZERS),
    st.integers(2, 6),
    st.integers(1, 60),
    st.integers(0, 10**6),
    st.floats(0.05, 3),
)
def test_box_budget_and_the_best_that_was_tried(optimizer: str, n: int, budget: int, seed: int, bound: float) -> None:
    f = Counted(bowl(n, seed)[1])
    found = search(f, n, bound=bound, budget=budget, optimizer=optimizer, seed=seed)
    assert len(f.points) <= budget
    assert bool((f.points.abs() <= bound).all())
    assert torch.equal(f.points[0], torch.zeros(n, dtype=torch.float64))
    assert found.value == min(tried.value for tried in found.history) <= found.history[0].value
    assert found.value == float(f.f(torch.tensor(found.weights, dtype=torch.float64)))
    assert [tried.weights for tried in found.history] == [tuple(point) for point in f.points.tolist()]


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("optimizer", "each"), [("cobyla", 25), ("cma", 120)])
def test_it_finds_the_least_value_of_a_bowl(n: int, seed: int, optimizer: str, each: int) -> None:
    least, f = bowl(n, seed)
    found = search(Counted(f), n, budget=each * n + 15, optimizer=optimizer)
    assert (torch.tensor(found.weights, dtype=torch.float64) - least).norm() < 0.05


def test_one_weight() -> None:
    least, f = bowl(1, 0)
    assert search(Counted(f), 1).weights == pytest.approx(tuple(least.tolist()), abs=0.01)


@pytest.mark.parametrize(("optimizer", "budget", "near"), [("cobyla", 60, 1e-6), ("cma", 400, 0.02)])
def test_it_finds_a_corner_of_the_box(optimizer: str, budget: int, near: float) -> None:
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = search(Counted(lambda w: w @ slope), 3, budget=budget, optimizer=optimizer)
    assert found.weights == pytest.approx((-1.5, 1.5, -1.5), abs=near)


def test_generations() -> None:
    """CMA-ES evaluates 4 + ⌊3 ln n⌋ points at once; the last generation is cut to the budget."""
    f = Counted(bowl(4, 0)[1])
    search(f, 4, budget=20, optimizer="cma")
    assert [len(points) for points in f.generations] == [8, 8, 4]
    f = Counted(bowl(4, 0)[1])
    search(f, 4, budget=20)
    assert [len(points) for points in f.generations] == [1] * 20


def test_the_same_seed_gives_the_same_result_and_touches_no_other_generator() -> None:
    for optimizer in OPTIMIZERS:
        before = np.random.get_state()[1].copy(), torch.get_rng_state()
        one, two = (search(Counted(bowl(5, 1)[1]), 5, optimizer=optimizer, seed=3) for _ in range(2))
        assert one == two
        assert (np.random.get_state()[1] == before[0]).all()
        assert torch.equal(torch.get_rng_state(), before[1])
        other = search(Counted(bowl(5, 1)[1]), 5, optimizer=optimizer, seed=4)
        assert (other == one) == (optimizer == "cobyla")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nan_is_infinite_and_warned_of_once(optimizer: str) -> None:
    def f(points: Tensor) -> list[float]:
        return [math.nan if point[0] > 0.2 else float((point + 1).square().sum()) for point in points]

    with pytest.warns(UserWarning, match="NaN") as told:
        found = search(f, 2, budget=150, optimizer=optimizer)
    assert len(told) == 1
    assert found.weights == pytest.approx((-1, -1), abs=0.05)
    assert any(math.isinf(tried.value) for tried in found.history)
    assert not any(math.isnan(tried.value) for tried in found.history)
    with pytest.warns(UserWarning, match="NaN"):
        assert math.isinf(search(lambda points: [math.nan] * len(points), 2, optimizer=optimizer).value)


@pytest.mark.filterwarnings("default:a budget of")
@pytest.mark.parametrize(("optimizer", "first"), [("cobyla", 4), ("cma", 7)])
def test_a_small_budget_is_warned_of(optimizer: str, first: int) -> None:
    with pytest.warns(UserWarning, match=f"less than the {first} initial points"):
        assert len(search(Counted(bowl(3, 0)[1]), 3, budget=2, optimizer=optimizer).history) == 2


def test_what_the_function_raises_ends_the_search() -> None:
    def broken(points: Tensor) -> list[float]:
        raise ZeroDivisionError

    for optimizer in OPTIMIZERS:
        with pytest.raises(ZeroDivisionError):
            search(broken, 2, optimizer=optimizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bound": 0.0}, "bound=0.0: expected a finite number above 0"),
        ({"bound": math.inf}, "expected a finite number above 0"),
        ({"budget": 0}, "expected at least 1 of each"),
        ({"optimizer": "adam"}, "expected one of cobyla, cma"),
        ({"n": 1, "optimizer": "cma"}, "needs at least two adapters"),
    ],
)
def test_what_cannot_be(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(lambda points: [0.0] * len(points), **{"n": 2, **arguments})  # type: ignore[arg-type]
