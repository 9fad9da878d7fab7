"""Who may serve a request: roles, states, pins, tags, workers to avoid, sessions."""

from __future__ import annotations

import pytest

from kelp.core.errors import CapacityError
from kelp.core.types import Role, WorkerState
from kelp.registry.base import WorkerRecord
from support.selector_rig import Rig, worker

ZONES = [worker("a", tags={"zone": "east"}), worker("b", tags={"zone": "west"})]


def _ids(rig: Rig, count: int = 8, **changes: object) -> set[str]:
    return {rig.place(rig.request(**changes)).decode.worker_id for _ in range(count)}


def test_without_workers_the_request_is_refused() -> None:
    with pytest.raises(CapacityError, match="no decode worker is ready"):
        Rig([]).place()


@pytest.mark.parametrize("state", [WorkerState.STARTING, WorkerState.DRAINING, WorkerState.GONE])
def test_only_ready_workers_are_chosen(state: WorkerState) -> None:
    assert _ids(Rig([worker("a", state=state), worker("b")])) == {"b"}


def test_a_worker_that_becomes_ready_is_chosen() -> None:
    rig = Rig([worker("a", state=WorkerState.STARTING)])
    rig.selector.set_workers([worker("a")])
    assert rig.place().decode.worker_id == "a"


def test_a_required_tag_excludes_workers_without_it() -> None:
    assert _ids(Rig(ZONES), required_tags={"zone": "west"}) == {"b"}


def test_a_tag_that_nobody_has_is_named_in_the_refusal() -> None:
    with pytest.raises(CapacityError, match="zone=north"):
        Rig(ZONES).place(Rig(ZONES).request(required_tags={"zone": "north"}))


def test_a_preferred_tag_decides_between_equals_but_not_against_load() -> None:
    rig = Rig(ZONES, policy="dynamo")
    assert rig.place(rig.request(preferred_tags={"zone": "west"})).decode.worker_id == "b"
    for _ in range(8):
        rig.place(rig.request(pinned_worker="b"))
    assert rig.place(rig.request(preferred_tags={"zone": "west"})).decode.worker_id == "a"


@pytest.mark.parametrize("pin", ["b", "model_b"])
def test_a_pin_names_a_worker_or_its_model(pin: str) -> None:
    assert _ids(Rig([worker("a"), worker("b")]), pinned_worker=pin) == {"b"}


def test_an_unknown_pin_is_refused_by_name() -> None:
    rig = Rig([worker("a")])
    with pytest.raises(CapacityError, match="'nobody'"):
        rig.place(rig.request(pinned_worker="nobody"))


def test_a_pinned_prefill_worker_prefills_and_any_worker_decodes() -> None:
    rig = Rig([worker("p", Role.PREFILL), worker("q", Role.PREFILL), worker("d", Role.DECODE)])
    assert rig.place(rig.request(pinned_worker="q")).worker_ids == ("q", "d")


def test_workers_to_avoid_serve_only_if_nobody_else_is_left() -> None:
    rig = Rig([worker("a"), worker("b")])
    avoid = frozenset({("a", "1")})
    assert {rig.selector.select(rig.request(), avoid).decode.worker_id for _ in range(8)} == {"b"}
    everybody = avoid | {("b", "1")}
    assert rig.selector.select(rig.request(), everybody).decode.worker_id in ("a", "b")


def _busy_session_rig(affinity: str) -> tuple[Rig, WorkerRecord]:
    rig = Rig([worker("a"), worker("b")], policy="least-loaded", session_affinity=affinity, session_ttl_s=60)
    first = rig.run(rig.request(session_id="s")).decode
    return rig, first


def test_a_session_returns_to_its_worker() -> None:
    rig, first = _busy_session_rig("prefer")
    assert {rig.run(rig.request(session_id="s")).decode.worker_id for _ in range(6)} == {first.worker_id}


def test_a_preferring_session_leaves_a_much_busier_worker_and_a_sticking_one_does_not() -> None:
    chosen = {}
    for affinity in ("prefer", "stick", "off"):
        rig, first = _busy_session_rig(affinity)
        for _ in range(6):
            rig.place(rig.request(pinned_worker=first.worker_id))
        chosen[affinity] = rig.place(rig.request(session_id="s")).decode.worker_id == first.worker_id
    assert chosen == {"prefer": False, "stick": True, "off": False}


def test_a_session_is_forgotten_after_its_time_to_live() -> None:
    rig, first = _busy_session_rig("stick")
    rig.place(rig.request(pinned_worker=first.worker_id))
    rig.clock.advance(61)
    assert rig.place(rig.request(session_id="s")).decode.worker_id != first.worker_id
