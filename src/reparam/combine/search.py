"""A search for a few numbers without gradients, within a box and a budget, by libraries that are kept for that.

    cobyla    linear models on a simplex (Powell 1994; SciPy). One point at a time, each chosen by all before it, which
              makes the most of few. What LoraHub's own optimizer, Nevergrad's NGOpt, resolves to at the paper's sizes.
    cma       samples of a Gaussian that adapts (CMA-ES, Hansen 2016, arXiv 1604.00772; pycma). A generation of points
              at a time, which `f` can compute together: more points, and far fewer calls.

`f` gets points [K, n] and gives K values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

OPTIMIZERS = ("cobyla", "cma")
_STEP, _LAST = 0.5, 1e-4
"""COBYLA's first steps, as in LoraHub, and its last."""
_SPREAD = 0.3
"""Standard deviation of CMA-ES's first generation."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """One point, and what f gave for it."""

    weights: tuple[float, ...]
    value: float
    """Infinite where f gave NaN."""


@dataclasses.dataclass(frozen=True)
class BestPoint:
    """The best point that was tried."""

    weights: tuple[float, ...]
    value: float
    history: tuple[Tried, ...]
    """Every point in the order in which they were tried; the first is 0."""


def search(
    f: Callable[[Tensor], Sequence[float]],
    n: int,
    *,
    bound: float = 1.5,
    budget: int = 40,
    optimizer: str = "cobyla",
    seed: int = 0,
) -> BestPoint:
    """The best of at most `budget` points of the box [-bound, bound]^n; it starts at 0.

    `f` takes points [K, n] in float64 and gives a value for each; less is better. NaN counts as infinity, with one
    warning. A budget below the points that an optimizer starts with is warned of. `seed` is for "cma"; "cobyla" draws
    nothing. The same `f` and seed give the same result. Raises ValueError for an unknown optimizer, for a bound, n or
    budget that cannot be, and for "cma" in one dimension.
    """
    check_search(n, bound=bound, budget=budget, optimizer=optimizer)
    first = n + 1 if optimizer == "cobyla" else _generation(n)
    if budget < first:
        warnings.warn(
            f"a budget of {budget} is below the {first} points that the search starts with for {n} adapters: some of "
            f"them are never tried",
            stacklevel=2,
        )
    log = _Log(f, budget, bound)
    with contextlib.suppress(_SpentError):
        if optimizer == "cobyla":
            _cobyla(log, n)
        else:
            _cma(log, n, seed)
    if log.met_nan:
        warnings.warn("the search met a loss that is NaN, and counted it as infinite", stacklevel=2)
    best = min(log.history, key=lambda tried: tried.value)
    return BestPoint(best.weights, best.value, tuple(log.history))


def check_search(n: int, *, bound: float, budget: int, optimizer: str) -> None:
    """Raise ValueError where `search` would, before there is anything to search with."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    if n < 1 or budget < 1:
        raise ValueError(f"search: n={n!r} and budget={budget!r}: expected at least 1 of each")
    if not 0 < bound < math.inf:
        raise ValueError(f"search: bound={bound!r}: expected a finite number above 0")
    if optimizer == "cma" and n == 1:
        raise ValueError("optimizer='cma' adapts a covariance, and needs two adapters or more; use cobyla for one")


class _SpentError(Exception):
    """The budget is spent."""


class _Log:
    """Calls f, within the box and the budget, and keeps what it gave."""

    def __init__(self, f: Callable[[Tensor], Sequence[float]], budget: int, bound: float) -> None:
        self.f = f
        self.budget = budget
        self.bound = bound
        self.history: list[Tried] = []
        self.met_nan = False

    def measure(self, points: np.ndarray) -> list[float]:
        """Finite values of points [K, n]: those that are not are put above all others.

        Raises _SpentError once the budget is, after as many points as it allows.
        """
        inside = torch.tensor(points, dtype=torch.float64).clamp(-self.bound, self.bound)
        inside = inside[: self.budget - len(self.history)]
        if len(inside):
            values = [float(value) for value in self.f(inside.clone())]
            self.met_nan |= any(math.isnan(value) for value in values)
            values = [math.inf if math.isnan(value) else value for value in values]
            self.history += [Tried(tuple(p), v) for p, v in zip(inside.tolist(), values, strict=True)]
        if len(inside) < len(points):
            raise _SpentError
        known = [tried.value for tried in self.history if math.isfinite(tried.value)] or [0.0]
        above = max(known) + (max(known) - min(known)) + 1
        return [value if math.isfinite(value) else above for value in values]


def _cobyla(log: _Log, n: int) -> None:
    from scipy.optimize import minimize

    options = {"rhobeg": min(_STEP, log.bound), "tol": _LAST, "maxiter": max(log.budget, n + 2)}
    box = [(-log.bound, log.bound)] * n
    minimize(lambda x: log.measure(x[None])[0], np.zeros(n), method="COBYLA", bounds=box, options=options)


def _generation(n: int) -> int:
    """CMA-ES's default number of points in a generation."""
    return 4 + int(3 * math.log(n))


def _cma(log: _Log, n: int, seed: int) -> None:
    import cma

    drawn = np.random.default_rng(seed)
    options = {
        "bounds": [-log.bound, log.bound],
        "popsize": _generation(n),
        "randn": lambda *shape: drawn.standard_normal(shape),
        "seed": math.nan,  # leaves NumPy's global generator alone
        "verbose": -9,
    }
    strategy = cma.CMAEvolutionStrategy(n * [0.0], min(_SPREAD, log.bound), options)
    strategy.inject([n * [0.0]], force=True)  # the first point is the base itself
    while not strategy.stop():
        points = strategy.ask()
        strategy.tell(points, log.measure(np.stack(points)))
