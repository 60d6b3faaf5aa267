"""The section [compare] of a plan: its keys, default values and ranges."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from reparam.core.plain import wrong_types


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Settings of the section [compare]. Raises ValueError, with all problems at once, for values out of range."""

    metric: Literal[
        "auto",
        "exact",
        "loss",
        "bits",
        "accuracy",
        "f1",
        "f1_macro",
        "matthews",
        "pearson",
        "spearman",
        "span_f1",
        "rouge_l",
        "recall_at_1",
        "mrr",
    ] = "auto"
    """Metric to compare: exact (exact match of answers), loss (per answer token) or bits (per byte of text), or one of
    those that run.metric has for run.task. auto means exact for rows with answers, bits for rows of text, and the first
    metric of a task."""
    test: str | None = None
    """File of the rows for the reported scores. By default, half of data.valid; the other half is for tuning."""
    rows: int = 200
    """Maximum number of tuning rows and of test rows to score. They are drawn once, with run.seed."""
    methods: tuple[Mapping[str, Any], ...] = ()
    """Methods to compare, each with its name and settings."""
    ranks: tuple[int, ...] = ()
    """Ranks for every method that has a rank. By default, the method's default rank."""
    storages: tuple[str, ...] = ()
    """Names of the storages of the base to compare. By default, base.storage alone."""
    seeds: int = 3
    """Number of scored runs of each contestant. Their seeds are run.seed, run.seed + 1, and so on."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates to try for every contestant."""
    rungs: tuple[float, ...] = (0.25, 0.5)
    """Lengths of the tuning runs as shares of the full number of steps, shortest first."""
    keep: float = 0.5
    """Share of the contestants that continue after each rung of tuning; 1 stops none."""
    least: int = 8
    """Minimum number of contestants that continue after each rung."""
    reference: str = ""
    """Label of the contestant that the others are compared with. By default, the first plain LoRA, if any."""
    minutes: float | None = None
    """Start no further run after this many minutes. Each call of the command has this much time."""
    parameters: int | None = None
    """Leave out contestants with more trained parameters than this."""

    def __post_init__(self) -> None:
        if problems := wrong_types(self):
            raise ValueError("; ".join(f"compare.{problem}" for problem in problems))
        problems = [
            f"{key}={value!r}: expected {what}"
            for key, value, what, right in (
                ("rows", self.rows, "at least 2", self.rows >= 2),
                ("seeds", self.seeds, "at least 1", self.seeds >= 1),
                ("rates", self.rates, "numbers above 0", self.rates and all(0 < r < math.inf for r in self.rates)),
                ("rungs", self.rungs, "rising shares in (0, 1]", _rising(self.rungs)),
                ("keep", self.keep, "a share in (0, 1]", 0 < self.keep <= 1),
                ("least", self.least, "at least 1", self.least >= 1),
                ("minutes", self.minutes, "above 0", self.minutes is None or 0 < self.minutes < math.inf),
                ("parameters", self.parameters, "at least 1", self.parameters is None or self.parameters >= 1),
            )
            if not right
        ]
        if problems:
            raise ValueError("; ".join(problems))


def _rising(rungs: Sequence[float]) -> bool:
    return bool(rungs) and all(a < b for a, b in itertools.pairwise((0.0, *rungs))) and rungs[-1] <= 1
