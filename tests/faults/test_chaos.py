"""The chaos harness itself, on a small fleet of mock workers: a seeded quarter of a minute of faults."""

from __future__ import annotations

from pathlib import Path

from fault_scenes import require_server

from kelp.chaos.faults import FaultKind, Layout
from kelp.chaos.fleet_spec import FleetSpec, quick_settings
from kelp.chaos.runner import RunSpec, run_served
from kelp.chaos.schedule import ScheduleSpec

KINDS = (
    FaultKind.WORKER_PAUSED,
    FaultKind.REGISTRY_GONE,
    FaultKind.CLIENT_LEFT,
    FaultKind.DEADLINE_PASSED,
    FaultKind.BAD_INPUT,
)
"""Those that a machine of any speed survives without a failed request; `make bench SUITE=resilience` does them all."""


def test_a_seeded_run_of_faults_costs_no_token_and_leaves_nothing_behind(tmp_path: Path) -> None:
    require_server()
    settings = {**quick_settings("mock"), "registry.expiry_s": "10"}
    fleet = FleetSpec(Layout.COMPACT, num_prefill=1, num_decode=1, settings=settings)
    schedule = ScheduleSpec(11, 8.0, 0.6, KINDS, fleet.prefill_workers, fleet.decode_workers)
    spec = RunSpec(schedule, num_users=3, pool_size=40, deadline_s=120.0)
    report = run_served(spec, fleet, tmp_path, {"seed": 11}, lambda _: None)
    assert report.is_clean, report.to_json()
    assert report.tally.num_completed > 0
    assert {done.fault.kind for done in report.faults if done.is_done} == set(KINDS), report.to_json()
