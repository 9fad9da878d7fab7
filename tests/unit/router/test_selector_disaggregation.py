"""Per request: with a prefill worker or without one."""

from __future__ import annotations

import pytest

from kelp.core.errors import CapacityError
from kelp.core.types import Role
from kelp.registry.base import WorkerRecord
from kelp.router.decision.selector import FirstToken
from support.selector_rig import Rig, hashes, worker

FLEET = [worker("p", Role.PREFILL), worker("d", Role.DECODE)]


def _other_layout(name: str) -> WorkerRecord:
    layout = FLEET[0].layout.model_copy(update={"head_dim": 2})
    return worker(name, Role.PREFILL, layout=layout)


def test_before_anything_is_measured_auto_uses_a_prefill_worker() -> None:
    assert Rig(FLEET).place().worker_ids == ("p", "d")


def test_never_uses_none() -> None:
    assert Rig(FLEET, disaggregation="never").place().prefill is None


def test_a_request_whose_prefill_failed_too_often_uses_none_in_any_mode() -> None:
    for mode in ("auto", "always"):
        rig = Rig(FLEET, disaggregation=mode)
        assert rig.selector.select(rig.request(), allow_prefill=False).prefill is None


def test_auto_does_without_where_none_is_ready_and_always_refuses() -> None:
    alone = [worker("d", Role.DECODE)]
    assert Rig(alone).place().prefill is None
    with pytest.raises(CapacityError, match="no prefill worker is ready"):
        Rig(alone, disaggregation="always").place()


def test_a_prefill_worker_with_another_layout_does_not_fit() -> None:
    decision = Rig([_other_layout("p"), worker("d", Role.DECODE)]).place()
    assert decision.prefill is None
    assert Rig([_other_layout("o"), *FLEET]).place().worker_ids == ("p", "d")


def test_a_prompt_that_the_decode_worker_already_has_stays_there_once_costs_are_measured() -> None:
    rig = Rig(FLEET)
    rig.learn()
    names = hashes(*range(100))
    rig.index.blocks[1] = set(names)
    decision = rig.place(rig.request(1601, block_hashes=names))
    assert decision.worker_ids == ("d",)
    explanation = rig.selector.explain(decision.request.request_id)
    assert explanation is not None
    assert "predicted" in explanation.reason


def test_a_pinned_prefill_worker_is_used_whatever_is_predicted() -> None:
    rig = Rig(FLEET)
    rig.learn()
    names = hashes(*range(100))
    rig.index.blocks[1] = set(names)
    assert rig.place(rig.request(1601, block_hashes=names, pinned_worker="p")).worker_ids == ("p", "d")


def test_a_prompt_that_would_hold_up_many_sequences_goes_to_a_prefill_worker() -> None:
    rig = Rig(FLEET)
    rig.learn()
    for _ in range(30):
        rig.place(rig.request(1600))
    for number in range(21, 51):
        rig.selector.first_token(f"r{number}", FirstToken(0, 0.0, 0.1))
    assert rig.place(rig.request(16_000)).worker_ids == ("p", "d")


def test_always_uses_one_even_where_it_does_not_pay() -> None:
    rig = Rig(FLEET, disaggregation="always")
    rig.learn()
    names = hashes(*range(100))
    rig.index.blocks[1] = set(names)
    assert rig.place(rig.request(1601, block_hashes=names)).worker_ids == ("p", "d")


def test_handoffs_are_learned_from_what_requests_tell() -> None:
    rig = Rig(FLEET)
    rig.learn()
    before = rig.selector.rates.handoff_s(100)
    for _ in range(20):
        request = rig.request(1600)
        rig.place(request)
        rig.selector.transferred(request.request_id, 1.0)
    assert rig.selector.rates.handoff_s(100) > 2 * before


def test_a_burst_of_handed_over_prompts_spreads_over_decode_workers_before_any_of_them_generates() -> None:
    rig = Rig([worker("p", Role.PREFILL), worker("d", Role.DECODE)], disaggregation="always")
    rig.learn()
    rig.selector.set_workers([worker("p", Role.PREFILL), worker("d", Role.DECODE), worker("e", Role.DECODE)])
    places = [rig.place().decode.worker_id for _ in range(8)]
    assert min(places.count("d"), places.count("e")) >= 2
