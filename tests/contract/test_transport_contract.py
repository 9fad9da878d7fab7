"""What `transport.base` promises, of the local agent in one process and of NIXL between two."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from kelp.core.errors import FatalTransferError, ProtocolError, TransferError
from kelp.core.types import BlockId
from kelp.transport import open_agent
from kelp.transport.base import Agent, Peer, Region, Transfer, TransferState
from kelp.transport.local import LocalAgent

NUM_BLOCKS = 64
BLOCK_BYTES = 64 * 1024
FOLDER = Path(__file__).parent
needs_nixl = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
    reason="the nixl wheel is not installed",
)


class LocalOwner:
    """The remote pool, in this process. Block *b* is filled with the byte *b*."""

    def __init__(self) -> None:
        pool = np.repeat(np.arange(NUM_BLOCKS, dtype=np.uint8), BLOCK_BYTES)
        self._agent = LocalAgent("owner")
        self.region = Region(pool.ctypes.data, NUM_BLOCKS, BLOCK_BYTES, "cpu")
        self._agent.register(self.region, pool)
        self.metadata = self._agent.metadata()

    def kill(self) -> None:
        self._agent.close()


class NixlOwner:
    """The remote pool, in another process."""

    def __init__(self) -> None:
        arguments = [sys.executable, str(FOLDER / "pool_owner.py"), str(NUM_BLOCKS), str(BLOCK_BYTES)]
        self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        hello = read_hello(self._process.stdout)
        self.metadata = bytes.fromhex(hello["metadata"])
        self.region = Region(hello["base_address"], NUM_BLOCKS, BLOCK_BYTES, "cpu")

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def read_hello(stream: IO[str] | None) -> dict:
    assert stream is not None
    for line in stream:
        if line.startswith("READY "):
            return json.loads(line.removeprefix("READY "))
    raise AssertionError("the owner of the pool ended without a word")


Owner = LocalOwner | NixlOwner
KINDS = ["local", pytest.param("nixl", marks=[needs_nixl, pytest.mark.nixl])]


class Reader:
    """The local half: an agent with a zeroed pool."""

    def __init__(self, kind: str) -> None:
        self.pool = np.zeros((NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        self.agent: Agent = open_agent(kind, "reader")
        self.agent.register(Region(self.pool.ctypes.data, NUM_BLOCKS, BLOCK_BYTES, "cpu"), self.pool)

    def read(self, peer: Peer, remote_ids: list[int], local_ids: list[int]) -> None:
        transfer = self.agent.start_read(peer, list(map(BlockId, remote_ids)), list(map(BlockId, local_ids)))
        finish(transfer)
        transfer.release()


def finish(transfer: Transfer) -> None:
    deadline_s = time.monotonic() + 20
    while transfer.poll() is TransferState.RUNNING:
        assert time.monotonic() < deadline_s, "the READ never ended"
        time.sleep(0.0005)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def owner(kind: str) -> Iterator[Owner]:
    owner = LocalOwner() if kind == "local" else NixlOwner()
    yield owner
    owner.kill()


@pytest.fixture
def reader(kind: str) -> Iterator[Reader]:
    reader = Reader(kind)
    yield reader
    reader.agent.close()


def test_blocks_arrive_where_they_were_asked_for_and_nowhere_else(owner: Owner, reader: Reader) -> None:
    peer = reader.agent.connect(owner.metadata, owner.region)
    reader.read(peer, [3, 63, 7], [0, 1, 40])
    expected = np.zeros((NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    expected[0], expected[1], expected[40] = 3, 63, 7
    assert (reader.pool == expected).all()


def test_blocks_land_in_a_pool_that_spaces_them_apart(kind: str, owner: Owner) -> None:
    stride = BLOCK_BYTES + 4096
    pool = np.zeros((4, stride), dtype=np.uint8)
    agent: Agent = open_agent(kind, "arena")
    agent.register(Region(pool.ctypes.data, 4, BLOCK_BYTES, "cpu", stride), pool)
    peer = agent.connect(owner.metadata, owner.region)
    transfer = agent.start_read(peer, [BlockId(5), BlockId(6)], [BlockId(3), BlockId(1)])
    finish(transfer)
    transfer.release()
    agent.close()
    expected = np.zeros((4, stride), dtype=np.uint8)
    expected[3, :BLOCK_BYTES], expected[1, :BLOCK_BYTES] = 5, 6
    assert (pool == expected).all()


def test_connecting_writes_into_no_local_block(owner: Owner, reader: Reader) -> None:
    reader.pool[:] = 200
    reader.agent.connect(owner.metadata, owner.region)
    assert (reader.pool == 200).all()


def test_the_whole_pool_can_be_read_in_one_transfer(owner: Owner, reader: Reader) -> None:
    peer = reader.agent.connect(owner.metadata, owner.region)
    order = list(reversed(range(NUM_BLOCKS)))
    reader.read(peer, order, list(range(NUM_BLOCKS)))
    assert (reader.pool == np.array(order, dtype=np.uint8)[:, None]).all()


@pytest.mark.parametrize(("remote_ids", "local_ids"), [([64], [0]), ([-1], [0]), ([0], [64]), ([0, 1], [0])])
def test_ids_outside_the_pools_are_refused(
    owner: Owner, reader: Reader, remote_ids: list[BlockId], local_ids: list[BlockId]
) -> None:
    peer = reader.agent.connect(owner.metadata, owner.region)
    with pytest.raises(ProtocolError):
        reader.agent.start_read(peer, remote_ids, local_ids)


def test_garbage_metadata_is_refused_and_the_true_peer_still_connects(owner: Owner, reader: Reader) -> None:
    for garbage in (b"", b"garbage", owner.metadata[:-3], owner.metadata[:20], b"\xff" * 500):
        with pytest.raises(ProtocolError):
            reader.agent.connect(garbage, owner.region)
    peer = reader.agent.connect(owner.metadata, owner.region)
    reader.read(peer, [9], [0])
    assert (reader.pool[0] == 9).all()


def test_a_region_that_the_peer_has_not_registered_is_refused(owner: Owner, reader: Reader) -> None:
    true = owner.region
    for region in (
        Region(true.base_address, NUM_BLOCKS + 1, BLOCK_BYTES, "cpu"),
        Region(true.base_address - 1, NUM_BLOCKS, BLOCK_BYTES, "cpu"),
        Region(true.base_address, NUM_BLOCKS, BLOCK_BYTES // 2, "cpu"),
    ):
        with pytest.raises(ProtocolError):
            reader.agent.connect(owner.metadata, region)
    reader.agent.connect(owner.metadata, true)


def test_a_disconnected_peer_cannot_be_read_until_it_is_connected_again(owner: Owner, reader: Reader) -> None:
    peer = reader.agent.connect(owner.metadata, owner.region)
    reader.agent.disconnect(peer)
    reader.agent.disconnect(peer)
    with pytest.raises(FatalTransferError):
        reader.agent.start_read(peer, [BlockId(0)], [BlockId(0)])
    again = reader.agent.connect(owner.metadata, owner.region)
    reader.read(again, [5], [0])
    assert (reader.pool[0] == 5).all()


def test_names_are_unique_per_incarnation(kind: str, reader: Reader) -> None:
    twin = Reader(kind)
    assert twin.agent.name != reader.agent.name
    twin.agent.close()
    twin.agent.close()


def test_a_peer_that_dies_between_two_reads_is_a_fatal_error(kind: str, reader: Reader) -> None:
    owner = LocalOwner() if kind == "local" else NixlOwner()
    try:
        peer = reader.agent.connect(owner.metadata, owner.region)
        reader.read(peer, [1], [0])
    finally:
        owner.kill()
    with pytest.raises(FatalTransferError):
        reader.read(peer, [2], [1])
    reader.agent.disconnect(peer)
    with pytest.raises(TransferError):
        reader.agent.connect(owner.metadata, owner.region)
    assert (reader.pool[0] == 1).all() and (reader.pool[1] == 0).all()


@needs_nixl
@pytest.mark.nixl
def test_processes_that_used_nixl_over_the_network_path_exit_cleanly() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    environment["UCX_TLS"] = "tcp,self"
    done = subprocess.run(
        [sys.executable, str(FOLDER / "pool_reader.py")], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["OK"]), done.stderr
