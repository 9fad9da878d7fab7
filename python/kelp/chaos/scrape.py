"""Counters and gauges of a fleet's metrics pages, summed over servers and over restarts that set them back to zero."""

from __future__ import annotations

import contextlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 2.0


def read_page(url: str) -> dict[str, float]:
    """Sums over the labels of every sample, by name; nothing of a server that does not answer."""
    totals: dict[str, float] = {}
    with contextlib.suppress(urllib.error.URLError, OSError, http.client.HTTPException, ValueError):
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as page:
            text = page.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


@dataclass
class Increase:
    """How far a counter has gone up, whatever restarts have set it back."""

    total: float = 0.0
    _last: dict[str, float] = field(default_factory=dict)

    def see(self, source: str, page: Mapping[str, float], name: str) -> None:
        """One more look at a source; a page without the counter says nothing."""
        value = page.get(name)
        if value is None:
            return
        before = self._last.get(source, 0.0)
        self.total += value - before if value >= before else value
        self._last[source] = value
