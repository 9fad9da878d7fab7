"""Where requests go: load, avoided workers, layouts that do not fit, and the disaggregation setting."""

from __future__ import annotations

import pytest
from router_rig import LAYOUT, FakeWorkers, prefill_record, record

from kelp.core.errors import CapacityError
from kelp.core.types import Role
from kelp.registry.base import WorkerRecord
from kelp.router.placement import Placement, Placer, key_of
from kelp.router.policies import Candidate, LeastLoaded, RoundRobin, RoutingRequest, make_policy

REQUEST = RoutingRequest(num_prompt_tokens=4, block_hashes=())
OTHER_LAYOUT = LAYOUT.model_copy(update={"dtype": "bfloat16"})


def placer(*records: WorkerRecord, disaggregation: str = "auto") -> Placer:
    return Placer(FakeWorkers(*records), LeastLoaded, disaggregation)


def names(placement: Placement) -> tuple[str | None, str]:
    return placement.prefill and placement.prefill.model_name, placement.decode.model_name


def test_a_prefill_worker_is_used_where_one_is_ready() -> None:
    assert names(placer(prefill_record(), record("decode")).place(REQUEST)) == ("prefill", "decode")


def test_without_a_prefill_worker_auto_serves_aggregated() -> None:
    assert names(placer(record("decode")).place(REQUEST)) == (None, "decode")


def test_always_refuses_without_a_prefill_worker() -> None:
    with pytest.raises(CapacityError, match="no prefill worker"):
        placer(record("decode"), disaggregation="always").place(REQUEST)


def test_never_ignores_prefill_workers() -> None:
    assert names(placer(prefill_record(), record("decode"), disaggregation="never").place(REQUEST)) == (None, "decode")


@pytest.mark.parametrize("disaggregation", ["auto", "always"])
def test_remote_prefill_that_failed_too_often_is_not_tried_again(disaggregation: str) -> None:
    chosen = placer(prefill_record(), record("decode"), disaggregation=disaggregation)
    assert names(chosen.place(REQUEST, allow_prefill=False)) == (None, "decode")


def test_a_prefill_worker_of_another_layout_is_not_used() -> None:
    misfit = prefill_record("misfit", layout=OTHER_LAYOUT)
    assert names(placer(misfit, prefill_record("fit"), record("decode")).place(REQUEST)) == ("fit", "decode")
    assert names(placer(misfit, record("decode")).place(REQUEST)) == (None, "decode")
    with pytest.raises(CapacityError, match="KV layout"):
        placer(misfit, record("decode"), disaggregation="always").place(REQUEST)


def test_pools_of_different_size_fit_each_other() -> None:
    small = prefill_record(layout=LAYOUT.model_copy(update={"num_blocks": 2}))
    assert names(placer(small, record("decode")).place(REQUEST)) == ("prefill", "decode")


def test_an_aggregated_worker_decodes_and_never_prefills_for_others() -> None:
    assert names(placer(record("both", Role.AGGREGATED)).place(REQUEST)) == (None, "both")


def test_a_prefill_worker_alone_serves_nobody() -> None:
    with pytest.raises(CapacityError, match="no decode worker is ready"):
        placer(prefill_record()).place(REQUEST)


def test_requests_in_flight_count_until_they_end() -> None:
    chosen = placer(record("d1"), record("d2"))
    first = chosen.place(REQUEST)
    with chosen.counting(first):
        assert chosen.place(REQUEST).decode != first.decode
        assert chosen.place(REQUEST).decode != first.decode
    assert {chosen.place(REQUEST).decode.model_name for _ in range(2)} == {"d1", "d2"}


def test_a_request_that_fails_counts_no_longer() -> None:
    chosen = placer(record("d1"), record("d2"))
    with pytest.raises(RuntimeError), chosen.counting(chosen.place(REQUEST)):
        raise RuntimeError
    assert {chosen.place(REQUEST).decode.model_name for _ in range(2)} == {"d1", "d2"}


def test_a_worker_that_just_failed_is_avoided() -> None:
    d1, d2 = record("d1"), record("d2")
    chosen = placer(d1, d2)
    assert {chosen.place(REQUEST, frozenset({key_of(d1)})).decode.model_name for _ in range(3)} == {"d2"}


def test_an_avoided_worker_is_better_than_none() -> None:
    only = record("decode")
    assert placer(only).place(REQUEST, frozenset({key_of(only)})).decode == only


def test_a_restarted_worker_is_not_avoided_for_what_its_predecessor_did() -> None:
    before, after = record("d1", epoch="before"), record("d1", epoch="after")
    chosen = placer(after, record("d2"))
    assert {chosen.place(REQUEST, frozenset({key_of(before)})).decode.model_name for _ in range(2)} == {"d1", "d2"}


def test_a_placement_names_its_workers_prefill_first() -> None:
    placement = placer(prefill_record(), record("decode")).place(REQUEST)
    assert placement.worker_ids == ("host:1/prefill", "host:1/decode")
    assert Placement(placement.decode, None).worker_ids == ("host:1/decode",)


def candidates(**loads: tuple[int, int, int]) -> list[Candidate]:
    """By name: requests of ours, and running and waiting ones that the worker reported."""
    return [
        Candidate(record(name, num_running=running, num_waiting=waiting), in_flight)
        for name, (in_flight, running, waiting) in loads.items()
    ]


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ({"a": (2, 0, 0), "b": (1, 0, 0)}, "b"),
        ({"a": (0, 1, 0), "b": (0, 0, 2)}, "a"),
        ({"a": (1, 3, 3), "b": (4, 0, 0)}, "b"),
        ({"a": (5, 5, 0), "b": (6, 0, 0)}, "a"),
    ],
    ids=["own requests", "reported requests", "other routers' requests", "own requests are not counted twice"],
)
def test_least_loaded_takes_the_worker_with_the_fewest_requests(
    loads: dict[str, tuple[int, int, int]], expected: str
) -> None:
    assert LeastLoaded().choose(candidates(**loads), REQUEST).record.model_name == expected


@pytest.mark.parametrize("policy", ["least-loaded", "round-robin"])
def test_equal_workers_take_turns(policy: str) -> None:
    equal = candidates(a=(0, 0, 0), b=(0, 0, 0), c=(0, 0, 0))
    chosen = make_policy(policy)
    assert sorted(chosen.choose(equal, REQUEST).record.model_name for _ in range(6)) == ["a", "a", "b", "b", "c", "c"]


def test_round_robin_ignores_load() -> None:
    uneven = candidates(a=(9, 9, 9), b=(0, 0, 0))
    chosen = RoundRobin()
    assert [chosen.choose(uneven, REQUEST).record.model_name for _ in range(3)] == ["a", "b", "a"]
