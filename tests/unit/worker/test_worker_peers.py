"""A worker with a token serves routers that know it, and reads nothing of what others say, on either way to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from direct_rig import hello, open_direct_router, open_raw_router, start
from worker_rig import PROMPT, WorkerRig, bytes_tensor, completed, generate_command, open_worker, token

from kelp.client.base import WorkerAddress
from kelp.client.direct.dialling import Dialling
from kelp.client.direct.frames import framed
from kelp.client.direct.wire import Welcome, decode_worker_frame, encode_frame, handshake_names
from kelp.client.grpc.workers import GrpcWorkerStream, _Party
from kelp.core.errors import PeerRefused, WorkerLost
from kelp.core.messages import CancelCommand, DrainCommand
from kelp.core.peer_auth import WORKER_COMMAND_PROOF, PeerToken, seal
from kelp.core.peer_handshake import Initiator
from kelp.core.types import Role
from kelp.core.wire import Message, encode_message
from kelp.worker.direct import server
from support.exchange import FakeExchange
from support.waiting import until

TOKEN, OTHER = PeerToken(b"t" * 16), PeerToken(b"o" * 16)
COMMAND = encode_message(generate_command(Role.AGGREGATED, None))


async def serves_on(rig: WorkerRig) -> None:
    async with open_direct_router(rig, TOKEN) as router:
        request = await router.ask()
        rig.executor.emit(token(1), completed())
        assert [output async for output in request][0].token_ids == (1,)


def initiator(rig: WorkerRig, known: PeerToken = TOKEN) -> Initiator:
    address = rig.address
    return Initiator(known, handshake_names(address.worker_id, address.epoch, address.direct_endpoint), "worker")


def test_a_router_that_knows_the_token_is_served_and_the_record_says_that_it_is_asked_for() -> None:
    async def scene() -> None:
        async with open_worker(token=TOKEN) as rig:
            await serves_on(rig)
            assert rig.registry.published[-1].asks_token

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("of_worker", "of_router"),
    [(TOKEN, None), (TOKEN, OTHER), (None, TOKEN)],
    ids=["router without", "another token", "worker without"],
)
def test_a_router_and_a_worker_that_know_different_things_do_not_meet(
    of_worker: PeerToken | None, of_router: PeerToken | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        async with open_worker(token=of_worker) as rig:
            dialling = Dialling(of_router)
            dialling.connection(rig.address)
            await until(lambda: "no direct channel" in caplog.text, "the refusal")
            assert "PeerRefused" in caplog.text and "peers.token_file" in caplog.text
            assert dialling.connection(rig.address) is None
            assert rig.executor.requests == []
            await dialling.close()

    asyncio.run(scene())


@pytest.mark.parametrize("kind", ["hello", "start", "long", "proof of before"])
def test_nothing_is_read_of_a_stranger(kind: str) -> None:
    async def scene() -> None:
        async with open_worker(token=TOKEN) as rig, open_raw_router(rig, is_welcome=False) as router:
            said = {"hello": encode_frame(hello(rig)), "start": encode_frame(start(0)), "long": framed(b"x" * 4000)}
            if kind in said:
                router.writer.write(said[kind])
            else:
                router.writer.write(framed(initiator(rig).opening))
                await router.next_raw()
                router.writer.write(framed(b"\xc1KELPHS3" + b"0" * 32) + bytes(encode_frame(hello(rig))))
            assert "KELP_PEER_REFUSED" in await router.refusal()
            assert rig.executor.requests == []
            await serves_on(rig)

    asyncio.run(scene())


def test_a_router_may_say_hello_together_with_its_proof() -> None:
    async def scene() -> None:
        async with open_worker(token=TOKEN) as rig, open_raw_router(rig, is_welcome=False) as router:
            known = initiator(rig)
            router.writer.write(framed(known.opening))
            proof = known.prove(await router.next_raw())
            router.writer.write(framed(proof) + bytes(encode_frame(hello(rig))))
            assert decode_worker_frame(await router.next_raw(), "worker") == Welcome(1)

    asyncio.run(scene())


def test_strangers_that_say_nothing_make_room_for_who_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_MAX_STRANGERS", 2)

    async def scene() -> None:
        async with (
            open_worker(token=TOKEN) as rig,
            open_raw_router(rig, is_welcome=False) as first,
            open_raw_router(rig, is_welcome=False),
            open_raw_router(rig, is_welcome=False),
        ):
            with pytest.raises((EOFError, ConnectionError)):
                await first.next_raw()
            await until(lambda: rig.service.direct.num_connections == 2, "the first to be gone")
            await serves_on(rig)

    asyncio.run(scene())


def sealed(
    rig: WorkerRig, document: bytes, known: PeerToken = TOKEN, epoch: str = "epoch", beside: bytes = b""
) -> bytes:
    return seal(known, WORKER_COMMAND_PROOF, (rig.address.worker_id, epoch), document, beside)


def test_commands_through_triton_are_obeyed_when_they_are_proven() -> None:
    async def scene() -> None:
        async with open_worker(token=TOKEN) as rig:
            command = sealed(rig, COMMAND, beside=PROMPT.tobytes())
            exchange, task = rig.send(command=bytes_tensor(command), input_ids=PROMPT)
            await until(lambda: len(rig.executor.requests) == 1, "submission")
            rig.executor.emit(token(1), completed())
            await task
            assert exchange.is_over and exchange.token_ids == [1]
            drain, done = rig.send(command=bytes_tensor(sealed(rig, encode_message(DrainCommand()))))
            await done
            assert drain.is_over and rig.registry.published[-1].state.value == "draining"

    asyncio.run(scene())


def test_commands_through_triton_that_prove_nothing_are_refused_and_anybody_may_ask_for_counts() -> None:
    async def scene() -> None:
        async with open_worker(token=TOKEN) as rig:
            other_prompt = np.array([1], dtype=np.int32).tobytes()
            refused: list[bytes] = [
                COMMAND,
                encode_message(DrainCommand()),
                encode_message(CancelCommand(request_id="r")),
                sealed(rig, COMMAND, known=OTHER, beside=PROMPT.tobytes()),
                sealed(rig, COMMAND, epoch="an earlier one", beside=PROMPT.tobytes()),
                sealed(rig, COMMAND, beside=other_prompt),
                b'{"op": "status"}' + b" " * 300,
            ]
            for command in refused:
                _, task = rig.send(command=bytes_tensor(command), input_ids=PROMPT)
                with pytest.raises(PeerRefused, match="worker command"):
                    await task
            assert rig.executor.requests == [] and rig.executor.calls == []
            assert (await rig.status()).state == "ready"

    asyncio.run(scene())


def test_a_refusal_is_a_lost_worker_to_whoever_may_ask_another() -> None:
    assert issubclass(PeerRefused, WorkerLost) and PeerRefused.is_retryable


def test_what_a_router_sends_through_triton_is_what_a_worker_takes() -> None:
    def bytes_of(message: Message, prompt: np.ndarray | None, known: PeerToken | None) -> bytes:
        party = _Party(WorkerAddress("host:1", "decode", "", "epoch"), known)
        return party.request("r", message, prompt).raw_input_contents[0][4:]

    async def scene() -> None:
        async with open_worker(token=TOKEN) as rig:
            command = bytes_of(generate_command(Role.AGGREGATED, None), PROMPT, TOKEN)
            _, task = rig.send(command=bytes_tensor(command), input_ids=PROMPT)
            await until(lambda: len(rig.executor.requests) == 1, "submission")
            rig.executor.emit(completed())
            await task

    asyncio.run(scene())


class PlayedStream:
    """Takes the place of the client's stream to Triton: keeps the request, and what takes the answers."""

    def start(self, request: Any, take: Callable[[Any], None]) -> Any:
        self.request, self.take = request, take
        return SimpleNamespace(has_ended=False)


