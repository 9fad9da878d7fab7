"""A KV block manager with a token obeys who knows it; the counts are for everybody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kelp.build.kv_manager import KvManagerAssembly
from kelp.core.config import load_config
from kelp.core.errors import PeerRefused
from kelp.core.kv_manager_messages import Clear, GetStats, Pin, Refused, Stats, decode_results, encode_batch
from kelp.core.metrics import Metrics
from kelp.core.peer_auth import (
    KV_OPERATIONS_PROOF,
    KV_RESULTS_PROOF,
    PeerToken,
    load_token,
    make_token_file,
    proof_in,
    seal,
    unseal,
)
from kelp.registry.directory import KvManagerDirectory

OTHER = PeerToken(b"o" * 16)
ASKED = encode_batch([Pin((), 1.0)])


class Rig:
    def __init__(self, assembly: KvManagerAssembly, token: PeerToken, epoch: str) -> None:
        self.assembly = assembly
        self.token = token
        self.scope = ("127.0.0.1:1/kv_block_manager", epoch)

    async def ask(self, raw: bytes) -> bytes:
        return await self.assembly.handle(raw)


@contextlib.asynccontextmanager
async def open_manager(folder: Path) -> AsyncIterator[Rig]:
    make_token_file(folder / "token")
    config = load_config({"registry.path": str(folder), "peers.token_file": str(folder / "token")})
    token = load_token(config.peers)
    assert token is not None
    assembly = KvManagerAssembly(config, "127.0.0.1:1", "kv_block_manager", Metrics())
    await assembly.start()
    (record,) = KvManagerDirectory(folder, 60.0).snapshot()
    assert record.asks_token
    try:
        yield Rig(assembly, token, record.epoch)
    finally:
        await assembly.stop()


def test_operations_of_a_peer_are_answered_and_the_answer_proves_itself(tmp_path: Path) -> None:
    async def scene() -> None:
        async with open_manager(tmp_path) as rig:
            question = seal(rig.token, KV_OPERATIONS_PROOF, rig.scope, ASKED)
            answer = await rig.ask(question)
            (result,) = decode_results(unseal(rig.token, KV_RESULTS_PROOF, rig.scope, answer, proof_in(question)))
            assert isinstance(result, Refused) and "KELP_NOT_FOUND" in result.message
            another = seal(rig.token, KV_OPERATIONS_PROOF, rig.scope, encode_batch([Clear(None)]))
            with pytest.raises(PeerRefused):
                unseal(rig.token, KV_RESULTS_PROOF, rig.scope, answer, proof_in(another))

    asyncio.run(scene())


def test_operations_of_strangers_are_refused(tmp_path: Path) -> None:
    async def scene() -> None:
        async with open_manager(tmp_path) as rig:
            former = (rig.scope[0], "an earlier epoch")
            for raw in (
                ASKED,
                encode_batch([GetStats(), Clear(None)]),
                encode_batch([GetStats()] * 200),
                seal(OTHER, KV_OPERATIONS_PROOF, rig.scope, ASKED),
                seal(rig.token, KV_OPERATIONS_PROOF, former, ASKED),
            ):
                with pytest.raises(PeerRefused, match="kv operations"):
                    await rig.ask(raw)

    asyncio.run(scene())


def test_anybody_may_ask_for_counts(tmp_path: Path) -> None:
    async def scene() -> None:
        async with open_manager(tmp_path) as rig:
            (result,) = decode_results(await rig.ask(encode_batch([GetStats()])))
            assert isinstance(result, Stats)

    asyncio.run(scene())
