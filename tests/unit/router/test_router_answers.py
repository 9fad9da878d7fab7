"""Requests that a router answers: one response or a stream, stop words, coalescing, metrics."""

from __future__ import annotations

import asyncio
import threading

import pytest
from router_rig import EOS, FakeStream, letters, open_router, record
from router_scenes import PAIR, STREAM, run, sent, tokens

from kelp.core.errors import PromptTooLong
from kelp.core.messages import Finished
from kelp.core.types import FinishReason, Role
from support.waiting import until


async def loop_rounds(count: int) -> None:
    """Let what is ready run; a token passes from a worker's stream to the sender in fewer."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_without_stream_there_is_exactly_one_response() -> None:
    async def scene() -> None:
        async with open_router(*PAIR) as rig:
            exchange, request = rig.ask()
            prefill, decode = await rig.workers.stream(0), await rig.workers.stream(1)
            prefill.finish(None, *tokens("a"))
            for letter in "bcd":
                decode.say(*tokens(letter))
            decode.finish(FinishReason.LENGTH)
            await request
            assert len(exchange.responses) == exchange.num_final == 1
            assert (exchange.text, exchange.finish_reason) == ("abcd", "length")
            assert exchange.token_ids == letters("abcd")
            assert list(exchange.responses[0]["worker_ids"]) == [b"host:1/prefill", b"host:1/decode"]
            await rig.all_is_returned()

    run(scene)


def test_a_streams_first_token_wakes_no_other_thread_and_the_rest_does_not_hold_up_the_loop() -> None:
    async def scene() -> None:
        async with open_router(record("decode", Role.AGGREGATED)) as rig:
            exchange, request = rig.ask(**STREAM)
            threads: list[int] = []
            send = exchange.send
            exchange.send = lambda *given: (threads.append(threading.get_ident()), send(*given))  # type: ignore[assignment]
            decode = await rig.workers.stream(0)
            decode.say(*tokens("a"))
            await sent(exchange, 1)
            decode.say(*tokens("b"))
            await sent(exchange, 2)
            decode.finish(FinishReason.LENGTH)
            await request
            assert threads[0] == threading.get_ident()
            assert threading.get_ident() not in threads[1:]
            assert exchange.text == "ab"

    run(scene)


def test_a_streams_last_tokens_share_the_last_response_with_what_is_said_at_the_end() -> None:
    async def scene() -> None:
        async with open_router(record("decode", Role.AGGREGATED)) as rig:
            exchange, request = rig.ask(**STREAM)
            decode = await rig.workers.stream(0)
            decode.say(*tokens("a"))
            await sent(exchange, 1)
            decode.finish(FinishReason.LENGTH, *tokens("bc"))
            await request
            assert [list(response["output_ids"]) for response in exchange.responses] == [letters("a"), letters("bc")]

    run(scene)


def test_a_streams_first_token_goes_out_before_decode_has_said_anything() -> None:
    async def scene() -> None:
        async with open_router(*PAIR) as rig:
            exchange, request = rig.ask(**STREAM)
            prefill, decode = await rig.workers.stream(0), await rig.workers.stream(1)
            prefill.say(*tokens("a"))
            await sent(exchange, 1)
            assert not exchange.is_over
            prefill.finish(None)
            decode.say(*tokens("b"))
            await sent(exchange, 2)
            decode.finish(FinishReason.STOP, *tokens("c"), EOS)
            await request
            assert (exchange.text, exchange.finish_reason) == ("abc", "stop")
            assert exchange.token_ids == [*letters("abc"), EOS]
            assert "num_output_tokens" not in exchange.responses[0]
            assert list(exchange.responses[-1]["num_output_tokens"]) == [4]
            await rig.all_is_returned()

    run(scene)


def test_tokens_that_queue_up_while_the_sender_is_busy_share_one_response() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            exchange, request = rig.ask(**STREAM)
            decode = await rig.workers.stream(0)
            is_free, is_busy = threading.Event(), threading.Event()
            rig.outbox.lane(lambda _: (is_busy.set(), is_free.wait(10.0))).put(None)  # type: ignore[arg-type]
            await until(is_busy.is_set, "a busy sender")
            for letter in "abcde":
                decode.say(*tokens(letter))
            await until(lambda: decode.is_read, "reading of all tokens")
            await loop_rounds(10)
            is_free.set()
            await sent(exchange, 5)
            assert len(exchange.responses) == 1
            decode.finish(FinishReason.LENGTH)
            await request
            assert exchange.text == "abcde"

    run(scene)


def test_a_prompt_that_preprocess_refuses_reaches_no_worker() -> None:
    async def scene() -> None:
        async with open_router(*PAIR) as rig:
            rig.preprocess.error = PromptTooLong("text_input: 9000 tokens")
            exchange, request = rig.ask()
            with pytest.raises(PromptTooLong):
                await request
            assert rig.workers.streams == [] and exchange.responses == []

    run(scene)


def test_a_stop_word_ends_the_request_and_leaves_the_worker() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            exchange, request = rig.ask(**STREAM, stop_words="cd")
            decode = await rig.workers.stream(0)
            decode.say(*tokens("ab"))
            await sent(exchange, 2)
            decode.say(*tokens("cdef"))
            await request
            assert (exchange.text, exchange.finish_reason) == ("ab", "stop")
            assert exchange.num_final == 1
            await rig.all_is_returned()

    run(scene)


def test_a_failure_after_a_stop_word_is_nobodys_business() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            exchange, request = rig.ask(stop_words="b")
            decode = await rig.workers.stream(0)
            decode.say(*tokens("ab"))
            decode.finish(FinishReason.LENGTH, *tokens("c"))
            await request
            assert (exchange.text, exchange.finish_reason) == ("a", "stop")

    run(scene)


def test_an_answered_request_is_counted_and_timed() -> None:
    async def scene() -> None:
        async with open_router(record("decode")) as rig:
            _, request = rig.ask()
            stream: FakeStream = await rig.workers.stream(0)
            stream.say(*tokens("abc"), event=Finished(finish_reason=FinishReason.LENGTH))
            await request
            counters, _, observations = rig.metrics.take()
            counted = {family.name: value for (family, _), value in counters.items()}
            assert counted["kelp_output_tokens_total"] == 3
            assert counted["kelp_prompt_tokens_total"] == 4
            assert counted["kelp_responses_total"] == counted["kelp_requests_total"] == 1
            assert {family.name for family, _ in observations} >= {"kelp_ttft_seconds", "kelp_itl_seconds"}

    run(scene)