@pytest.mark.parametrize("change", ["none", "a token", "the order", "no proof"])
def test_what_a_worker_answers_through_triton_counts_if_it_is_its_own(change: str) -> None:
    async def scene() -> None:
        async with open_worker(token=TOKEN) as rig:
            party, shared, heard = _Party(WorkerAddress("host:1", "decode", "", "epoch"), TOKEN), PlayedStream(), []
            request = party.request("r", generate_command(Role.AGGREGATED, None), PROMPT)
            GrpcWorkerStream(shared, lambda: shared, party, request, heard.append)  # type: ignore[arg-type]
            exchange, task = rig.send(command=bytes_tensor(shared.request.raw_input_contents[0][4:]), input_ids=PROMPT)
            await until(lambda: len(rig.executor.requests) == 1, "submission")
            rig.executor.emit(token(1))
            await until(lambda: len(exchange.responses) == 1, "the first token")
            rig.executor.emit(token(2), completed())
            await task
            for answer in on_the_wire(exchange, change):
                shared.take(answer)
            if change == "none":
                assert [output.token_ids for output in heard] == [(1,), (2,)]
            else:
                assert isinstance(heard[0], PeerRefused) and len(heard) == 1

    asyncio.run(scene())


def on_the_wire(exchange: FakeExchange, change: str) -> list[dict[str, bytes]]:
    """Responses as a client gets them, after somebody has had his hands on them."""
    answers = [
        {
            "output_ids": response["output_ids"].tobytes(),
            "output_log_probs": response["output_log_probs"].tobytes(),
            "event": b"\0" * 4 + response["event"][0],
        }
        for response in exchange.responses
    ]
    if change == "a token":
        answers[0]["output_ids"] = np.array([7], np.int32).tobytes()
    elif change == "the order":
        answers.reverse()
    elif change == "no proof":
        answers = [{**answer, "event": b""} for answer in answers]
    return answers
