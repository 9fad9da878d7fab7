"""One try on chosen workers: what each is told, in which order tokens come, and who is to blame."""

from __future__ import annotations

import asyncio

import pytest
from attempt_rig import DECODE, PREFILL, TICKET_PREFILL, Trial, play
from router_rig import job

from kelp.core.errors import CapacityError, DeadlineExceeded, ProtocolError, RetryableTransferError, WorkerLost
from kelp.core.messages import Finished, Progress, Rendezvous, RequestUsage
from kelp.core.types import FinishReason, Role
from kelp.registry.base import WorkerRecord


def test_an_aggregated_attempt_asks_one_worker_for_everything() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        (stream,) = trial.workers.streams
        assert (stream.command.role, stream.command.rendezvous) == (Role.AGGREGATED, None)
        assert (stream.address.endpoint, stream.address.model_name) == ("host:1", "decode")
        assert stream.prompt == [100, 101, 102, 103]
        assert stream.command.remaining_ms is not None and 50_000 < stream.command.remaining_ms <= 60_000
        stream.say(1)
        stream.finish(FinishReason.STOP, 2, 3)
        assert (await running).finish_reason is FinishReason.STOP
        assert trial.tokens == trial.request.generated == [1, 2, 3]

    play(story)


def test_both_workers_get_the_same_rendezvous_at_once() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        first, second = trial.workers.streams
        assert (first.command.role, second.command.role) == (Role.PREFILL, Role.DECODE)
        assert (first.address.model_name, second.address.model_name) == ("prefill", "decode")
        rendezvous = first.command.rendezvous
        assert rendezvous is not None and rendezvous == second.command.rendezvous
        assert (rendezvous.endpoint, rendezvous.prefill_epoch) == ("prefill:2", "epoch of prefill")
        assert first.prompt == second.prompt
        running.cancel()

    play(story, PREFILL)


def test_every_attempt_meets_under_a_name_of_its_own() -> None:
    names = set()

    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        rendezvous = trial.workers.streams[0].command.rendezvous
        assert rendezvous is not None
        names.add(rendezvous.handoff_id)
        running.cancel()

    for _ in range(3):
        play(story, PREFILL)
    assert len(names) == 3


def test_the_first_token_comes_from_prefill_even_if_decode_answers_before_it() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        prefill, decode = trial.workers.streams
        decode.finish(FinishReason.LENGTH, 2, 3)
        await trial.settle()
        assert trial.tokens == []
        prefill.say(1)
        await trial.settle()
        assert trial.tokens == [1]
        prefill.finish(None)
        assert (await running).finish_reason is FinishReason.LENGTH
        assert trial.tokens == [1, 2, 3]

    play(story, PREFILL)


def test_a_sequence_that_ends_with_its_first_token_never_reaches_decode() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        prefill, decode = trial.workers.streams
        decode.say(99)
        prefill.finish(FinishReason.LENGTH, 1)
        assert (await running).finish_reason is FinishReason.LENGTH
        assert trial.tokens == [1]
        assert await trial.closed() == [True, True]

    play(story, PREFILL)


def test_a_ticket_engine_starts_decode_with_the_ticket_that_prefill_returned() -> None:
    ticket = Rendezvous(handoff_id="ticket", endpoint="host:9", prefill_epoch="e")

    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        (prefill,) = trial.workers.streams
        prefill.finish(None, 1, ticket=ticket)
        await trial.settle()
        decode = trial.workers.streams[1]
        assert (decode.command.role, decode.command.rendezvous) == (Role.DECODE, ticket)
        assert decode.prompt == [100, 101, 102, 103], "decode continues the same prompt, from the ticket's token"
        decode.finish(FinishReason.LENGTH, 2)
        await running
        assert trial.tokens == [1, 2]

    play(story, TICKET_PREFILL)


