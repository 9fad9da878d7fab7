"""A router whose workers fail: other workers, aggregated serving, and tokens without gap or repetition."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import numpy as np
import pytest
from router_rig import EOS, FakeExchange, bytes_tensor, letters, open_router, prefill_record, record
from router_scenes import PAIR, STREAM, max_tokens, run, sent, tokens

from kelp.core.errors import (
    CapacityError,
    DeadlineExceeded,
    EngineFailed,
    FatalTransferError,
    InvalidRequest,
    KelpError,
    MigrationsExceeded,
    NoWorker,
    PeerRefused,
    PromptTooLong,
    WorkerDied,
    WorkerDraining,
    WorkerLost,
)
from kelp.core.types import FinishReason, Role
from kelp.router.patience import Absence
from support.waiting import until


def test_a_failed_prefill_is_retried_on_another_worker() -> None:
    async def scene() -> None:
        async with open_router(prefill_record("p1"), prefill_record("p2"), record("decode")) as rig:
            exchange, request = rig.ask()
            first, first_decode = await rig.workers.stream(0), await rig.workers.stream(1)
            first.fail(WorkerLost("gone"))
            second, second_decode = await rig.workers.stream(2), await rig.workers.stream(3)
            assert {first.address.model_name, second.address.model_name} == {"p1", "p2"}
            assert second.command.rendezvous != first.command.rendezvous
            assert first.is_closed and first_decode.is_closed
            second.finish(None, *tokens("a"))
            second_decode.finish(FinishReason.LENGTH, *tokens("b"))
            await request
            assert exchange.text == "ab"
            assert rig.counters()["kelp_retries_total", (("reason", "worker_lost"),)] == 1

    run(scene)


def test_after_the_allowed_prefill_failures_the_decode_worker_does_everything() -> None:
    async def scene() -> None:
        async with open_router(*PAIR, max_prefill_retries=1) as rig:
            exchange, request = rig.ask()
            (await rig.workers.stream(0)).fail(WorkerLost("gone"))
            (await rig.workers.stream(2)).fail(FatalTransferError("gone"))
            alone = await rig.workers.stream(4)
            assert (alone.command.role, alone.command.rendezvous) == (Role.AGGREGATED, None)
            alone.finish(FinishReason.LENGTH, *tokens("ab"))
            await request
            assert exchange.text == "ab"
            assert list(exchange.responses[-1]["worker_ids"]) == [b"host:1/decode"]

    run(scene)


def test_a_handoff_that_keeps_failing_ends_in_aggregated_serving() -> None:
    async def scene() -> None:
        async with open_router(*PAIR, max_prefill_retries=1) as rig:
            exchange, request = rig.ask()
            for number, letter in ((0, "a"), (2, "b")):
                (await rig.workers.stream(number)).finish(None, *tokens(letter))
                (await rig.workers.stream(number + 1)).fail(FatalTransferError("the lease has expired"))
            alone = await rig.workers.stream(4)
            assert (alone.command.role, alone.command.num_generated) == (Role.AGGREGATED, 2)
            alone.finish(FinishReason.LENGTH, *tokens("c"))
            await request
            assert exchange.text == "abc"

    run(scene)


@pytest.mark.parametrize(
    "error",
    [FatalTransferError("the lease has expired"), PeerRefused("who is that"), WorkerLost("no such peer")],
    ids=["transfer", "refused", "not reached"],
)
def test_a_handoff_that_failed_on_its_way_is_retried_from_another_prefill_worker(error: KelpError) -> None:
    async def scene() -> None:
        async with open_router(prefill_record("p1"), prefill_record("p2"), record("decode")) as rig:
            exchange, request = rig.ask()
            first = await rig.workers.stream(0)
            first.finish(None, *tokens("a"))
            (await rig.workers.stream(1)).fail(error)
            second = await rig.workers.stream(2)
            assert {first.address.model_name, second.address.model_name} == {"p1", "p2"}
            second.finish(None, *tokens("b"))
            (await rig.workers.stream(3)).finish(FinishReason.LENGTH, *tokens("c"))
            await request
            assert exchange.text == "abc"

    run(scene)


def test_a_prefill_worker_whose_partner_died_keeps_the_prompt_that_it_has_computed() -> None:
    async def scene() -> None:
        async with open_router(prefill_record("p1"), prefill_record("p2"), record("d1"), record("d2")) as rig:
            exchange, request = rig.ask()
            first = await rig.workers.stream(0)
            first.finish(None, *tokens("a"))
            (await rig.workers.stream(1)).fail(WorkerDied("killed"))
            again = await rig.workers.stream(2)
            assert again.address.model_name == first.address.model_name
            again.finish(None, *tokens("b"))
            (await rig.workers.stream(3)).finish(FinishReason.LENGTH, *tokens("c"))
            await request
            assert exchange.text == "abc"

    run(scene)


def test_a_decode_worker_lost_in_mid_stream_is_replaced_without_gap_or_repetition() -> None:
    async def scene() -> None:
        async with open_router(prefill_record(), record("d1"), record("d2")) as rig:
            exchange, request = rig.ask(**STREAM)
            prefill, first = await rig.workers.stream(0), await rig.workers.stream(1)
            prefill.finish(None, *tokens("a"))
            first.say(*tokens("bc"))
            await sent(exchange, 3)
            first.fail(WorkerLost("killed"))
            prefill, second = await rig.workers.stream(2), await rig.workers.stream(3)
            assert {first.address.model_name, second.address.model_name} == {"d1", "d2"}
            assert (second.command.num_generated, second.prompt[4:]) == (3, letters("abc"))
            assert (prefill.command.num_generated, prefill.prompt) == (3, second.prompt)
            prefill.finish(None, *tokens("d"))
            second.finish(FinishReason.LENGTH, *tokens("ef"))
            await request
            assert (exchange.text, exchange.token_ids) == ("abcdef", letters("abcdef"))
            assert list(exchange.responses[-1]["num_output_tokens"]) == [6]
            await rig.all_is_returned()

    run(scene)


def test_a_stop_word_is_found_although_its_worker_was_lost_in_the_middle_of_it() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            exchange, request = rig.ask(**STREAM, stop_words="cde")
            first = await rig.workers.stream(0)
            first.say(*tokens("abc"))
            await sent(exchange, 3)
            first.fail(WorkerLost("killed"))
            second = await rig.workers.stream(1)
            assert second.prompt[4:] == letters("abc")
            second.say(*tokens("defg"))
            await request
            assert (exchange.text, exchange.finish_reason) == ("ab", "stop")

    run(scene)


def test_every_migration_takes_sampling_deadline_and_log_probs_along() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2"), record("d3")) as rig:
            wishes = {
                "temperature": np.array([0.7], np.float32),
                "random_seed": np.array([5], np.uint64),
                "presence_penalty": np.array([0.5], np.float32),
                "min_tokens": np.array([3], np.int32),
                "deadline_ms": np.array([40_000], np.int32),
                "return_log_probs": np.array([True]),
                "guided_decoding_guide_type": "regex",
                "guided_decoding_guide": "[a-z]*",
            }
            exchange, request = rig.ask(**STREAM, **max_tokens(7), **wishes)
            commands = []
            for number, letter in enumerate("abc"):
                stream = await rig.workers.stream(number)
                commands.append(stream.command)
                stream.say(*tokens(letter))
                await sent(exchange, number + 1)
                stream.fail(WorkerLost("killed"))
            last = await rig.workers.stream(3)
            commands.append(last.command)
            last.finish(FinishReason.STOP, *tokens("d"))
            await request
            assert all(command.sampling == commands[0].sampling for command in commands)
            sampling = last.command.sampling
            assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (5, 7, 3)
            assert sampling.guide is not None and sampling.presence_penalty == 0.5
            assert [command.num_generated for command in commands] == [0, 1, 2, 3]
            remaining = [command.remaining_ms for command in commands]
            assert remaining == sorted(remaining, reverse=True) and remaining[0] <= 40_000.0
            assert sum(response["output_log_probs"].size for response in exchange.responses) == 4

    run(scene)


def test_tokens_that_a_dying_worker_managed_to_say_are_kept() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            exchange, request = rig.ask()
            first = await rig.workers.stream(0)
            first.say(*tokens("ab"))
            first.fail(WorkerLost("killed"))
            second = await rig.workers.stream(1)
            assert second.command.num_generated == 2
            second.finish(FinishReason.LENGTH, *tokens("c"))
            await request
            assert exchange.text == "abc"

    run(scene)


@pytest.mark.parametrize(
    ("said", "expected"),
    [((*tokens("ab"), EOS), "stop"), (tokens("abc"), "length")],
    ids=["end of sequence", "max_tokens"],
)
def test_a_worker_lost_after_its_last_token_is_not_missed(said: tuple[int, ...], expected: str) -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            exchange, request = rig.ask(**max_tokens(3))
            stream = await rig.workers.stream(0)
            stream.say(*said)
            stream.fail(WorkerLost("killed"))
            await request
            assert exchange.finish_reason == expected
            assert len(rig.workers.streams) == 1

    run(scene)


@pytest.mark.parametrize("max_migrations", [0, 3, 5])
def test_a_request_is_given_up_after_the_allowed_migrations_with_the_last_error(max_migrations: int) -> None:
    async def scene() -> None:
        fleet = [record(f"d{number}") for number in range(max_migrations + 1)]
        async with open_router(*fleet, max_migrations=max_migrations) as rig:
            exchange, request = rig.ask()
            for number in range(max_migrations + 1):
                (await rig.workers.stream(number)).fail(WorkerLost(f"loss {number}"))
            with pytest.raises(MigrationsExceeded, match=f"{max_migrations} migrations .* loss {max_migrations}$"):
                await request
            assert exchange.responses == []
            assert rig.counters()["kelp_requests_total", (("outcome", "migrations_exceeded"),)] == 1
            await rig.all_is_returned()

    run(scene)


def test_a_lost_worker_that_is_the_only_one_left_rests_before_it_is_tried_again() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            _, request = rig.ask()
            (await rig.workers.stream(0)).fail(WorkerLost("the connection broke"))
            lost_s = asyncio.get_running_loop().time()
            (await rig.workers.stream(1)).finish(FinishReason.LENGTH, *tokens("a"))
            await request
            assert asyncio.get_running_loop().time() - lost_s >= 0.9

    run(scene)


def test_a_request_whose_engine_fails_goes_on_at_another_worker() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            exchange, request = rig.ask()
            first = await rig.workers.stream(0)
            first.say(*tokens("a"))
            first.fail(EngineFailed("out of memory"))
            second = await rig.workers.stream(1)
            assert second.address.model_name != first.address.model_name
            assert second.command.num_generated == 1
            second.finish(FinishReason.LENGTH, *tokens("b"))
            await request
            assert exchange.text == "ab"

    run(scene)


def test_a_request_in_whose_company_three_engines_fail_is_not_tried_on_the_others() -> None:
    async def scene() -> None:
        async with open_router(*(record(f"d{number}") for number in range(5)), max_migrations=9) as rig:
            _, request = rig.ask()
            for number in range(3):
                (await rig.workers.stream(number)).fail(EngineFailed("illegal access"))
            with pytest.raises(MigrationsExceeded, match="ENGINE_FAILED: illegal access"):
                await request
            assert len(rig.workers.streams) == 3

    run(scene)


def test_a_draining_workers_request_goes_on_at_another_worker() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            exchange, request = rig.ask()
            first = await rig.workers.stream(0)
            first.say(*tokens("ab"))
            first.fail(WorkerDraining("the grace period is over"))
            second = await rig.workers.stream(1)
            assert (second.command.num_generated, second.prompt[4:]) == (2, letters("ab"))
            second.finish(FinishReason.LENGTH, *tokens("c"))
            await request
            assert exchange.text == "abc"
            assert rig.counters()["kelp_retries_total", (("reason", "worker_draining"),)] == 1

    run(scene)


@pytest.mark.parametrize("error", [PromptTooLong("too long"), InvalidRequest("bad"), DeadlineExceeded("late")])
def test_what_no_other_worker_can_help_is_not_retried(error: KelpError) -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            _, request = rig.ask()
            (await rig.workers.stream(0)).fail(error)
            with pytest.raises(type(error)):
                await request
            assert len(rig.workers.streams) == 1
            await rig.all_is_returned()

    run(scene)


def test_a_full_worker_is_left_for_another() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            exchange, request = rig.ask()
            first = await rig.workers.stream(0)
            first.fail(CapacityError("the queue is full"))
            second = await rig.workers.stream(1)
            assert second.address.model_name != first.address.model_name
            second.finish(FinishReason.LENGTH, *tokens("a"))
            await request
            assert exchange.text == "a"

    run(scene)


def test_when_every_worker_is_full_the_client_hears_so() -> None:
    async def scene() -> None:
        async with open_router(record("d1"), record("d2")) as rig:
            _, request = rig.ask()
            for number in range(4):
                (await rig.workers.stream(number)).fail(CapacityError("the queue is full"))
            with pytest.raises(CapacityError):
                await request

    run(scene)


def test_a_request_that_finds_no_worker_looks_again_before_it_is_refused() -> None:
    async def scene() -> None:
        async with open_router() as rig:
            rig.workers.arriving.append(record("decode"))
            exchange, request = rig.ask()
            (await rig.workers.stream(0)).finish(FinishReason.LENGTH, *tokens("a"))
            await request
            assert exchange.text == "a"

    run(scene)


def test_an_answer_that_has_begun_waits_for_a_worker_that_is_being_restarted() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            exchange, request = rig.ask()
            first = await rig.workers.stream(0)
            first.say(*tokens("ab"))
            rig.workers.known = []
            rig.desk.placer.update()
            first.fail(WorkerLost("killed"))
            await until(lambda: rig.workers.num_refreshes > 1, "looking again")
            rig.workers.known = [record("decode", epoch="restarted")]
            second = await rig.workers.stream(1)
            assert second.command.num_generated == 2
            second.finish(FinishReason.LENGTH, *tokens("c"))
            await request
            assert exchange.text == "abc"

    run(scene)


def test_it_does_not_wait_for_ever() -> None:
    async def scene() -> None:
        async with open_router(record("decode"), recovery_wait_s=0.0) as rig:
            _, request = rig.ask()
            first = await rig.workers.stream(0)
            first.say(*tokens("ab"))
            rig.workers.known = []
            rig.desk.placer.update()
            first.fail(WorkerLost("killed"))
            with pytest.raises(CapacityError, match="no decode worker is ready; Retry-After: 1$"):
                await request

    run(scene)


def test_without_a_decode_worker_the_request_is_refused_as_that() -> None:
    async def scene() -> None:
        async with open_router(prefill_record(), absence_wait_s=0.0) as rig:
            _, request = rig.ask()
            with pytest.raises(NoWorker, match="no decode worker is ready; Retry-After: 1$"):
                await request

    run(scene)


def test_a_new_request_waits_a_little_where_no_worker_is_ready() -> None:
    async def scene() -> None:
        async with open_router(absence_wait_s=300.0) as rig:
            exchange, request = rig.ask()
            await until(lambda: rig.workers.num_refreshes > 1, "it looks again")
            rig.workers.known = [record("decode")]
            stream = await rig.workers.stream(0)
            stream.finish(FinishReason.LENGTH, *tokens("abc"))
            await request
            assert exchange.text == "abc"

    run(scene)


def test_a_new_request_that_wants_a_certain_worker_waits_for_nobody() -> None:
    async def scene() -> None:
        async with open_router(absence_wait_s=300.0) as rig:
            request = rig.serve(FakeExchange({"text_input": bytes_tensor("x")}, {"kelp_worker": "decode"}))
            with pytest.raises(NoWorker):
                await request

    run(scene)


def test_no_more_new_requests_wait_than_can_look_again_and_again() -> None:
    absence = Absence(2.0)
    with ExitStack() as waiting:
        for _ in range(256):
            assert absence.wait_s == 2.0
            waiting.enter_context(absence.waiting())
        assert absence.wait_s == 0.0
    assert absence.wait_s == 2.0
