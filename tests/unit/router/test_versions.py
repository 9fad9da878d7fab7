"""Versions of a model side by side: a request belongs to one of them, by share, session or pin."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from router_rig import LAYOUT, FakeWorkers, open_router, prefill_record, prepared, record
from router_scenes import STREAM, run, tokens

from kelp.core.errors import CapacityError, WorkerDied
from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.core.messages import SamplingParams
from kelp.core.metrics import Metrics
from kelp.core.request import LlmRequest, Prompt
from kelp.core.request_routing import RoutingWishes
from kelp.core.types import FinishReason, Role, WorkerState
from kelp.registry.base import TrafficRecord, WorkerRecord
from kelp.router.versions import Versions
from support.exchange import bytes_tensor

NEW = LAYOUT.model_copy(update={"model_id": "n"})
OLD = record("old", text_id="text")


def new(name: str, **changes: object) -> WorkerRecord:
    return record(name, **{"layout": NEW, "version": "v2", "text_id": "text", **changes})


def chosen(*records: WorkerRecord, name: str = "r", shares: dict[str, float] | None = None, **fields: Any) -> str:
    """The model that a request goes to."""
    workers = FakeWorkers(*records)
    if shares is not None:
        workers.traffic = [TrafficRecord(shares=shares)]
    versions = Versions("text", workers.records, lambda: next(iter(workers.traffic), None), Metrics())
    request = LlmRequest(Prompt(text="x"), SamplingParams(), **fields)
    return versions.choose(prepared(), request, name).message.model_id


def test_without_shares_a_router_serves_its_own_version() -> None:
    assert {chosen(OLD, new("n1"), name=str(number)) for number in range(20)} == {"m"}


def test_requests_are_spread_as_the_shares_say() -> None:
    counts = Counter(chosen(OLD, new("n1"), name=str(number), shares={"base": 3, "v2": 1}) for number in range(2000))
    assert 400 < counts["n"] < 600


def test_a_session_stays_with_its_version() -> None:
    fields = {"shares": {"base": 1, "v2": 1}}
    for session in ("anna", "berta", "carla"):
        assert len({chosen(OLD, new("n1"), name=str(n), session_id=session, **fields) for n in range(20)}) == 1


@pytest.mark.parametrize(
    "other",
    [
        new("n1", state=WorkerState.DRAINING),
        new("n1", role=Role.PREFILL),
        new("n1", text_id="another tokenizer"),
        new("n1", version="v3"),
    ],
    ids=["draining", "prefill alone", "other text", "other version"],
)
def test_a_version_that_cannot_serve_leaves_its_share_to_the_others(other: WorkerRecord) -> None:
    assert {chosen(OLD, other, name=str(number), shares={"base": 1, "v2": 9}) for number in range(20)} == {"m"}


def test_a_pinned_worker_decides_which_version_serves() -> None:
    assert chosen(OLD, new("n1"), wishes=RoutingWishes(worker="n1")) == "n"
    assert chosen(OLD, new("n1"), wishes=RoutingWishes(worker="old"), shares={"v2": 1}) == "m"


def test_a_request_with_an_adapter_stays_with_the_routers_own_version() -> None:
    assert chosen(OLD, new("n1"), lora_name="sql", shares={"v2": 1}) == "m"


def test_blocks_are_named_for_the_version_that_computes_them() -> None:
    workers = FakeWorkers(OLD, new("n1"))
    versions = Versions("text", workers.records, lambda: TrafficRecord(shares={"v2": 1}), Metrics())
    request = LlmRequest(Prompt(text="x"), SamplingParams(), cache_salt="salt")
    prompt = versions.choose(prepared(9), request, "r")
    seed = seed_hash("n", "", "salt")
    assert prompt.message.seed_hash_hex == seed.hex()
    assert prompt.block_hashes == list(sequence_hashes(prompt.input_ids, 4, seed)) and len(prompt.input_ids) == 9


def test_a_request_keeps_its_version_when_its_worker_dies() -> None:
    async def scene() -> None:
        async with open_router(OLD, new("n1"), new("n2")) as rig:
            rig.workers.traffic = [TrafficRecord(shares={"v2": 1})]
            exchange, request = rig.ask(**STREAM)
            stream = await rig.workers.stream(0)
            stream.say(*tokens("ab"))
            stream.fail(WorkerDied("gone"))
            second = await rig.workers.stream(1)
            assert {stream.address.model_name, second.address.model_name} == {"n1", "n2"}
            second.finish(FinishReason.LENGTH, *tokens("cd"))
            await request
            assert exchange.text == "abcd"
            assert rig.counters()["kelp_version_requests_total", (("version", "v2"),)] == 1

    run(scene)


def test_a_prompt_is_prefilled_by_the_version_that_decodes_it() -> None:
    async def scene() -> None:
        async with open_router(prefill_record(), OLD, new("p2", role=Role.PREFILL), new("n1")) as rig:
            rig.workers.traffic = [TrafficRecord(shares={"v2": 1})]
            _, request = rig.ask(**STREAM)
            prefill, decode = await rig.workers.stream(0), await rig.workers.stream(1)
            assert (prefill.address.model_name, decode.address.model_name) == ("p2", "n1")
            prefill.finish(FinishReason.STOP, *tokens("a"))
            await request

    run(scene)


def test_where_nobody_serves_its_own_version_any_more_a_request_is_refused_not_given_to_another_one() -> None:
    async def scene() -> None:
        async with open_router(new("n1"), absence_wait_s=0.0) as rig:
            _, request = rig.ask(text_input=bytes_tensor("x"))
            with pytest.raises(CapacityError, match="the model m"):
                await request

    run(scene)
