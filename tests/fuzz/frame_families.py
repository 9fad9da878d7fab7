"""What comes in MessagePack frames: direct channels, the KV block manager, KV events, and routers' loads.

Whoever reads a stream is fed whole conversations: an input is a list of frames.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import zmq

from fuzz.conversations import feed_events, feed_loads, join_manager, router_end, worker_end
from fuzz.examples import COMMAND
from fuzz.parsers import Family, Parser, WrongOutcome
from kelp.client.direct.wire import (
    Cancel,
    Control,
    Hello,
    Output,
    Outputs,
    Refusal,
    Start,
    Welcome,
    decode_router_frame,
    decode_worker_frame,
    encode_frame,
)
from kelp.core.clock import FakeClock
from kelp.core.config import EventsConfig
from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored
from kelp.core.kv_manager_messages import (
    Await,
    Clear,
    Commit,
    Done,
    GetStats,
    Join,
    Joined,
    Leased,
    Match,
    Matched,
    OfferedBlock,
    Onboard,
    Operation,
    Pin,
    PoolRecord,
    Refused,
    Release,
    Renew,
    Renewed,
    SlotRef,
    SpaceRecord,
    Stats,
    Store,
    Stored,
    Unknown,
    decode_operations,
    decode_results,
    encode_batch,
)
from kelp.core.messages import Finished, StatusCommand
from kelp.core.types import FinishReason, SequenceHash, Tier
from kelp.core.wire import encode_message
from kelp.kv.events.answers import AnswerDesk
from kelp.kv.events.codec import DigestExtension, SnapshotExtension, TierDigest, decode_foreign, decode_own
from kelp.kv.events.codec import encode_batch as encode_events
from kelp.kv.events.frames import (
    SNAPSHOT_REQUEST,
    decode_seq,
    digest_topic,
    encode_seq,
    events_topic,
    snapshot_topic,
)
from kelp.kv.events.stream import EventStream
from kelp.router.replicas import messages as replicas

_MAX_EVENT_BYTES = 1 << 22
_HASH = SequenceHash(b"x" * 16)
_OTHER = SequenceHash(b"y" * 16)


def pack(*parts: Any) -> bytes:
    return msgspec.msgpack.encode(parts)


def _framed(*frames: Any) -> bytes:
    """A conversation: what comes in each of the socket's readings."""
    return pack(*(bytes(encode_frame(frame)) for frame in frames))


def _body(frame: Any) -> bytes:
    return bytes(encode_frame(frame))[4:]


_HELLO = Hello(1, "h:1/m", "e")
_GENERATE = Start(0, encode_message(COMMAND), np.arange(3, dtype="<i4").tobytes())
_SAID = Outputs((Output(0, (1, 2), (0.0, -1.0)),))
_LAST = Output(0, (), (), encode_message(Finished(finish_reason=FinishReason.STOP)), "", True)
DIRECT_CHANNEL = Family(
    "direct_channel",
    (
        Parser(
            "router frame", lambda raw: decode_router_frame(raw, "peer"),
            (_body(_HELLO), _body(_GENERATE), _body(Cancel(1)), _body(Control(1, b"{}"))), "msgpack",
        ),
        Parser(
            "worker frame", lambda raw: decode_worker_frame(raw, "peer"),
            (_body(Welcome(1)), _body(Refusal("no")), _body(_SAID), _body(Outputs((_LAST,)))), "msgpack",
        ),
        Parser(
            "worker's end", worker_end,
            (_framed(_HELLO, _GENERATE, Control(1, encode_message(StatusCommand())), Cancel(1)),), "msgpack", (),
        ),
        Parser(
            "router's end", router_end,
            (_framed(Welcome(1), _SAID, Outputs((_LAST,))),
             _framed(Welcome(1), Refusal("[KELP_WORKER_LOST] no"))), "msgpack", (),
        ),
    ),
)  # fmt: skip


