"""Metrics for Prometheus; each service has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..engine import Engine
from .errors import KINDS
from .sessions import CLOSE_REASONS, VideoSessions

_GAUGES = {"pending", "cache_bytes", "cache_entries"}
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters, gauges and histograms of one service."""

    def __init__(self, engine: Engine, sessions: VideoSessions) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("sam_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self.errors = Counter("sam_errors", "Requests that ended with an error.", ["code"], registry=self.registry)
        self.seconds = Histogram(
            "sam_request_seconds", "From the head to the end.", ["route"], buckets=_BUCKETS, registry=self.registry
        )
        self.in_flight = Gauge("sam_in_flight", "Requests being answered.", registry=self.registry)
        self.ready = Gauge("sam_ready", "1 when requests are taken.", registry=self.registry)
        self.sessions_ended = Counter(
            "sam_video_sessions_ended", "Sessions of video that ended.", ["reason"], registry=self.registry
        )
        gauges = {
            "sam_video_sessions": ("Sessions of video that are open.", lambda: len(sessions)),
            "sam_video_session_bytes": ("Bytes that they hold.", lambda: sessions.nbytes),
            "sam_video_files": ("Video files that are being tracked.", lambda: sessions.running),
        }
        for name, (description, value) in gauges.items():
            Gauge(name, description, registry=self.registry).set_function(value)
        self.registry.register(_EngineCollector(engine))

        for code in KINDS:  # zeros from the start: a rate over a counter that appears with its first error is none
            self.errors.labels(code)
        for reason in CLOSE_REASONS:
            self.sessions_ended.labels(reason)

    def declare(self, route: str, statuses: Iterable[int]) -> None:
        """Begin a route's counters at zero."""
        self.seconds.labels(route)
        for status in statuses:
            self.requests.labels(route, str(status))

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        for name, value in sorted(self._engine.counters().items()):
            family = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            yield family(f"sam_engine_{name.lower()}", "See sam.engine.", value=value)
