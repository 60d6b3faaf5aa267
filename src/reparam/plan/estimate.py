"""From traces of a few layers to the peak of the whole model, what fits, and what would make it fit."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from reparam.errors import ConfigError
from reparam.plan.hollow import config_of, hollow, layers_of, with_layers
from reparam.plan.longest import Longest
from reparam.plan.trace import Peak, traced
from reparam.train.config import Config, resolve, tables

FEW = 2
"""Up to this number of layers, the whole model is traced; above, one and two layers, and a straight line."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of the configuration that lowers the peak."""

    key: str
    value: Any
    peak: int
    """Bytes at the peak with the change."""

    @property
    def said(self) -> str:
        """The value as it is written on the command line."""
        return self.value if isinstance(self.value, str) else json.dumps(self.value)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will hold."""

    batch: Longest
    """The batch that is planned for."""
    peak: Peak
    limit: int | None
    """Bytes that there are; None if unknown."""
    largest: Mapping[str, int]
    """The largest batch size, length and rank that fit, each with the other two as they are; 0 if none does."""
    changes: tuple[Change, ...]
    """If it does not fit: the changes that lower the peak most, each by itself, the best first."""
    flops: int
    """Floating-point operations of a step, in matrix products of the base and the adapter."""

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the limit; None without a limit."""
        return None if self.limit is None else self.peak.total <= self.limit


