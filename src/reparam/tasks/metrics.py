"""The scores of the tasks, from scikit-learn, scipy, seqeval and rouge-score, each with its 95 % interval."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reparam.errors import ConfigError
from reparam.evaluation.score import Score

DRAWS = 200  # of the rows, for an interval by bootstrap


def need(*names: str) -> None:
    """Raise ConfigError if a library is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != name.partition(".")[0]:
                raise
            raise ConfigError(
                f"run.task: its scores need {name}, which is not installed: pip install 'reparam[tasks]'"
            ) from None


def of_classes(expected: Sequence[int], given: Sequence[int], count: int) -> list[Score]:
    """F1 and Matthews' correlation of so many classes, from 0 ... count - 1.

    The macro F1 is the mean over the classes that occur. With two classes, F1 is that of the second one, as in GLUE.
    The intervals are percentiles over draws of the rows with replacement, from a fixed seed.
    """
    from sklearn import metrics

    pairs = np.zeros((count, count), dtype=np.int64)
    np.add.at(pairs, (np.asarray(expected), np.asarray(given)), 1)
    right, said = np.nonzero(pairs)
    seen = pairs[right, said]

    def macro(weights: np.ndarray) -> float:
        return float(metrics.f1_score(right, said, average="macro", sample_weight=weights, zero_division=0.0))

    def second(weights: np.ndarray) -> float:
        return float(
            metrics.f1_score(
                right, said, pos_label=1, labels=[1], average="micro", sample_weight=weights, zero_division=0.0
            )
        )

    def matthews(weights: np.ndarray) -> float:
        if len({*right, *said}) == 1:  # scikit-learn returns 0, too, with a warning
            return 0.0
        return float(metrics.matthews_corrcoef(right, said, sample_weight=weights))

    draws = np.random.default_rng(0).multinomial(int(seen.sum()), seen / seen.sum(), DRAWS)
    found = [_drawn("f1", second, seen, draws)] if count == 2 else []
    return [*found, _drawn("f1 macro", macro, seen, draws), _drawn("matthews", matthews, seen, draws)]


def _drawn(name: str, measure: Callable[[np.ndarray], float], seen: np.ndarray, draws: np.ndarray) -> Score:
    low, high = np.quantile([measure(draw) for draw in draws], (0.025, 0.975))
    return Score(name, measure(seen), float(low), float(high), int(seen.sum()), larger_is_better=True)


def of_numbers(expected: Sequence[float], given: Sequence[float]) -> list[Score]:
    """Pearson's and Spearman's correlation, with intervals by Fisher's transformation; 0 if one side is constant."""
    from scipy import stats

    n = len(expected)
    constant = n < 2 or len(set(expected)) == 1 or len(set(given)) == 1
    found = []
    for name, measure, factor in (("pearson", stats.pearsonr, 1.0), ("spearman", stats.spearmanr, 1.06)):
        value = 0.0 if constant else float(measure(expected, given).statistic)
        if n <= 3 or abs(value) >= 1:
            low, high = (-1.0, 1.0) if n <= 3 else (value, value)
        else:
            center, half = math.atanh(value), 1.96 * math.sqrt(factor / (n - 3))
            low, high = math.tanh(center - half), math.tanh(center + half)
        found.append(Score(name, value, low, high, n, larger_is_better=True))
    return found


def mean(name: str, values: Sequence[float], *, larger_is_better: bool = True) -> Score:
    """The mean over rows, with an interval of ±1.96 standard errors."""
    found = np.asarray(values, dtype=np.float64)
    half = 1.96 * float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    value = float(found.mean())
    return Score(name, value, value - half, value + half, len(found), larger_is_better=larger_is_better)


def of_tags(expected: Sequence[list[str]], given: Sequence[list[str]]) -> Score:
    """The F1 of whole spans of tags such as B-PER, I-PER and O, as in CoNLL, by seqeval."""
    from seqeval.metrics import f1_score

    def measure(rows: Any) -> float:
        return float(f1_score([expected[i] for i in rows], [given[i] for i in rows], zero_division=0))

    n = len(expected)
    draws = np.random.default_rng(0).integers(n, size=(DRAWS // 4, n))
    low, high = np.quantile([measure(draw) for draw in draws], (0.025, 0.975))
    return Score("span f1", measure(range(n)), float(low), float(high), n, larger_is_better=True)


def rouge(expected: Sequence[str], given: Sequence[str]) -> Score:
    """The mean F1 of the longest common subsequence of words (ROUGE-L), with stemming, by rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(expected, given, strict=True)
    return mean("rouge l", [scorer.score(want, got)["rougeL"].fmeasure for want, got in pairs])
