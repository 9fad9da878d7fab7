"""When which fault comes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from kelp.chaos.faults import OF_STORE, PHASES, FaultKind, Layout, Phase, kinds_for
from kelp.chaos.schedule import ScheduleSpec, make_schedule, spare_faults
from kelp.core.errors import ConfigError

SPEC = ScheduleSpec(
    seed=5,
    duration_s=600.0,
    rate_per_s=0.2,
    kinds=tuple(FaultKind),
    prefill_workers=("prefill",),
    decode_workers=("decode", "decode_1"),
)


def test_the_same_seed_gives_the_same_schedule_and_another_one_another() -> None:
    assert make_schedule(SPEC) == make_schedule(SPEC)
    assert make_schedule(SPEC) != make_schedule(replace(SPEC, seed=6))


def test_a_fault_comes_at_least_once_in_the_time_that_the_rate_says() -> None:
    times = [0.0, *(fault.at_s for fault in make_schedule(SPEC)), SPEC.duration_s]
    assert max(later - earlier for earlier, later in zip(times, times[1:], strict=False)) <= 5.0


def test_every_kind_comes_in_every_turn_and_every_phase_of_it_in_turn() -> None:
    faults = make_schedule(SPEC)
    num_kinds = len(FaultKind)
    assert {fault.kind for fault in faults[:num_kinds]} == set(FaultKind)
    for kind, phases in PHASES.items():
        seen = [fault.phase for fault in faults if fault.kind is kind]
        assert set(seen[: len(phases)]) == set(phases)


def test_a_fault_in_a_phase_hits_a_worker_that_has_this_phase() -> None:
    for fault in make_schedule(replace(SPEC, duration_s=5000.0, kinds=(FaultKind.WORKER_KILLED,))):
        if fault.phase in (Phase.PREFILLING, Phase.TRANSFERRING):
            assert fault.target == "prefill"
        elif fault.phase is Phase.DECODING:
            assert fault.target in SPEC.decode_workers
        else:
            assert fault.target in (*SPEC.prefill_workers, *SPEC.decode_workers)


def test_a_worker_is_stopped_for_less_than_a_second() -> None:
    pauses = make_schedule(replace(SPEC, kinds=(FaultKind.WORKER_PAUSED,)))
    assert pauses and all(0 < fault.lasts_s < 1 for fault in pauses)


def test_the_compact_layout_has_no_server_to_kill_that_is_a_workers_own() -> None:
    assert FaultKind.SERVER_KILLED not in kinds_for(Layout.COMPACT)
    assert FaultKind.FRONT_KILLED not in kinds_for(Layout.COMPACT)
    assert FaultKind.SERVER_TERMINATED not in kinds_for(Layout.COMPACT)
    assert set(kinds_for(Layout.ISOLATED)) == set(FaultKind) - OF_STORE
    assert set(kinds_for(Layout.ISOLATED, has_store=True)) == set(FaultKind)


@pytest.mark.parametrize(("field", "value"), [("rate_per_s", 0.0), ("rate_per_s", -1.0), ("kinds", ())])
def test_a_schedule_that_makes_no_sense_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field.split("_")[0]):
        make_schedule(replace(SPEC, **{field: value}))  # type: ignore[arg-type]


def test_spare_faults_come_without_end_and_are_kinds_that_the_run_plays() -> None:
    spare = list(itertools.islice(spare_faults(SPEC), 30))
    assert len(spare) == 30
    assert spare == list(itertools.islice(spare_faults(SPEC), 30))
    assert not list(spare_faults(replace(SPEC, kinds=(FaultKind.WORKER_KILLED,))))
    paused = [fault for fault in spare if fault.kind is FaultKind.WORKER_PAUSED]
    assert all(fault.lasts_s < 1 and fault.target in (*SPEC.prefill_workers, *SPEC.decode_workers) for fault in paused)
