"""Numbers for Prometheus: what the server answers, and how its engine does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from reparam.serve.engine import Engine
from reparam.serve.http.blends import is_made

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BASE = "(base)"
"""The label of the base, which no adapter can have as its name."""
SUMS = "(sums)"
"""The label of all sums together."""


class Traffic:
    """Counts requests and the time of their answers, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "reparam_http_requests", "Requests, by address and status.", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "reparam_http_request_seconds",
            "Time of requests, by address.",
            ["path"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "reparam_first_token_seconds",
            "Time from a request to the first token of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request to an address was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)


class OfEngine(Collector):
    """What an engine counts, read whenever Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """All numbers of the engine."""
        now = self._engine.metrics()
        yield _gauge("ready", "Whether requests are taken.", float(now.ready))
        yield _gauge("queue_requests", "Requests that no step has computed yet.", now.waiting)
        yield _gauge("batch_requests", "Requests in the last step.", now.running)
        yield _gauge("tokens_per_second", "New tokens, over the last 10 seconds.", now.tokens_per_second)
        yield _gauge("adapters_ready", "Adapters in the tables.", now.adapters_ready)
        yield _gauge("adapter_bytes", "Bytes of the adapters in the tables.", now.adapter_bytes)
        yield _counter("adapter_loads", "Adapters that were put into the tables.", now.adapter_loads)
        yield _counter("restarts", "Starts of the engine after a fault.", now.restarts)
        yield _counter("cached_tokens", "Tokens of prompts that were in the cache.", now.cached_tokens)
        yield HistogramMetricFamily(
            "reparam_step_seconds",
            "Time of steps.",
            buckets=[("+Inf" if bound == float("inf") else f"{bound:g}", count) for bound, count in now.step_times],
            sum_value=now.step_seconds,
        )
        yield _by("answers", "Answers, by how they ended.", "end", now.ended)
        for name, text, of in _OF_MODEL:
            counts: dict[str, float] = {}
            for adapter, found in now.adapters.items():
                label = _label(adapter)
                counts[label] = counts.get(label, 0) + getattr(found, of)
            yield _by(name, text, "model", counts)


_OF_MODEL = (
    ("requests", "Answers that were begun, by model.", "requests"),
    ("prompt_tokens", "Tokens of prompts, by model.", "prompt_tokens"),
    ("new_tokens", "Tokens of answers, by model.", "new_tokens"),
)


def _label(adapter: str | None) -> str:
    return BASE if adapter is None else SUMS if is_made(adapter) else adapter


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"reparam_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"reparam_{name}", text, value=value)


def _by(name: str, text: str, label: str, counts: Mapping[str, float]) -> Metric:
    found = CounterMetricFamily(f"reparam_{name}", text, labels=[label])
    for key, value in counts.items():
        found.add_metric([key], value)
    return found
