"""Numbers are added under a lock and taken as differences."""

from __future__ import annotations

import threading

import pytest

from kelp.core.metrics import FAMILIES, LEASES, OUTPUT_TOKENS, REQUESTS, TTFT, MetricFamily, Metrics


def test_counters_are_taken_as_differences() -> None:
    metrics = Metrics()
    metrics.add(REQUESTS, outcome="ok")
    metrics.add(REQUESTS, outcome="ok")
    metrics.add(REQUESTS, outcome="cancelled")
    assert metrics.take()[0] == {(REQUESTS, (("outcome", "ok"),)): 2, (REQUESTS, (("outcome", "cancelled"),)): 1}
    metrics.add(REQUESTS, 3, outcome="ok")
    assert metrics.take()[0] == {(REQUESTS, (("outcome", "ok"),)): 3}
    assert metrics.take()[0] == {}


def test_a_gauge_keeps_its_last_value() -> None:
    metrics = Metrics()
    metrics.set(LEASES, 3, worker="prefill")
    metrics.set(LEASES, 1, worker="prefill")
    expected = {(LEASES, (("worker", "prefill"),)): 1}
    assert metrics.take()[1] == expected
    assert metrics.take()[1] == expected


def test_every_observation_is_handed_over_once() -> None:
    metrics = Metrics()
    metrics.observe(TTFT, 0.5)
    metrics.observe(TTFT, 0.25)
    assert metrics.take()[2] == {(TTFT, ()): [0.5, 0.25]}
    assert metrics.take()[2] == {}


def test_the_order_of_labels_does_not_matter() -> None:
    metrics = Metrics()
    metrics.add(REQUESTS, a="1", b="2")
    metrics.add(REQUESTS, b="2", a="1")
    assert list(metrics.take()[0].values()) == [2]


def test_no_increase_is_lost_between_threads() -> None:
    metrics, taken = Metrics(), 0.0
    adders = [threading.Thread(target=lambda: [metrics.add(OUTPUT_TOKENS) for _ in range(2000)]) for _ in range(4)]
    for adder in adders:
        adder.start()
    while any(adder.is_alive() for adder in adders):
        taken += sum(metrics.take()[0].values())
    taken += sum(metrics.take()[0].values())
    assert taken == 8000


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_named_after_its_unit_and_kind(family: MetricFamily) -> None:
    assert family.name.startswith("kelp_")
    assert family.name.endswith("_total") == (family.kind == "counter")
    assert bool(family.buckets) == (family.kind == "histogram")
    assert list(family.buckets) == sorted(set(family.buckets))


def test_family_names_are_unique() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