def _round_trip(raw: bytes) -> list[Operation]:
    operations = decode_operations(raw)
    if decode_operations(encode_batch(operations)) != operations:
        raise WrongOutcome("operations change when they are written again")
    return operations


_SPACE = SpaceRecord(1, 1, 16, 2, "float32", "m", 1)
_POOL = PoolRecord(b"\0", 4096, 4, 64, 4096, "cpu")
_IDS = ("w", "e")
KV_MANAGER = Family(
    "kv_manager",
    (
        Parser(
            "kv operations", _round_trip,
            (
                encode_batch([Pin((b"x" * 16,), 1.0), Clear(None), Clear(b"t" * 16, (Tier.DISK,)), GetStats()]),
                encode_batch([Join(*_IDS, _SPACE, _POOL), Commit(*_IDS, 1), Renew(*_IDS, (1, 2)), Await(*_IDS, 1, 2)]),
                encode_batch([Store(*_IDS, 1, b"t" * 16, 1.0, (OfferedBlock(b"x" * 16, b"", 0, 3),), True)]),
                encode_batch([Onboard(*_IDS, 1, b"t" * 16, (b"x" * 16,), 0, 0.5, 1.0), Release(*_IDS, (1,))]),
                encode_batch([Match((b"x" * 16,)), Match((b"x" * 16,), 3, b"t" * 16)]),
            ), "msgpack",
        ),
        Parser(
            "kv results", decode_results,
            (
                encode_batch([Done(1), Stored(1, 2), Renewed((1,)), Unknown("lease"), Refused("full")]),
                encode_batch([Joined("e", _POOL, 1.0, (Tier.HOST,)), Stats({"a": 1.0}), Matched((0, 1, 2, 3))]),
                encode_batch([Leased(1, (SlotRef(1, b"c" * 8),), (0, 1, 0, 0))]),
            ), "msgpack",
        ),
        Parser("join", join_manager, (encode_batch([Join(*_IDS, _SPACE, _POOL)]),), "msgpack"),
    ),
)  # fmt: skip
_DIGEST = DigestExtension(2.0, (TierDigest(1, b"x" * 16), *(TierDigest(0, bytes(16)),) * 3))
_OWN = (
    encode_events(1.0, [BlocksCleared(), BlocksStored((_HASH, _OTHER), None)], 16),
    encode_events(1.0, [BlocksStored((_OTHER,), _HASH, Tier.HOST), BlocksRemoved((_OTHER,))], 16),
    encode_events(1.0, [], 16, _DIGEST),
    encode_events(1.0, [BlocksStored((_HASH,), None)], 16, SnapshotExtension(0, True)),
)
_STORED = {
    "type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": None, "token_ids": list(range(8)),
    "block_size": 4, "lora_id": None, "medium": "GPU", "lora_name": None,
}  # fmt: skip
_CHILD = {**_STORED, "block_hashes": [b"h" * 32], "parent_block_hash": 2, "token_ids": [1, 2, 3, 4],
          "extra_keys": [["salt"]], "group_idx": 0, "kv_cache_spec_kind": "full_attention"}  # fmt: skip
_SALTED = {**_STORED, "block_hashes": [3, 4], "lora_name": "a", "lora_id": 1, "extra_keys": [["a", "salt"], None]}
_REMOVED = {"type": "BlockRemoved", "block_hashes": [1], "medium": "CPU"}
_FOREIGN = (
    pack(1.0, [_STORED, _CHILD, _SALTED, _REMOVED], 0),
    pack(1.0, [{**_STORED, "token_ids": []}, {"type": "AllBlocksCleared"}]),
    pack(1.0, [["BlockStored", [1, 2], None, list(range(8)), 4, None, "GPU"], ["BlockRemoved", [1]],
               ["AllBlocksCleared"]]),
)  # fmt: skip
_LIVE, _ANSWER = 0, 1
_TOPIC = events_topic("e")


