"""Intervals, Pareto fronts and halving, against published values, an independent reference and definitions."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reparam.compare.halving import better_half, stopped_early
from reparam.compare.pareto import front
from reparam.compare.statistics import interval, paired, student


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (4, 2.776), (30, 2.042), (40, 2.021), (60, 2.000), (120, 1.980)]
)
def test_student_has_the_values_of_the_printed_tables(freedom: int, t: float) -> None:
    assert student(freedom) == pytest.approx(t, abs=6e-4)


def test_student_is_the_point_that_leaves_a_fortieth_above_it() -> None:
    """Checked by numerical integration of the density, independent of the table."""
    for freedom in (2, 5, 17, 45):
        scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        steps, end = 20_000, student(freedom)
        points = [scale * (1 + (end * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
        area = (sum(points) - (points[0] + points[-1]) / 2) * end / steps
        assert area == pytest.approx(0.475, abs=2e-5)


def test_an_interval_covers_the_mean_it_should() -> None:
    """Over many samples from a normal distribution, 95 % of the intervals contain its mean."""
    draws = statistics.NormalDist(3.0, 2.0).samples(6000, seed=1)
    found = [interval(draws[i : i + 3]) for i in range(0, 6000, 3)]
    assert sum(f.low <= 3.0 <= f.high for f in found) / len(found) == pytest.approx(0.95, abs=0.015)  # type: ignore[operator]


def test_one_value_has_no_interval_and_proves_nothing() -> None:
    found = interval([0.7])
    assert (found.low, found.high, found.half) == (None, None, None)
    assert found.holds_zero
    with pytest.raises(ValueError, match="no values"):
        interval([])
    with pytest.raises(ValueError, match="at least 1"):
        student(0)


def test_pairing_takes_out_what_seeds_have_in_common() -> None:
    noise = {0: 5.0, 1: -3.0, 2: 11.0}
    difference = paired({s: n + 0.1 + 0.01 * s for s, n in noise.items()}, noise)
    assert difference is not None
    assert difference.mean == pytest.approx(0.11)
    assert not difference.holds_zero
    assert paired({0: 1.0}, {1: 1.0}) is None


points = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12
)


@given(points, st.booleans())
def test_the_front_is_what_no_other_point_beats(points: dict[str, tuple[int, int]], larger: bool) -> None:
    sign = -1 if larger else 1

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and sign * a[1] <= sign * b[1]

    expected = {name for name, p in points.items() if not any(beats(q, p) for q in points.values())}
    found = front(points, larger_is_better=larger)  # type: ignore[arg-type]
    assert set(found) == expected
    assert [points[name][0] for name in found] == sorted(points[name][0] for name in found)


def test_the_better_half_of_the_rates_goes_on() -> None:
    assert better_half({1.0: 5.0, 2.0: 1.0, 3.0: 2.0, 4.0: 3.0, 5.0: 4.0}) == [2.0, 3.0, 4.0]
    assert better_half({1.0: 1.0}) == [1.0]
    assert better_half({1.0: math.inf, 2.0: math.inf}) == [1.0]  # there is nothing better to be had


def test_contestants_are_stopped_that_are_behind_and_not_smaller() -> None:
    losses = {"lora": 2.0, "best": 1.0, "tiny": 9.0, "fat": 3.0, "failed": math.inf}
    parameters = {"lora": 10, "best": 20, "tiny": 1, "fat": 50, "failed": 0}
    stopped = stopped_early(losses, parameters, reference="lora", keep=0.2, least=1)
    assert set(stopped) == {"fat", "failed"}
    assert "place 4 of 5" in stopped["fat"] or "place 3 of 5" in stopped["fat"]
    assert stopped_early(losses, parameters, reference="lora", keep=1.0, least=1) == {}
    assert stopped_early(losses, parameters, reference="lora", keep=0.2, least=5) == {}
