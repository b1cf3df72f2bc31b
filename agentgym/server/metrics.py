"""Figures of a running service in Prometheus' text format. Law: a label's values are ours (routes, classes, states),
never a caller's, so that no caller makes a new time series."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agentgym.server.visit import Visit

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True, slots=True)
class Reading:
    """One figure that is read when somebody asks.

    Example: `Reading("agentgym_sessions", "Sessions by state.", 3, labels={"state": "open"})`.
    """

    name: str
    help: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)
    kind: Literal["gauge", "counter"] = "gauge"


Read = Callable[[], Iterable[Reading]]


class Metrics:
    """The figures of one service; `add` has others read with them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._readings = _Readings()
        self._registry.register(self._readings)
        self._requests = Counter(
            "agentgym_http_requests", "Requests answered.", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "agentgym_http_request_seconds", "From a request's first byte to its answer's last one.", ("route",),
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._first = Histogram(
            "agentgym_first_token_seconds", "From a streamed request to its first token.", ("route",),
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._failures = Counter(
            "agentgym_failures", "Requests and connections that failed, by class.", ("kind",), registry=self._registry
        )
        self._tokens = Counter(
            "agentgym_http_tokens", "Tokens of the requests that were answered.", ("kind",), registry=self._registry
        )

    def add(self, read: Read) -> None:
        """Has `read` called whenever the figures are written; it must not wait."""
        self._readings.sources.append(read)

    def visited(self, visit: Visit) -> None:
        """Counts a request that has ended."""
        method = visit.method if visit.method in ("GET", "POST", "DELETE", "HEAD") else "other"
        self._requests.labels(method, visit.route, str(visit.status)).inc()
        self._seconds.labels(visit.route).observe(visit.seconds)
        if visit.first_token_s is not None:
            self._first.labels(visit.route).observe(visit.first_token_s)
        if visit.failed:
            self.failed(visit.failed)
        self._tokens.labels("prompt").inc(visit.prompt_tokens)
        self._tokens.labels("sampled").inc(visit.sampled_tokens)

    def failed(self, kind: str) -> None:
        """Counts a failure by its class."""
        self._failures.labels(kind).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Readings(Collector):
    def __init__(self) -> None:
        self.sources: list[Read] = []

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for source in self.sources:
            for one in source():
                family = families.get(one.name)
                if family is None:
                    kind = CounterMetricFamily if one.kind == "counter" else GaugeMetricFamily
                    family = families[one.name] = kind(one.name, one.help, labels=list(one.labels))
                family.add_metric(list(one.labels.values()), one.value)  # type: ignore[attr-defined]
        return families.values()
