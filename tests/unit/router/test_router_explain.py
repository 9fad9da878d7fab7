"""Decisions are found by the id that the client gave its request."""

from __future__ import annotations

import json

import numpy as np
import pytest
from router_rig import FakeExchange, RouterRig, open_router, record
from router_scenes import run, tokens

from kelp.core.errors import InvalidRequest, NotFound
from kelp.core.types import FinishReason
from kelp.router.request_ids import RequestIds, meant_by, sequence_name, shown
from support.exchange import bytes_tensor


def exchange(request_id: str = "", **parameters: object) -> FakeExchange:
    return FakeExchange({"text_input": bytes_tensor("hello")}, parameters, request_id)


async def explained(rig: RouterRig, request_id: str) -> dict[str, object]:
    asked = FakeExchange({}, {"kelp_explain": request_id})
    await rig.service.handle(asked)
    assert asked.is_over
    return dict(json.loads(asked.responses[0]["text_output"][0]))


def test_a_request_is_explained_by_its_id_while_it_runs_and_after() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            served = rig.serve(exchange("mine"))
            stream = await rig.workers.stream(0)
            assert (await explained(rig, "mine"))["outcome"]["state"] == "committed"
            stream.finish(FinishReason.LENGTH, *tokens("ab"))
            await served
            document = await explained(rig, "mine")
            assert document["outcome"]["state"] == "completed"
            assert document["choices"][0]["chosen"] == f"{stream.address.endpoint}/{stream.address.model_name}"

    run(scene)


def test_every_sequence_has_a_decision_of_its_own() -> None:
    async def scene() -> None:
        async with open_router(record("d1")) as rig:
            asked = FakeExchange(
                {"text_input": bytes_tensor("hello"), "num_return_sequences": np.array([2], np.int32)}, {}, "two"
            )
            served = rig.serve(asked)
            (await rig.workers.stream(0)).finish(FinishReason.LENGTH, *tokens("a"))
            (await rig.workers.stream(1)).finish(FinishReason.LENGTH, *tokens("b"))
            await served
            for name in ("two", "two-1"):
                assert (await explained(rig, name))["outcome"]["state"] == "completed"

    run(scene)


def test_a_failed_attempt_is_followed_by_a_second_decision_under_the_same_id() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            served = rig.serve(exchange("mine"))
            (await rig.workers.stream(0)).end()
            (await rig.workers.stream(1)).finish(FinishReason.LENGTH, *tokens("a"))
            await served
            document = await explained(rig, "mine")
            assert (document["attempt"], document["outcome"]["state"]) == (2, "completed")

    run(scene)


def test_an_unknown_id_is_not_found_and_an_empty_one_refused() -> None:
    async def scene() -> None:
        async with open_router(record("d1")) as rig:
            with pytest.raises(NotFound, match="'nobody'"):
                await explained(rig, "nobody")
            with pytest.raises(InvalidRequest):
                await explained(rig, "")

    run(scene)


def test_wishes_reach_the_decision() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            for number in range(3):
                served = rig.serve(exchange(kelp_worker="d2"))
                stream = await rig.workers.stream(number)
                assert stream.address.model_name == "d2"
                stream.finish(FinishReason.LENGTH, *tokens("a"))
                await served

    run(scene)


def test_of_two_live_requests_with_one_id_each_has_a_name_of_its_own() -> None:
    ids = RequestIds()
    with ids.named("mine") as first, ids.named("mine") as second, ids.named("") as nameless:
        assert first == "mine"
        assert shown(second).startswith("mine.")
        assert second in meant_by(shown(second))
        assert nameless not in ("", first, second)
        with ids.named(shown(second)) as imitation:
            assert imitation != second
        assert sequence_name(second, 3) in meant_by(shown(sequence_name(second, 3)))
    with ids.named("mine") as again, ids.named("x" * 1000) as long:
        assert again == "mine"
        assert len(long) == 256


@pytest.mark.parametrize("client_id", ["two-1", sequence_name("two", 1), "two\0-1", "two.00000000-1", "two\ud800-1"])
def test_no_id_of_a_client_is_the_name_of_another_requests_sequence(client_id: str) -> None:
    ids = RequestIds()
    with ids.named("two") as two, ids.named(client_id) as other, ids.named("two") as twin:
        names = {sequence_name(name, index) for name in (two, other, twin) for index in (1, 2)}
        assert len(names | {two, other, twin}) == 9
        assert all(name.encode() for name in names)


def test_a_request_that_is_named_like_a_sequence_of_another_has_its_own_decision() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            own = rig.serve(exchange("two-1", kelp_worker="d2"))
            await rig.workers.stream(0)
            asked = FakeExchange(
                {"text_input": bytes_tensor("hello"), "num_return_sequences": np.array([2], np.int32)},
                {"kelp_worker": "d1"},
                "two",
            )
            both = rig.serve(asked)
            (await rig.workers.stream(1)).finish(FinishReason.LENGTH, *tokens("a"))
            (await rig.workers.stream(2)).finish(FinishReason.LENGTH, *tokens("b"))
            await both
            document = await explained(rig, "two-1")
            assert (document["request_id"], document["outcome"]["state"]) == ("two-1", "committed")
            assert rig.num_active == 1
            (await rig.workers.stream(0)).finish(FinishReason.LENGTH, *tokens("c"))
            await own

    run(scene)
