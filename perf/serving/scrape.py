"""What a server says of itself on Triton's metrics port: where the time of its requests went."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from kelp.core.metrics import PHASE, TTFT
from perf.suite import BenchError

_TIMEOUT_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Total:
    """A histogram's sum and count."""

    seconds: float = 0.0
    count: int = 0

    def since(self, before: Total) -> Total:
        """What was added."""
        return Total(self.seconds - before.seconds, self.count - before.count)

    @property
    def mean_s(self) -> float:
        """Mean of what was observed; 0 without any."""
        return self.seconds / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Time to first token and phases of all requests that have ended."""

    ttft: Total
    phases: dict[str, Total]

    def since(self, before: RequestTimes) -> RequestTimes:
        """What was added."""
        phases = {name: total.since(before.phases.get(name, Total())) for name, total in self.phases.items()}
        return RequestTimes(self.ttft.since(before.ttft), phases)


def parse_request_times(text: str) -> RequestTimes:
    """Read the histograms out of a Prometheus page; those that are not there yet are zero."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        if family.name not in (TTFT.name, PHASE.name):
            continue
        for sample in family.samples:
            key = (family.name, sample.labels.get("phase", ""))
            if sample.name.endswith("_sum"):
                seconds[key] += sample.value
            elif sample.name.endswith("_count"):
                counts[key] += sample.value
    totals = {key: Total(seconds[key], round(counts[key])) for key in counts}
    phases = {phase: total for (name, phase), total in totals.items() if name == PHASE.name}
    return RequestTimes(totals.get((TTFT.name, ""), Total()), phases)


def read_request_times(metrics_url: str) -> RequestTimes:
    """Scrape a server.

    Raises:
        BenchError: It does not answer.
    """
    try:
        with urllib.request.urlopen(metrics_url, timeout=_TIMEOUT_S) as page:
            return parse_request_times(page.read().decode())
    except (urllib.error.URLError, TimeoutError) as error:
        raise BenchError(f"{metrics_url}: {error}") from None


def wait_for_requests(metrics_url: str, before: RequestTimes, num_requests: int) -> RequestTimes:
    """What `num_requests` requests added since `before`.

    Models export about once a second, so the page is read until it has caught up; after some seconds what is there
    is returned, and the counts say how much is missing.
    """
    deadline_s = time.monotonic() + _TIMEOUT_S
    while True:
        added = read_request_times(metrics_url).since(before)
        if added.ttft.count >= num_requests or time.monotonic() > deadline_s:
            return added
        time.sleep(_POLL_S)
