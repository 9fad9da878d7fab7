"""`core.metrics` as Prometheus text, for processes that Triton does not export."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kelp.core.metrics import Labels, MetricFamily, Metrics

_COUNTER_SUFFIX = "_total"


class Exposition:
    """Gathers one process's metrics; belongs to one thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._registry = CollectorRegistry()
        self._families: dict[str, Counter | Gauge | Histogram] = {}

    def text(self) -> bytes:
        """Everything so far, in Prometheus' text format."""
        self.gather()
        return generate_latest(self._registry)

    def gather(self) -> None:
        """Take over what has been observed: to be called now and then, or observations pile up."""
        counters, gauges, observations = self._metrics.take()
        for (family, labels), increase in counters.items():
            self._counter(family, labels).inc(increase)
        for (family, labels), value in gauges.items():
            self._gauge(family, labels).set(value)
        for (family, labels), values in observations.items():
            histogram = self._histogram(family, labels)
            for value in values:
                histogram.observe(value)

    def _counter(self, family: MetricFamily, labels: Labels) -> Counter:
        name = family.name.removesuffix(_COUNTER_SUFFIX)
        known = self._families.get(family.name) or Counter(name, family.help, _names(labels), registry=self._registry)
        self._families[family.name] = known
        assert isinstance(known, Counter)
        return known.labels(*_values(labels)) if labels else known

    def _gauge(self, family: MetricFamily, labels: Labels) -> Gauge:
        known = self._families.get(family.name)
        known = known or Gauge(family.name, family.help, _names(labels), registry=self._registry)
        self._families[family.name] = known
        assert isinstance(known, Gauge)
        return known.labels(*_values(labels)) if labels else known

    def _histogram(self, family: MetricFamily, labels: Labels) -> Histogram:
        known = self._families.get(family.name)
        known = known or Histogram(
            family.name, family.help, _names(labels), buckets=family.buckets, registry=self._registry
        )
        self._families[family.name] = known
        assert isinstance(known, Histogram)
        return known.labels(*_values(labels)) if labels else known


def _names(labels: Labels) -> list[str]:
    return [name for name, _ in labels]


def _values(labels: Labels) -> list[str]:
    return [value for _, value in labels]
