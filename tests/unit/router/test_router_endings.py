"""Clients that go and deadlines that pass, in every phase: nothing of the request stays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from router_rig import RouterRig, bytes_tensor, open_router
from router_scenes import PAIR, STREAM, run, sent, tokens

from kelp.core.errors import DeadlineExceeded, InternalError, RequestCancelled
from kelp.core.exchange import Tensors
from kelp.core.types import FinishReason
from support.exchange import FakeExchange

# Where a request can be when something ends it early: each brings a fresh request there.


async def _preprocessing(rig: RouterRig) -> tuple[FakeExchange, asyncio.Task[None]]:
    rig.preprocess.gate.clear()
    return rig.ask(**STREAM, **DEADLINE)


async def _prefilling(rig: RouterRig) -> tuple[FakeExchange, asyncio.Task[None]]:
    exchange, request = rig.ask(**STREAM, **DEADLINE)
    await rig.workers.stream(1)
    return exchange, request


async def _transferring(rig: RouterRig) -> tuple[FakeExchange, asyncio.Task[None]]:
    exchange, request = await _prefilling(rig)
    rig.workers.streams[0].finish(None, *tokens("a"))
    await sent(exchange, 1)
    return exchange, request


async def _decoding(rig: RouterRig) -> tuple[FakeExchange, asyncio.Task[None]]:
    exchange, request = await _transferring(rig)
    rig.workers.streams[1].say(*tokens("b"))
    await sent(exchange, 2)
    return exchange, request


Arrive = Callable[[RouterRig], Awaitable[tuple[FakeExchange, "asyncio.Task[None]"]]]
DEADLINE = {"deadline_ms": np.array([400], dtype=np.int32)}
in_each_phase = pytest.mark.parametrize(
    "arrive", [_preprocessing, _prefilling, _transferring, _decoding], ids=lambda arrive: arrive.__name__.strip("_")
)


@in_each_phase
def test_a_client_that_goes_takes_its_streams_along(arrive: Arrive) -> None:
    async def scene() -> None:
        async with open_router(*PAIR) as rig:
            exchange, request = await arrive(rig)
            exchange.cancel()
            with pytest.raises(RequestCancelled):
                await request
            assert not exchange.is_over
            await rig.all_is_returned()

    run(scene)


@in_each_phase
def test_a_deadline_ends_the_request_in_every_phase(arrive: Arrive) -> None:
    async def scene() -> None:
        async with open_router(*PAIR) as rig:
            exchange, request = await arrive(rig)
            with pytest.raises(DeadlineExceeded, match="deadline_ms: 400 ms have passed"):
                await request
            assert not exchange.is_over
            await rig.all_is_returned()

    run(scene)


@pytest.mark.parametrize("is_answered", [False, True], ids=["still running", "answered"])
def test_a_router_forgets_a_request_completely(is_answered: bool) -> None:
    async def scene() -> None:
        async with open_router(*PAIR) as rig:
            exchange, request = rig.ask()
            prefill, decode = await rig.workers.stream(0), await rig.workers.stream(1)
            assert rig.num_active == 2, "a running request is counted on both workers"
            if is_answered:
                prefill.finish(None, *tokens("a"))
                decode.finish(FinishReason.LENGTH)
            else:
                exchange.cancel()
            await asyncio.gather(request, return_exceptions=True)
            await rig.all_is_returned()

    run(scene)


class TornExchange(FakeExchange):
    """Its first response is lost on the way."""

    def send(self, outputs: Tensors, is_final: bool = False) -> None:
        raise ConnectionError("torn")


def test_a_response_that_cannot_be_sent_ends_its_request_and_leaves_no_hole() -> None:
    async def scene() -> None:
        async with open_router(*PAIR) as rig:
            exchange = TornExchange({"text_input": bytes_tensor("hello"), **STREAM})
            request = rig.serve(exchange)
            prefill = await rig.workers.stream(0)
            prefill.finish(None, *tokens("a"))
            with pytest.raises(InternalError, match="a response could not be sent: torn"):
                await request
            await rig.all_is_returned()

    run(scene)
