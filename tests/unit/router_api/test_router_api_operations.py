"""What the standalone router answers, whatever the transport."""

from __future__ import annotations

import pytest
from api_rig import BLOCK_SIZE, EXPIRY_S, ApiRig, api_rig, worker

from kelp.core.config import RoutingConfig
from kelp.core.errors import CapacityError, InvalidRequest, NotFound
from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.core.kv_events import BlocksStored
from kelp.core.types import Tier
from kelp.router.index.sharing import shared_slot

PROMPT = list(range(5 * BLOCK_SIZE))


@pytest.fixture
def rig() -> ApiRig:
    rig = api_rig()
    rig.register(worker("one"), worker("two"))
    return rig


def num_requests(rig: ApiRig) -> dict[str, int]:
    return {view["worker_id"]: view["num_requests"] for view in rig.call("workers")["workers"]}


def test_a_prompt_goes_to_the_worker_that_has_its_blocks(rig: ApiRig) -> None:
    hashes = tuple(sequence_hashes(PROMPT, BLOCK_SIZE, seed_hash("m")))
    slot = rig.table.slot(worker("two").key)
    assert slot is not None
    rig.index.apply(slot, BlocksStored(hashes, None))
    for number in range(8):
        assert rig.call("select", request_id=f"r{number}", token_ids=PROMPT)["decode"]["model_name"] == "two"
    names = [hash.hex() for hash in hashes]
    by_hash = rig.call("select", request_id="h", block_hashes=names, num_prompt_tokens=len(PROMPT))
    assert by_hash["decode"]["model_name"] == "two"


def test_another_salt_finds_nothing_of_it(rig: ApiRig) -> None:
    hashes = tuple(sequence_hashes(PROMPT, BLOCK_SIZE, seed_hash("m")))
    slot = rig.table.slot(worker("two").key)
    assert slot is not None
    rig.index.apply(slot, BlocksStored(hashes, None))
    rig.call("select", request_id="salted", token_ids=PROMPT, cache_salt="tenant")
    candidates = rig.call("explain", request_id="salted")["choices"][0]["candidates"]
    assert [max(candidate["overlap_blocks"]) for candidate in candidates] == [0, 0]


def test_a_reserved_request_counts_until_it_is_freed(rig: ApiRig) -> None:
    chosen = rig.call("select", request_id="r", token_ids=PROMPT, reserve=True)
    assert chosen["is_reserved"]
    assert num_requests(rig)[chosen["decode"]["worker_id"]] == 1
    assert rig.call("commit", request_id="r") == {"is_known": True}
    rig.call("first_token", request_id="r", num_cached_tokens=0, prefill_s=0.1)
    rig.call("progress", request_id="r", num_tokens=3)
    rig.call("free", request_id="r", num_output_tokens=4, decode_s=0.2)
    assert set(num_requests(rig).values()) == {0}
    assert rig.call("explain", request_id="r")["outcome"]["num_output_tokens"] == 4


def test_select_alone_counts_nothing_and_can_be_reserved_later(rig: ApiRig) -> None:
    chosen = rig.call("select", request_id="r", token_ids=PROMPT)
    assert not chosen["is_reserved"]
    assert set(num_requests(rig).values()) == {0}
    rig.call("reserve", request_id="r")
    assert num_requests(rig)[chosen["decode"]["worker_id"]] == 1
    with pytest.raises(NotFound, match="select again"):
        rig.call("reserve", request_id="r")


def test_other_routers_hear_of_a_reservation_before_its_caller_has_sent_it(rig: ApiRig) -> None:
    rig.call("select", request_id="r", token_ids=PROMPT)
    assert rig.told.snapshot().loads == ()
    rig.call("reserve", request_id="r")
    assert [load.request_id for load in rig.told.snapshot().loads] == ["r"]


def test_a_selection_cannot_be_reserved_once_it_has_lapsed(rig: ApiRig) -> None:
    rig.call("select", request_id="r", token_ids=PROMPT)
    rig.clock.advance(121.0)
    with pytest.raises(NotFound, match="request_id"):
        rig.call("reserve", request_id="r")


def test_a_reservation_that_nobody_commits_lapses(rig: ApiRig) -> None:
    rig.call("select", request_id="r", token_ids=PROMPT, reserve=True)
    rig.clock.advance(RoutingConfig().reservation_ttl_s)
    rig.register(worker("one"), worker("two"))
    assert set(num_requests(rig).values()) == {0}
    assert rig.call("commit", request_id="r") == {"is_known": False}