class _Questions:
    """A ROUTER socket that has been asked."""

    def __init__(self, questions: list[list[bytes]]) -> None:
        self._questions = questions

    def recv_multipart(self, flags: int) -> list[bytes]:
        if not self._questions:
            raise zmq.Again
        return self._questions.pop()

    def send_multipart(self, frames: list[bytes], flags: int) -> None:
        pass


def _asked(raw: bytes) -> int:
    """Whoever asks a publisher for what it missed."""
    try:
        questions = msgspec.msgpack.decode(raw, type=list[list[bytes]])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0
    clock = FakeClock()
    stream = EventStream("e", 16, EventsConfig(), clock)
    stream.put(BlocksStored((_HASH,), None))
    desk = AnswerDesk(_Questions(questions), stream, lambda _: None, clock, 1.0)  # type: ignore[arg-type]
    for _ in range(3):
        desk.receive()
        desk.send()
    return len(questions)


KV_EVENTS = Family(
    "kv_events",
    (
        Parser("own events", lambda raw: decode_own(raw, _MAX_EVENT_BYTES), _OWN, "msgpack"),
        Parser("foreign events", lambda raw: decode_foreign(raw, _MAX_EVENT_BYTES), (*_FOREIGN, _OWN[0]), "msgpack"),
        Parser("sequence number", decode_seq, (bytes(8), encode_seq(-1))),
        Parser(
            "a router's subscription", feed_events,
            (
                pack([_LIVE, _TOPIC, encode_seq(0), _OWN[0]], [_LIVE, _TOPIC, encode_seq(1), _OWN[1]],
                     [_LIVE, digest_topic("e"), encode_seq(1), _OWN[2]]),
                pack([_ANSWER, b"", snapshot_topic("e"), encode_seq(5), _OWN[3]],
                     [_ANSWER, b"", b"", encode_seq(-1), b""], [_LIVE, _TOPIC, encode_seq(7), _OWN[1]],
                     [_ANSWER, b"", _TOPIC, encode_seq(6), _OWN[0]]),
                pack(*([_LIVE, b"kv", encode_seq(number), raw] for number, raw in enumerate(_FOREIGN))),
                pack(*([_LIVE, b"", encode_seq(number), raw] for number, raw in enumerate(_FOREIGN)),
                     [_LIVE, b"", encode_seq(0), _FOREIGN[0]]),
            ), "msgpack", (),
        ),
        Parser("a publisher's questions", _asked,
               (pack([b"a", b"", encode_seq(0)], [b"b", b"", SNAPSHOT_REQUEST], [b"a"]),), "msgpack", ()),
    ),
)  # fmt: skip
_LOAD = replicas.ActiveLoad("q", ("host:1/a", "epoch of a"), ("host:1/b", "epoch of b"), 32, (1.0, 0.0, 0.0, 1.0, 0.0))
_DELTAS = replicas.Deltas("r", 1, 1, (replicas.Add(_LOAD),))
_MORE = replicas.Deltas("r", 1, 2, (replicas.PrefillDone("q"), replicas.Renew(("q",)), replicas.Free("q")))
_SNAPSHOT = replicas.Snapshot("r", 1, 1, (_LOAD,))
REPLICAS = Family(
    "replicas",
    (
        Parser(
            "loads", lambda raw: replicas.decode(replicas.Deltas, raw),
            (replicas.encode(_DELTAS), replicas.encode(_MORE)), "msgpack",
        ),
        Parser(
            "snapshot", lambda raw: replicas.decode(replicas.Snapshot, raw), (replicas.encode(_SNAPSHOT),), "msgpack"
        ),
        Parser(
            "another router's loads in use", feed_loads,
            (pack(*map(replicas.encode, (_DELTAS, _MORE))), pack(*map(replicas.encode, (_SNAPSHOT, _MORE, _DELTAS)))),
            "msgpack", (),
        ),
    ),
)  # fmt: skip
