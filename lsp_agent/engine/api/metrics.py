"""Figures for Prometheus, in a registry of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.routing import Route

from lsp_agent.engine.request import Timings

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
OTHER = "other"
CLIENTS = "clients"


class Metrics:
    """Counts what is answered, by `routes`; `status` gives the engine's state at each reading."""

    def __init__(self, routes: Sequence[Route], status: Callable[[], Mapping[str, Any]]) -> None:
        self._routes = routes
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Status(status))
        name = "lsp_agent_{}".format
        self._requests = Counter(name("requests"), "Requests answered.", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            name("request_seconds"), "Until a request's answer ended.", ["route"], buckets=_WAITS, registry=registry
        )
        self._prompt = Counter(name("prompt_tokens"), "Tokens of prompts.", registry=registry)
        self._cached = Counter(name("cached_tokens"), "Tokens of prompts that were not read again.", registry=registry)
        self._generated = Counter(name("generated_tokens"), "Tokens of answers.", registry=registry)
        self._drafted = Counter(name("drafted_tokens"), "Tokens that were guessed.", registry=registry)
        self._accepted = Counter(name("accepted_tokens"), "Guessed tokens that were right.", registry=registry)
        self._queued = Histogram(
            name("queue_seconds"), "Until a prompt was begun to be read.", buckets=_WAITS, registry=registry
        )
        self._first = Histogram(
            name("time_to_first_token_seconds"), "From request to first token.", buckets=_WAITS, registry=registry
        )
        self._each = Histogram(
            name("time_per_token_seconds"), "Mean time a token after the first.", buckets=_STEPS, registry=registry
        )

    def route(self, path: str) -> str:
        """The label of a path; paths that strangers make up share one."""
        return next((route.path for route in self._routes if route.path_regex.match(path)), OTHER)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a response."""
        self._requests.labels(self.route(path), str(status)).inc()
        self._seconds.labels(self.route(path)).observe(seconds)

    def generated(self, timings: Iterable[Timings], stopwatch: Stopwatch) -> None:
        """Count what a request took of the engine, whether it came to its end or not."""
        for one in timings:
            self._prompt.inc(one.prompt_tokens)
            self._cached.inc(one.cached_tokens)
            self._drafted.inc(one.drafted_tokens)
            self._accepted.inc(one.accepted_tokens)
            self._generated.inc(one.decoded_tokens)
            self._queued.observe(one.queued_s)
        if stopwatch.first is not None:
            self._first.observe(stopwatch.first - stopwatch.started)
            if stopwatch.steps > 1:
                self._each.observe((stopwatch.last - stopwatch.first) / (stopwatch.steps - 1))

    def text(self) -> bytes:
        """All figures, in Prometheus' text format."""
        return generate_latest(self._registry)


class Stopwatch:
    """When a request came, and its first and last step."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.first: float | None = None
        self.steps = 0

    def step(self) -> None:
        """Note a step."""
        self.last = time.monotonic()
        self.first = self.last if self.first is None else self.first
        self.steps += 1


class _Status(Collector):
    """Gauges read from the engine when they are asked for: the numbers of its status, named by their places in it."""

    def __init__(self, read: Callable[[], Mapping[str, Any]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        status = dict(self._read())
        families: dict[str, GaugeMetricFamily] = {}
        for model, about in status.pop("models", {}).items():
            for name, value in numbers(about, "lsp_agent_model"):
                family = families.setdefault(name, GaugeMetricFamily(name, "Of a loaded model.", labels=["model"]))
                family.add_metric([model], value)
        for name, value in numbers(status, "lsp_agent_engine"):
            families[name] = GaugeMetricFamily(name, "Of the engine.", value=value)
        return families.values()


def numbers(status: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers of a nested status with the names of their places; those by client, who may be anyone, left out."""
    for key, value in status.items():
        if key == CLIENTS:
            continue
        name = f"{prefix}_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in key)
        if isinstance(value, Mapping):
            yield from numbers(value, name)
        elif isinstance(value, int | float):
            yield name, float(value)