def test_a_request_counts_as_long_as_tokens_flow_and_no_longer(rig: ApiRig) -> None:
    rig.call("select", request_id="r", token_ids=PROMPT, reserve=True)
    rig.call("commit", request_id="r")
    lease_s = RoutingConfig().lease_ttl_s
    for _ in range(3):
        rig.clock.advance(lease_s - 1)
        assert rig.call("progress", request_id="r", num_tokens=1) == {"is_known": True}
    assert sum(num_requests(rig).values()) == 1
    rig.clock.advance(lease_s)
    assert rig.call("progress", request_id="r", num_tokens=1) == {"is_known": False}
    assert sum(num_requests(rig).values()) == 0


def test_simultaneous_requests_that_reserve_spread_over_the_workers(rig: ApiRig) -> None:
    for number in range(8):
        prompt = list(range(100 * number, 100 * number + 5 * BLOCK_SIZE))
        rig.call("select", request_id=f"r{number}", token_ids=prompt, reserve=True)
    assert set(num_requests(rig).values()) == {4}


def test_a_worker_that_stops_registering_expires(rig: ApiRig) -> None:
    rig.clock.advance(EXPIRY_S - 1)
    rig.register(worker("two"))
    rig.clock.advance(2.0)
    rig.register(worker("two"))
    assert set(num_requests(rig)) == {"host:1/two"}


def test_a_withdrawn_worker_is_gone_at_once(rig: ApiRig) -> None:
    rig.call("withdraw", worker_id="host:1/one", epoch="epoch of one")
    assert set(num_requests(rig)) == {"host:1/two"}
    assert not rig.call("withdraw", worker_id="host:1/one", epoch="epoch of one")["is_known"]


MANAGER = {
    "manager_id": "host:1/kv_block_manager",
    "epoch": "1",
    "host": "here",
    "endpoint": "host:1",
    "model_name": "kv_block_manager",
}


def test_block_managers_register_expire_and_leave_like_workers(rig: ApiRig) -> None:
    rig.register(worker("three", kv_manager_id=MANAGER["manager_id"]))
    views = rig.call("workers")
    assert {view["worker_id"]: view["kv_manager_id"] for view in views["workers"]}["host:1/three"]
    assert views["managers"] == []
    rig.call("register_manager", manager=MANAGER)
    (view,) = rig.call("workers")["managers"]
    assert (view["manager_id"], view["epoch"], view["host"]) == ("host:1/kv_block_manager", "1", "here")
    rig.clock.advance(EXPIRY_S)
    assert rig.call("workers")["managers"] == []
    rig.call("register_manager", manager=MANAGER)
    leaving = {"manager_id": MANAGER["manager_id"], "epoch": MANAGER["epoch"]}
    assert rig.call("withdraw_manager", **leaving) == {"is_known": True}
    assert rig.call("withdraw_manager", **leaving) == {"is_known": False}


def test_what_lies_below_the_chosen_worker_is_told_and_what_came_of_it_explained(rig: ApiRig) -> None:
    hashes = tuple(sequence_hashes(PROMPT, BLOCK_SIZE, seed_hash("m")))
    slot = rig.table.slot(worker("two").key)
    assert slot is not None
    rig.index.share(slot, shared_slot(0))
    rig.index.apply(shared_slot(0), BlocksStored(hashes, None, Tier.HOST))
    assert rig.call("select", request_id="r", token_ids=PROMPT)["known_blocks"] is None
    rig.selector.knows_all_of = lambda _: True
    chosen = rig.call("select", request_id="s", token_ids=PROMPT, reserve=True)
    assert (chosen["decode"]["model_name"], chosen["known_blocks"]) == ("two", 5)
    rig.call("first_token", request_id="s", onboarded_blocks=[0, 4], onboard_s=0.5)
    explanation = rig.call("explain", request_id="s")
    overlaps = {each["worker_id"]: each["overlap_blocks"] for each in explanation["choices"][0]["candidates"]}
    assert overlaps == {"host:1/one": [0, 0, 0, 0], "host:1/two": [0, 5, 5, 5]}
    assert explanation["predicted_onboarded_blocks"] == [0, 5, 0, 0]
    assert (explanation["outcome"]["onboarded_blocks"], explanation["outcome"]["onboard_s"]) == ([0, 4], 0.5)