class Estimator:
    """Computes peaks for changes of one configuration. `loss` is the share of tokens that carry loss.

    Raises BaseError if the base has no readable configuration.
    """

    def __init__(self, config: Config, loss: float = 1.0) -> None:
        self.config, self._loss = config, loss
        self.architecture = config_of(config.base)
        self._traced = functools.lru_cache(maxsize=None)(self._trace)

    def peak(self, rows: int, tokens: int, **changes: Any) -> Peak:
        """The peak with batches of `rows` x `tokens`; `changes` are keys of the configuration, with __ for a dot."""
        return self._traced(rows, tokens, tuple(sorted(changes.items())))

    def _trace(self, rows: int, tokens: int, changes: tuple[tuple[str, Any], ...]) -> Peak:
        config = changed(self.config, {key.replace("__", "."): value for key, value in changes})
        layers = layers_of(self.architecture)
        if layers is None or layers <= FEW:
            return traced(config, self.architecture, rows, tokens, self._loss)
        one, two = (traced(config, with_layers(self.architecture, n), rows, tokens, self._loss) for n in (1, 2))
        return one.along(two, layers - 1)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values of some keys, such as {"base.storage": "nf4"}."""
    if not changes:
        return config
    flat = {f"{s}.{k}": v for s, table in tables(config).items() for k, v in table.items() if v is not None}
    if "base.storage" in changes:  # the settings of the former storage are not those of the new one
        flat = {k: v for k, v in flat.items() if not k.startswith("base.") or k[5:] in ("path", "dtype", "untie")}
    return resolve(None, {**flat, **changes})


def plan(config: Config, batch: Longest, *, limit: int | None, sizes: bool = True) -> Plan:
    """What a run whose longest batch is this one holds, and what fits into `limit` bytes.

    Without `sizes`, which take a dozen traces, the largest sizes that fit are not computed.

    Raises ConfigError for an objective other than sft, and for a method that has no weights to trace; and BaseError if
    the base has no readable configuration.
    """
    if config.run.objective != "sft":
        raise ConfigError(f"reparam plan: the objective {config.run.objective} is not supported, only sft")
    if not config.method.changes_weights:
        raise ConfigError(f"reparam plan: {config.method.name} changes no weights, so it cannot be planned")
    found, rows, tokens = Estimator(config, batch.loss), batch.rows, batch.tokens
    peak = found.peak(rows, tokens)
    return Plan(
        batch,
        peak,
        limit,
        _largest(found, rows, tokens, limit) if sizes and limit is not None else {},
        _changes(found, rows, tokens) if limit is not None and peak.total > limit else (),
        _flops(config, found.architecture, rows, tokens),
    )


def advised(config: Config, made: Plan) -> tuple[Change, ...]:
    """The settings that lower the peak of a plan most, each by itself, at most three."""
    return made.changes or _changes(Estimator(config, made.batch.loss), made.batch.rows, made.batch.tokens)


def _largest(found: Estimator, rows: int, tokens: int, limit: int) -> dict[str, int]:
    sizes = {
        "run.batch_size": _most(lambda n: found.peak(n, tokens).total, rows, limit),
        "data.max_length": _most(lambda n: found.peak(rows, n).total, tokens, limit),
    }
    if (rank := getattr(found.config.method, "r", None)) is not None:
        sizes["method.r"] = _most(lambda n: found.peak(rows, tokens, method__r=n).total, rank, limit)
    return sizes


def _most(peak: Any, start: int, limit: int) -> int:
    """The largest number whose peak fits, at most 64 times `start`; 0 if none does.

    Peaks are computed at four numbers. Between them they lie on straight lines; above, on the last line, or on a
    parabola if they rise faster and faster, as they do with the length where attention keeps its scores.
    """
    points = sorted({1, start, 2 * start, 4 * start})
    values = [float(peak(n)) for n in points]
    (a, b, c), (x, y, z) = points[-3:], values[-3:]
    last = (z - y) / (c - b)
    bend = max(0.0, (last - (y - x) / (b - a)) / (c - a))

    def fitted(n: int) -> float:
        if n > c:
            return z + last * (n - c) + bend * (n - b) * (n - c)
        at = max(1, bisect.bisect_left(points, n))
        share = (n - points[at - 1]) / (points[at] - points[at - 1])
        return values[at - 1] + share * (values[at] - values[at - 1])

    low, top = 0, 64 * start
    while low < top:
        middle = (low + top + 1) // 2
        low, top = (middle, top) if fitted(middle) <= limit else (low, middle - 1)
    return low


def _changes(found: Estimator, rows: int, tokens: int) -> tuple[Change, ...]:
    """The three settings that lower the peak most."""
    config, now = found.config, found.peak(rows, tokens).total
    options: dict[str, Any] = {}
    if not config.run.gradient_checkpointing:
        options["run.gradient_checkpointing"] = True
    if config.base.storage == "dense" and config.method.changes_weights:
        options["base.storage"] = "nf4"
    if not config.run.chunked_loss:
        options["run.chunked_loss"] = True
    if config.optim.name == "adamw_torch":
        options["optim.name"] = "paged_adamw_8bit"
    if rows > 1:
        options["run.batch_size"] = max(1, rows // 2)
    lower = []
    for key, value in options.items():
        fewer = value if key == "run.batch_size" else rows
        try:
            peak = found.peak(fewer, tokens, **{key.replace(".", "__"): value}).total
        except ValueError:  # the method or the model does not take this setting
            continue
        if peak < now:
            lower.append(Change(key, value, peak))
    return tuple(sorted(lower, key=lambda change: change.peak)[:3])


def _flops(config: Config, architecture: Any, rows: int, tokens: int) -> int:
    """Two operations for each weight and token, in the forward pass, the backward pass, and a repeated forward pass.

    The gradient of a frozen weight is not computed. Attention's own products are left out.
    """
    layers = layers_of(architecture)
    small = architecture if layers is None or layers <= FEW else with_layers(architecture, 1)
    with hollow(config, small) as model:
        head = model.model.get_output_embeddings() if config.run.task in ("causal", "seq2seq") else None  # type: ignore[operator]
        base: dict[int, int] = {
            id(m): int(m.out_features) * int(m.in_features)  # type: ignore[arg-type]
            for m in model.model.modules()
            if hasattr(m, "out_features") and hasattr(m, "in_features")
        }
        of_head = base.pop(id(head), 0)
        trained = sum(p.numel() for p in model.adapter.parameters())
    times = 1 if small is architecture else layers or 1
    passes = 3 if config.run.gradient_checkpointing else 2
    return 2 * rows * tokens * (passes * times * sum(base.values()) + 2 * of_head + 3 * times * trained)
