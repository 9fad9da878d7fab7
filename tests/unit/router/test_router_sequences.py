"""Several sequences of one request: where each runs, with which seed, and how one ends without or with the others."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from router_rig import FakeStream, RouterRig, job, letters, open_router, prefill_record, record
from router_scenes import PAIR, STREAM, run, sent, tokens

from kelp.core.errors import CapacityError, DeadlineExceeded, InvalidRequest, RequestCancelled, WorkerLost
from kelp.core.messages import Finished, RequestUsage
from kelp.core.types import FinishReason, Role
from support.exchange import FakeExchange
from support.waiting import until


def sequences(count: int) -> dict[str, np.ndarray]:
    return {"num_return_sequences": np.array([count], dtype=np.int32)}


SEEDED = {"random_seed": np.array([2**64 - 1], dtype=np.uint64), "temperature": np.array([1.0], dtype=np.float32)}


def decode_id(stream: FakeStream) -> bytes:
    return f"host:1/{stream.address.model_name}".encode()


async def started(rig: RouterRig, count: int) -> list[FakeStream]:
    """All streams as soon as there are `count`; and that there are no more."""
    await rig.workers.stream(count - 1)
    assert len(rig.workers.streams) == count
    return rig.workers.streams


async def aggregated_trio(rig: RouterRig, **inputs: np.ndarray) -> tuple[FakeExchange, asyncio.Task[None]]:
    """A request for three sequences of which every one runs; sequence 0 has said `a`."""
    exchange, request = rig.ask(**STREAM, **sequences(3), **inputs)
    (await rig.workers.stream(0)).say(*tokens("a"))
    await started(rig, 3)
    return exchange, request


def test_the_others_start_when_the_first_token_shows_that_the_prompt_is_computed() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            exchange, request = rig.ask(**STREAM, **sequences(3))
            first = await rig.workers.stream(0)
            first.say()
            await until(lambda: first.is_read, "reading of the keep-alive")
            assert len(rig.workers.streams) == 1, "a keep-alive is no token"
            first.say(*tokens("a"))
            _, second, third = await started(rig, 3)
            assert second.address == third.address == first.address
            assert second.prompt == third.prompt == first.prompt
            assert [stream.command.role for stream in (first, second, third)] == [Role.AGGREGATED] * 3
            assert second.command.num_generated == third.command.num_generated == 0
            assert len({stream.command.request_id for stream in rig.workers.streams}) == 3
            for stream in (third, first, second):
                stream.finish(FinishReason.LENGTH)
            await request
            assert exchange.is_over
            await rig.all_is_returned()

    run(scene)


def test_behind_a_remote_prefill_the_others_run_on_the_decode_worker_alone() -> None:
    async def scene() -> None:
        async with open_router(prefill_record(), record("d1"), record("d2")) as rig:
            exchange, request = rig.ask(**sequences(2))
            prefill, decode = await rig.workers.stream(0), await rig.workers.stream(1)
            prefill.finish(None, *tokens("a"))
            decode.say(*tokens("b"))
            sibling = await rig.workers.stream(2)
            assert (sibling.address, sibling.command.role) == (decode.address, Role.AGGREGATED)
            assert sibling.command.rendezvous is None
            sibling.finish(FinishReason.LENGTH, *tokens("xy"))
            decode.finish(FinishReason.STOP)
            await request
            (response,) = exchange.responses
            assert list(response["text_output"]) == [b"ab", b"xy"]
            assert list(response["finish_reason"]) == [b"stop", b"length"]
            assert list(response["sequence_length"]) == [6, 6]
            assert list(response["worker_ids"]) == [prefill_record().worker_id.encode(), decode_id(decode)]
            await rig.all_is_returned()

    run(scene)


def test_each_sequence_has_the_seed_after_the_one_before_it() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            await aggregated_trio(rig, **SEEDED)
            seeds = [stream.command.sampling.seed for stream in rig.workers.streams]
            assert seeds == [2**64 - 1, 0, 1]

    run(scene)


def test_a_sibling_has_everything_of_its_job_but_the_seed_and_what_has_happened_to_it() -> None:
    first = job(generated=(1, 2), temperature=0.5, seed=7, bad_words_ids=((3,),))
    sibling = first.sibling(2)
    assert sibling.sampling == first.sampling.model_copy(update={"seed": 9})
    assert (sibling.prompt, sibling.deadline_s, sibling.arrival_ns) == (first.prompt, first.deadline_s, 1)
    assert (sibling.generated, sibling.request_id != first.request_id) == ([], True)


def test_streamed_sequences_interleave_and_end_one_by_one() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            exchange, request = await aggregated_trio(rig)
            first, second, third = rig.workers.streams
            for count, (stream, letter) in enumerate(((third, "k"), (second, "x"), (first, "b"), (third, "l")), 2):
                stream.say(*tokens(letter))
                await sent(exchange, count)
            first.finish(FinishReason.STOP)
            third.finish(FinishReason.LENGTH)
            second.finish(FinishReason.LENGTH, *tokens("y"))
            await request
            assert [response["sequence_index"][0] for response in exchange.responses[:5]] == [0, 2, 1, 0, 2]
            reasons = {
                int(response["sequence_index"][0]): response["finish_reason"][0]
                for response in exchange.responses
                if response["finish_reason"][0]
            }
            assert reasons == {0: b"stop", 1: b"length", 2: b"length"}
            assert list(exchange.responses[-1]["num_output_tokens"]) == [6]
            assert exchange.num_final == 1

    run(scene)


def test_the_summary_counts_blocks_and_tokens_of_all_sequences_and_the_prompt_once() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            exchange, request = rig.ask(**sequences(2))
            first = await rig.workers.stream(0)
            first.say(*tokens("ab"))
            sibling = await rig.workers.stream(1)
            for stream, letter, usage in (
                (first, "c", RequestUsage(cached_tokens=0, new_blocks=3, reused_blocks=0)),
                (sibling, "x", RequestUsage(cached_tokens=4, new_blocks=2, reused_blocks=1)),
            ):
                stream.say(*tokens(letter), event=Finished(finish_reason=FinishReason.LENGTH, usage=usage))
            await request
            (response,) = exchange.responses
            names = (
                "num_input_tokens", "num_output_tokens", "cached_tokens", "kv_cache_alloc_new_blocks",
                "kv_cache_reused_blocks", "kv_cache_alloc_total_blocks",
            )  # fmt: skip
            assert [int(response[name][0]) for name in names] == [4, 4, 0, 5, 1, 6]
            counted = {name: value for (name, _), value in rig.counters().items()}
            assert counted["kelp_output_tokens_total"] == counted["kelp_prompt_tokens_total"] == 4
            assert counted["kelp_requests_total"] == counted["kelp_responses_total"] == 1

    run(scene)


def test_a_sequence_that_ends_with_its_first_token_still_has_siblings() -> None:
    async def scene() -> None:
        async with open_router(*PAIR) as rig:
            exchange, request = rig.ask(**sequences(2))
            (await rig.workers.stream(0)).finish(FinishReason.STOP, *tokens("a"))
            sibling = await rig.workers.stream(2)
            assert (sibling.address.model_name, sibling.command.role) == ("decode", Role.AGGREGATED)
            sibling.finish(FinishReason.STOP, *tokens("b"))
            await request
            assert list(exchange.responses[0]["text_output"]) == [b"a", b"b"]
            await rig.all_is_returned()

    run(scene)


def test_a_first_sequence_without_any_token_does_not_hold_the_others_up() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            exchange, request = rig.ask(**sequences(2))
            (await rig.workers.stream(0)).finish(FinishReason.LENGTH)
            (await rig.workers.stream(1)).finish(FinishReason.LENGTH, *tokens("b"))
            await request
            assert list(exchange.responses[0]["text_output"]) == [b"", b"b"]

    run(scene)


@pytest.mark.parametrize("error", [CapacityError("the queue is full"), WorkerLost("killed")])
def test_a_sibling_refused_or_lost_goes_on_elsewhere_from_its_own_tokens(error: CapacityError | WorkerLost) -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            exchange, request = rig.ask(**sequences(2))
            first = await rig.workers.stream(0)
            first.say(*tokens("a"))
            sibling = await rig.workers.stream(1)
            sibling.say(*tokens("xy"))
            sibling.fail(error)
            again = await rig.workers.stream(2)
            assert again.address != first.address
            assert (again.command.num_generated, again.prompt[4:]) == (2, letters("xy"))
            assert again.command.sampling == sibling.command.sampling
            again.finish(FinishReason.LENGTH, *tokens("z"))
            first.finish(FinishReason.LENGTH, *tokens("b"))
            await request
            assert list(exchange.responses[0]["text_output"]) == [b"ab", b"xyz"]
            await rig.all_is_returned()

    run(scene)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_no_other_worker_can_help_fails_the_whole_request(failing: int) -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            exchange, request = await aggregated_trio(rig)
            rig.workers.streams[failing].fail(InvalidRequest("bad"))
            with pytest.raises(InvalidRequest, match="bad"):
                await request
            assert not exchange.is_over
            assert len(rig.workers.streams) == 3
            await rig.all_is_returned()

    run(scene)


def test_a_first_sequence_that_fails_starts_no_other() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            _, request = rig.ask(**sequences(3))
            (await rig.workers.stream(0)).fail(InvalidRequest("bad"))
            with pytest.raises(InvalidRequest):
                await request
            assert len(rig.workers.streams) == 1
            await rig.all_is_returned()

    run(scene)


@pytest.mark.parametrize("has_begun", [True, False], ids=["all running", "before the first token"])
def test_a_client_that_goes_takes_all_sequences_along(has_begun: bool) -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            if has_begun:
                exchange, request = await aggregated_trio(rig)
            else:
                exchange, request = rig.ask(**sequences(3))
                await rig.workers.stream(0)
            exchange.cancel()
            with pytest.raises(RequestCancelled):
                await request
            assert not exchange.is_over
            await rig.all_is_returned()

    run(scene)


def test_a_deadline_ends_all_sequences() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            exchange, request = await aggregated_trio(rig, deadline_ms=np.array([400], dtype=np.int32))
            rig.workers.streams[1].finish(FinishReason.LENGTH, *tokens("x"))
            with pytest.raises(DeadlineExceeded):
                await request
            assert not exchange.is_over
            await rig.all_is_returned()

    run(scene)


def test_a_stop_word_leaves_one_worker_stream_and_the_others_go_on() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            exchange, request = rig.ask(**sequences(2), stop_words="x")
            first = await rig.workers.stream(0)
            first.say(*tokens("a"))
            sibling = await rig.workers.stream(1)
            sibling.say(*tokens("wxyz"))
            await until(lambda: sibling.is_closed, "closing of the sibling's stream")
            assert not first.is_closed
            first.finish(FinishReason.LENGTH, *tokens("b"))
            await request
            (response,) = exchange.responses
            assert list(response["text_output"]) == [b"ab", b"w"]
            assert list(response["finish_reason"]) == [b"length", b"stop"]
            await rig.all_is_returned()

    run(scene)


def test_more_sequences_than_configured_are_refused_by_name() -> None:
    async def scene() -> None:
        async with open_router(record("decode"), max_return_sequences=2) as rig:
            _, request = rig.ask(**sequences(3))
            with pytest.raises(InvalidRequest, match="num_return_sequences: 3 exceeds the limit of 2"):
                await request
            assert rig.workers.streams == []

    run(scene)