def test_without_workers_the_answer_is_overloaded() -> None:
    with pytest.raises(CapacityError, match="no decode worker"):
        api_rig().call("select", request_id="r", token_ids=PROMPT)


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"request_id": "r"}, "token_ids"),
        ({"request_id": "r", "token_ids": [1], "num_prompt_tokens": 1}, "token_ids"),
        ({"request_id": "r", "token_ids": [1], "block_hashes": ["0" * 32]}, "block_hashes"),
        ({"request_id": "r", "token_ids": [-1]}, "token_ids.0"),
        ({"request_id": "r", "token_ids": [1], "max_tokens": 0}, "max_tokens"),
        ({"request_id": "r", "token_ids": [1], "colour": "red"}, "colour"),
        ({"token_ids": [1]}, "request_id"),
    ],
)
def test_a_malformed_document_is_refused_by_naming_the_field(
    rig: ApiRig, document: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequest, match=field.replace(".", r"\.")):
        rig.call("select", **document)


def test_workers_of_two_models_need_a_model_id(rig: ApiRig) -> None:
    rig.register(worker("other", layout=LAYOUT_OF_ANOTHER_MODEL))
    with pytest.raises(InvalidRequest, match="model_id"):
        rig.call("select", request_id="r", token_ids=PROMPT)
    for number in range(6):
        chosen = rig.call("select", request_id=f"r{number}", token_ids=PROMPT, model_id="m", reserve=True)
        assert chosen["decode"]["model_name"] in ("one", "two")


def test_an_unknown_operation_and_an_unknown_request_are_not_found(rig: ApiRig) -> None:
    with pytest.raises(NotFound, match="there are: select"):
        rig.operations.call("guess", b"{}")
    with pytest.raises(NotFound, match="request_id"):
        rig.call("explain", request_id="never")


LAYOUT_OF_ANOTHER_MODEL = worker("x").layout.model_copy(update={"model_id": "n"})


@pytest.mark.parametrize("operation", ["select", "explain", "free"])
@pytest.mark.parametrize("request_id", ["\0other|r", "mine\x1f-1", "a\x7fb"])
def test_a_name_with_the_marks_of_routers_own_names_is_refused(operation: str, request_id: str) -> None:
    rig = api_rig()
    rig.register(worker("a"))
    extra = {"num_prompt_tokens": 4} if operation == "select" else {}
    with pytest.raises(InvalidRequest, match="request_id"):
        rig.call(operation, request_id=request_id, **extra)


def test_what_callers_forget_is_freed_though_nobody_calls_any_more(rig: ApiRig) -> None:
    rig.call("select", request_id="reserved", token_ids=PROMPT, reserve=True)
    rig.call("select", request_id="sent", token_ids=PROMPT, reserve=True)
    rig.call("commit", request_id="sent")
    rig.clock.advance(RoutingConfig().reservation_ttl_s)
    rig.operations.sweep()
    assert rig.selector.load.active.sum() == 1
    assert [load.request_id for load in rig.told.snapshot().loads] == ["sent"]
    rig.clock.advance(RoutingConfig().lease_ttl_s)
    rig.operations.sweep()
    assert not rig.selector.load.active.any()
    assert rig.told.snapshot().loads == (), "nor do other routers count it"


def test_a_selection_that_nobody_reserves_is_forgotten_in_time(rig: ApiRig) -> None:
    rig.call("select", request_id="r", token_ids=PROMPT)
    rig.clock.advance(119.0)
    rig.operations.sweep()
    assert rig.call("reserve", request_id="r")["is_known"]
    rig.call("select", request_id="s", token_ids=PROMPT)
    rig.clock.advance(120.0)
    rig.operations.sweep()
    with pytest.raises(NotFound):
        rig.call("reserve", request_id="s")


def test_selections_that_wait_keep_neither_candidates_nor_more_blocks_than_allowed(
    rig: ApiRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kelp.router.api.reservations._MAX_SELECTED_BLOCKS", 12)
    for name in ("first", "second", "second", "third"):
        rig.call("select", request_id=name, token_ids=PROMPT)
    waiting = rig.reservations._selected
    assert list(waiting) == ["second", "third"], "five blocks each"
    assert all(held.decision.way is not None and not held.decision.way.choices for held in waiting.values())
    assert rig.call("reserve", request_id="second")["is_known"]
    rig.call("select", request_id="fourth", token_ids=PROMPT)
    assert list(waiting) == ["third", "fourth"]
