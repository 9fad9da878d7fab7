from __future__ import annotations

import numpy as np
import pytest

from kelp.core.errors import FatalTransferError, RetryableTransferError
from kelp.core.types import BlockId
from kelp.transport import open_agent
from kelp.transport.base import Region, TransferState
from kelp.transport.local import LocalAgent, LocalPeer, ReadFaults


class Pair:
    """Two connected agents; block *b* of the remote pool holds the byte *b* + 1."""

    def __init__(self) -> None:
        self.faults = ReadFaults()
        self.remote = np.repeat(np.arange(1, 5, dtype=np.uint8), 8).reshape(4, 8)
        self.local = np.zeros((4, 8), dtype=np.uint8)
        self.owner, self.agent = LocalAgent("owner"), LocalAgent("reader", self.faults)
        self.owner.register(Region(self.remote.ctypes.data, 4, 8, "cpu"), self.remote)
        self.agent.register(Region(self.local.ctypes.data, 4, 8, "cpu"), self.local)
        self.peer: LocalPeer = self.agent.connect(self.owner.metadata(), Region(self.remote.ctypes.data, 4, 8, "cpu"))


def test_the_chosen_read_fails_and_moves_nothing() -> None:
    pair = Pair()
    pair.faults.fail(1, RetryableTransferError("flaky"))
    assert pair.agent.start_read(pair.peer, [BlockId(0)], [BlockId(0)]).poll() is TransferState.DONE
    failing = pair.agent.start_read(pair.peer, [BlockId(1)], [BlockId(1)])
    with pytest.raises(RetryableTransferError, match="flaky"):
        failing.poll()
    assert pair.local[:, 0].tolist() == [1, 0, 0, 0]


def test_a_stalled_read_lands_late_even_after_its_release() -> None:
    pair = Pair()
    stalled = pair.faults.stall(0)
    transfer = pair.agent.start_read(pair.peer, [BlockId(2)], [BlockId(0)])
    assert stalled.is_posted.is_set() and transfer.poll() is TransferState.RUNNING
    transfer.release()
    stalled.resume()
    assert pair.local[0].tolist() == [3] * 8


def test_a_stalled_read_lands_no_more_once_the_peer_is_disconnected() -> None:
    pair = Pair()
    stalled = pair.faults.stall(0)
    transfer = pair.agent.start_read(pair.peer, [BlockId(2)], [BlockId(0)])
    pair.agent.disconnect(pair.peer)
    stalled.resume()
    assert pair.local[0].tolist() == [0] * 8
    with pytest.raises(FatalTransferError, match="disconnected"):
        transfer.poll()


def test_a_stalled_read_notices_that_its_peer_has_gone() -> None:
    pair = Pair()
    pair.faults.stall(0)
    transfer = pair.agent.start_read(pair.peer, [BlockId(2)], [BlockId(0)])
    pair.owner.close()
    with pytest.raises(FatalTransferError, match="gone"):
        transfer.poll()


def test_the_configured_transport_is_opened_by_name() -> None:
    agent = open_agent("local", "decode")
    assert isinstance(agent, LocalAgent) and agent.name.startswith("decode:")
