"""The object-store process: NIXL's OBJ agent and boto3, driven by the block manager through a socket pair.

It is a process of its own because a request that is stuck cannot be ended: the manager kills it, and nothing of it is
left. It dies with its manager. Start it through `process.StoreProcess`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys

from kelp.core.errors import KelpError
from kelp.kv.tiers.objects.bucket import Bucket
from kelp.kv.tiers.objects.channel import Channel
from kelp.kv.tiers.objects.groups import GroupMover
from kelp.kv.tiers.objects.header import header_bytes
from kelp.kv.tiers.objects.memory import ArenaView, Lanes
from kelp.kv.tiers.objects.messages import (
    AnyAnswer,
    AnyRequest,
    Ask,
    Asked,
    Delete,
    DeleteDone,
    Get,
    Hello,
    List,
    ListDone,
    Put,
    Ready,
    Refused,
    Spaces,
    SpacesDone,
    decode_request,
    encode,
)
from kelp.kv.tiers.sealing import Sealer
from kelp.transport.nixl.objects import Credentials, NixlObjects, ObjectStore

_PR_SET_PDEATHSIG = 1


class Service:
    """Answers requests, one at a time.

    Raises:
        KelpError: There is no arena, no credentials or no NIXL to work with.
    """

    def __init__(self, hello: Hello) -> None:
        self._hello = hello
        lane_bytes = header_bytes(hello.group_blocks) + hello.group_blocks * hello.arena.block_bytes
        self._lanes = Lanes(hello.num_lanes, lane_bytes)
        sealer = Sealer(hello.encryption_key, hello.space) if hello.encryption_key else None
        arena = ArenaView(hello.arena)
        self._mover = GroupMover(arena, hello.arena.block_bytes, self._lanes, hello.space, sealer)
        self._bucket = Bucket(hello.address, hello.timeout_s)
        self._credentials: Credentials | None = None
        self._objects()

    def answer(self, request: AnyRequest) -> AnyAnswer:
        """Do what is asked; what the store refuses comes back as `Refused`."""
        try:
            return self._answer(request)
        except KelpError as error:
            return Refused(error.text)

    def _answer(self, request: AnyRequest) -> AnyAnswer:
        if isinstance(request, Put):
            self._objects()
            return self._mover.put(request.groups)
        if isinstance(request, Get):
            self._objects()
            return self._mover.get(request.groups, self._hello.group_blocks, self._bucket)
        if isinstance(request, Ask):
            return Asked(self._ask(request.keys))
        if isinstance(request, List):
            return ListDone(*self._bucket.page(request.prefix, request.token))
        if isinstance(request, Spaces):
            return SpacesDone(self._bucket.folders(request.root))
        if isinstance(request, Delete):
            return DeleteDone(*self._bucket.delete(request.keys))
        return Refused("this process has been told already what it works on")

    def _ask(self, keys: tuple[str, ...]) -> tuple[bool, ...]:
        objects = self._objects()
        if not objects.exist(keys[:1])[0]:
            return (False,) * len(keys)
        return (True, *(objects.exist(keys[1:]) if len(keys) > 1 else ()))

    def _objects(self) -> NixlObjects:
        """The agent, made anew if the credentials have changed."""
        credentials = self._bucket.credentials()
        if self._mover.objects is None or credentials != self._credentials:
            address = self._hello.address
            store = ObjectStore(address.bucket, address.endpoint, address.region)
            self._mover.objects = NixlObjects(store, credentials)
            self._mover.objects.register(self._lanes.address, self._lanes.num_bytes)
            self._credentials = credentials
        return self._mover.objects


def _die_with(parent: int) -> None:
    """Be killed as soon as the manager is gone, also while a request is stuck (Linux, prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _serve(channel: Channel) -> None:
    hello = decode_request(channel.receive())
    assert isinstance(hello, Hello)
    try:
        service = Service(hello)
    except KelpError as error:
        channel.send(encode(Refused(error.text)))
        return
    channel.send(encode(Ready()))
    while True:
        channel.send(encode(service.answer(decode_request(channel.receive()))))


def main(descriptor: int, parent: int) -> None:
    """Serve the manager with process id `parent` over an inherited socket until it closes it."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ConnectionError):
        _serve(Channel(socket.socket(fileno=descriptor)))
    # Not by the ordinary way: destroying an agent waits for requests that may never end.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