def test_a_ticket_engine_that_returns_no_ticket_breaks_the_protocol() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.workers.streams[0].finish(None, 1)
        with pytest.raises(ProtocolError, match="returned no ticket"):
            await running

    play(story, TICKET_PREFILL)


def test_what_workers_tell_about_themselves_is_kept_by_side() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        prefill, decode = trial.workers.streams
        prefill.say(1, event=Progress(usage=RequestUsage(cached_tokens=7)))
        prefill.finish(None)
        decode.say(2, event=Progress(usage=RequestUsage(transferred_blocks=5)))
        decode.finish(FinishReason.LENGTH)
        await running
        assert isinstance(trial.request.prefill_event, Finished)
        assert isinstance(trial.request.decode_event, Finished)

    play(story, PREFILL)


def test_a_further_attempt_starts_after_what_was_generated() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        (stream,) = trial.workers.streams
        assert (stream.prompt, stream.command.num_generated) == ([100, 101, 102, 103, 7, 8], 2)
        stream.finish(FinishReason.LENGTH, 9)
        await running
        assert trial.tokens == [9]
        assert trial.request.generated == [7, 8, 9]

    play(story, request=job(generated=(7, 8)))


def test_the_token_of_a_prefill_does_not_count_as_earlier_output_of_its_own_attempt() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.workers.streams[0].finish(None, 1, ticket=Rendezvous(handoff_id="t", endpoint="e", prefill_epoch="p"))
        await trial.settle()
        assert trial.workers.streams[1].command.num_generated == 0
        running.cancel()

    play(story, TICKET_PREFILL)


@pytest.mark.parametrize("error", [CapacityError("full"), RetryableTransferError("no"), ProtocolError("odd")])
def test_a_workers_typed_error_passes_unchanged_and_names_the_worker(error: Exception) -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        prefill, decode = trial.workers.streams
        prefill.finish(None, 1)
        decode.fail(error)
        with pytest.raises(type(error)) as raised:
            await running
        assert raised.value is error
        assert trial.attempt.failure is not None and trial.attempt.failure.worker == DECODE

    play(story, PREFILL)


def test_a_failed_prefill_is_blamed_on_the_prefill_worker() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        prefill, decode = trial.workers.streams
        decode.fail(WorkerLost("the other end is gone"))
        prefill.fail(WorkerLost("gone"))
        with pytest.raises(WorkerLost):
            await running
        assert trial.attempt.failure is not None and trial.attempt.failure.worker == PREFILL

    play(story, PREFILL)


def test_a_stream_that_ends_without_saying_how_is_a_lost_worker() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.workers.streams[0].say(1)
        trial.workers.streams[0].end()
        with pytest.raises(WorkerLost, match="host:1/decode ended the stream without saying how"):
            await running
        assert trial.tokens == [1]

    play(story)


@pytest.mark.parametrize("prefill", [None, PREFILL], ids=["aggregated", "disaggregated"])
def test_cancelling_an_attempt_closes_all_its_streams(prefill: WorkerRecord | None) -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await trial.closed() == [True] * (1 if prefill is None else 2)

    play(story, prefill)


def test_an_attempt_does_not_start_after_the_deadline() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        with pytest.raises(DeadlineExceeded, match="deadline_ms"):
            await running
        assert trial.workers.streams == []

    play(story, PREFILL, request=job(seconds_left=-1.0))


def test_a_failure_counts_against_the_handoff_until_decode_says_a_token() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        prefill, decode = trial.workers.streams
        prefill.finish(None, 1)
        decode.say()
        await trial.settle()
        assert trial.attempt.is_handoff_failure
        decode.say(2)
        await trial.settle()
        assert not trial.attempt.is_handoff_failure
        running.cancel()

    play(story, PREFILL)


def test_a_failure_without_remote_prefill_is_none_of_the_handoff() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.workers.streams[0].fail(WorkerLost("gone"))
        with pytest.raises(WorkerLost):
            await running
        assert not trial.attempt.is_handoff_failure

    play(story)
