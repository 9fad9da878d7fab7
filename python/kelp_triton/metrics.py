"""Export of `kelp.core.metrics` on Triton's own metrics port, from one thread."""

from __future__ import annotations

import ctypes
import logging
import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from kelp.core.metrics import FAMILIES, Labels, MetricFamily, Metrics

_log = logging.getLogger(__name__)
_KINDS = {"counter": "COUNTER", "gauge": "GAUGE", "histogram": "HISTOGRAM"}


class MetricsExporter:
    """Flushes one process's metrics about once a second.

    Every pb_utils Metric is created and touched by this thread alone: two threads touching one crash the server.
    """

    def __init__(self, metrics: Metrics, period_s: float = 1.0) -> None:
        self._metrics = metrics
        self._period_s = period_s
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[MetricFamily, Labels], Any] = {}
        self._stopping = threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="kelp-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Flush once more and stop."""
        self._stopping.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._period_s):
                self._flush()
            self._flush()
        except pb_utils.TritonModelException as error:
            _log.warning("metrics are no longer exported: %s", error)
        for kept in (*self._families.values(), *self._series.values()):
            _make_immortal(kept)
        self._series.clear()
        self._families.clear()
        while not self._stopping.wait(self._period_s):
            self._metrics.take()

    def _flush(self) -> None:
        counters, gauges, observations = self._metrics.take()
        for key, value in counters.items():
            self._update(key, "increment", [value])
        for key, value in gauges.items():
            self._update(key, "set", [value])
        for key, values in observations.items():
            self._update(key, "observe", values)

    def _update(self, key: tuple[MetricFamily, Labels], action: str, values: list[float]) -> None:
        try:
            update = getattr(self._metric(key), action)
            for value in values:
                update(value)
        except pb_utils.TritonModelException:
            raise
        except Exception:
            # The thread's guard: one series that cannot be exported must not end the others.
            if not self._has_failed:
                _log.exception("%s is not exported, perhaps others; this is said once", key[0].name)
            self._has_failed = True

    def _metric(self, key: tuple[MetricFamily, Labels]) -> Any:
        if key not in self._series:
            family, labels = key
            options = {"buckets": list(family.buckets)} if family.buckets else {}
            self._series[key] = self._family(family).Metric(labels=dict(labels), **options)
        return self._series[key]

    def _family(self, family: MetricFamily) -> Any:
        assert family in FAMILIES
        if family.name not in self._families:
            self._families[family.name] = pb_utils.MetricFamily(
                name=family.name,
                description=family.help,
                kind=getattr(pb_utils.MetricFamily, _KINDS[family.kind]),
            )
        return self._families[family.name]


def _make_immortal(value: object) -> None:
    """Keep something from ever being destructed, at the interpreter's end neither.

    Triton (2.51) counts the users of a series for each MetricFamily object, not for each name: a Metric that goes with
    its model frees the series of another model, or of the same one's next incarnation, that has its name and labels,
    and the server's heap is broken. One that is left to the interpreter's end calls a stub that is gone by then.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
