"""Gradient-free minimization of a function of a few variables within a box, with a budget of evaluations.

    cobyla    linear models on a simplex (COBYLA, Powell 1994; SciPy). It evaluates one point at a time and needs few
              points. LoraHub's optimizer, Nevergrad's NGOpt, selects it at the paper's problem sizes.
    cma       samples from an adaptive Gaussian (CMA-ES, Hansen 2016, arXiv 1604.00772; pycma). It evaluates one
              generation of points per call of `f`: more points, but far fewer calls.

`f` takes points [K, n] and returns K values.
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
"""COBYLA's initial step, as in LoraHub, and its final step, at which it stops."""
_SPREAD = 0.3
"""Standard deviation of CMA-ES's first generation."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """One evaluated point and its value."""

    weights: tuple[float, ...]
    value: float
    """The value of f; infinity if f returned NaN."""


@dataclasses.dataclass(frozen=True)
class BestPoint:
    """The result of `search`: the point with the lowest value."""

    weights: tuple[float, ...]
    value: float
    history: tuple[Tried, ...]
    """All evaluated points in order; the first point is 0."""


def search(
    f: Callable[[Tensor], Sequence[float]],
    n: int,
    *,
    bound: float = 1.5,
    budget: int = 40,
    optimizer: str = "cobyla",
    seed: int = 0,
) -> BestPoint:
    """Minimize `f` over the box [-bound, bound]^n, starting at 0, with at most `budget` points.

    Args:
        f: takes points [K, n] in float64 and returns K values. NaN counts as infinity and causes one warning.
        n: number of variables, at least 1; at least 2 for "cma".
        bound: half the edge length of the box, above 0.
        budget: highest number of points, at least 1. A budget below the optimizer's initial points causes a warning.
        optimizer: "cobyla" or "cma"; see the module's docstring.
        seed: for "cma"; "cobyla" is deterministic. The same `f` and seed give the same result.

    Raises ValueError if the optimizer is unknown or a setting is out of range.
    """
    check_search(n, bound=bound, budget=budget, optimizer=optimizer)
    first = n + 1 if optimizer == "cobyla" else _generation(n)
    if budget < first:
        warnings.warn(
            f"search: budget={budget} is less than the {first} initial points for {n} adapters, so some of these "
            f"points are not evaluated",
            stacklevel=2,
        )
    log = _Log(f, budget, bound)
    with contextlib.suppress(_SpentError):
        if optimizer == "cobyla":
            _cobyla(log, n)
        else:
            _cma(log, n, seed)
    if log.met_nan:
        warnings.warn("search: at least one loss was NaN and counted as infinite", stacklevel=2)
    best = min(log.history, key=lambda tried: tried.value)
    return BestPoint(best.weights, best.value, tuple(log.history))


def check_search(n: int, *, bound: float, budget: int, optimizer: str) -> None:
    """Raise the ValueErrors of `search` without running it."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    if n < 1 or budget < 1:
        raise ValueError(f"search: n={n!r} and budget={budget!r}: expected at least 1 of each")
    if not 0 < bound < math.inf:
        raise ValueError(f"search: bound={bound!r}: expected a finite number above 0")
    if optimizer == "cma" and n == 1:
        raise ValueError("optimizer='cma' adapts a covariance and needs at least two adapters; use cobyla for one")


class _SpentError(Exception):
    """Raised when the budget is spent, to leave the optimizer."""


class _Log:
    """Calls f within the box and the budget, and records its values."""

    def __init__(self, f: Callable[[Tensor], Sequence[float]], budget: int, bound: float) -> None:
        self.f = f
        self.budget = budget
        self.bound = bound
        self.history: list[Tried] = []
        self.met_nan = False

    def measure(self, points: np.ndarray) -> list[float]:
        """Evaluate points [K, n] and return finite values; a value that is not finite becomes larger than all others.

        Raises _SpentError once the budget is spent, after evaluating as many of the points as it allows.
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
        "seed": math.nan,  # do not seed NumPy's global generator
        "verbose": -9,
    }
    strategy = cma.CMAEvolutionStrategy(n * [0.0], min(_SPREAD, log.bound), options)
    strategy.inject([n * [0.0]], force=True)  # the first point is the base itself
    while not strategy.stop():
        points = strategy.ask()
        strategy.tell(points, log.measure(np.stack(points)))
