"""Bytes of KV events: vLLM's real frames, ours, and what a hostile peer may send."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kelp.core.errors import ProtocolError
from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored
from kelp.core.types import Tier
from kelp.kv.events.codec import (
    MAX_BATCH_EVENTS,
    MAX_EVENT_HASHES,
    BlockRemoved,
    BlockStored,
    DigestExtension,
    OwnBatch,
    SnapshotExtension,
    TierDigest,
    decode_foreign,
    decode_own,
    encode_batch,
)
from kelp.kv.events.frames import decode_seq, encode_seq
from support.event_doubles import digest16

RECORDED = json.loads((Path(__file__).parent / "vllm_frames.json").read_text())
LIMIT = 1 << 20
EVENTS = (
    BlocksCleared(),
    BlocksRemoved((digest16(9),), Tier.HOST),
    BlocksStored((digest16(1), digest16(2)), None, Tier.DISK),
    BlocksStored((digest16(3),), digest16(2), Tier.OBJECT),
)


def pack(*events: object, ts: object = 1.0) -> bytes:
    return msgspec.msgpack.encode([ts, list(events), None])


def test_our_events_come_back_as_they_were() -> None:
    batch = decode_own(encode_batch(5.0, EVENTS, 16), LIMIT)
    assert batch == OwnBatch(5.0, EVENTS, None)


@pytest.mark.parametrize(
    "extension", [SnapshotExtension(3, True), DigestExtension(2.0, (TierDigest(7, digest16(7)),) * len(Tier))]
)
def test_our_extensions_come_back_and_do_not_disturb_other_decoders(
    extension: SnapshotExtension | DigestExtension,
) -> None:
    payload = encode_batch(5.0, EVENTS[2:3], 16, extension)
    assert decode_own(payload, LIMIT).extension == extension
    stored = decode_foreign(payload, LIMIT).events[0]
    assert isinstance(stored, BlockStored)
    assert stored.block_hashes == [digest16(1), digest16(2)]


def test_frames_of_the_real_vllm_publisher_are_read() -> None:
    *batches, end = [[bytes.fromhex(frame) for frame in frames] for frames in RECORDED["frames"]]
    assert decode_seq(end[2]) == -1
    assert [decode_seq(frames[2]) for frames in batches] == list(range(7))
    first, second, third, *_, last = [decode_foreign(frames[3], LIMIT) for frames in batches]
    stored = first.events[0]
    assert isinstance(stored, BlockStored)
    assert (stored.block_hashes, stored.parent_block_hash, stored.medium) == ([2**63 + 1, 2], None, "GPU")
    assert (stored.token_ids, stored.block_size, stored.group_idx) == (list(range(8)), 4, 0)
    assert (second.ts, second.events[0].session_id) == (1001.0, "s")  # type: ignore[union-attr]
    assert third.events[0].block_hashes == [bytes(range(32))]  # type: ignore[union-attr]
    assert [type(event) for event in last.events] == [BlockRemoved, BlockRemoved]


def test_positional_events_of_older_engines_are_read() -> None:
    stored = ["BlockStored", [1, -2], 7, [1, 2], 1, None, "GPU"]
    batch = decode_foreign(pack(stored, ["BlockRemoved", [1]], ["AllBlocksCleared"]), LIMIT)
    first, second, _ = batch.events
    assert isinstance(first, BlockStored) and isinstance(second, BlockRemoved)
    assert (first.block_hashes, first.parent_block_hash, first.medium, first.lora_name) == ([1, -2], 7, "GPU", None)
    assert second.medium is None


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "truncated"),
        (pack() + b"\0", "trailing"),
        (pack(*[{"type": "AllBlocksCleared"}] * (MAX_BATCH_EVENTS + 1)), "length"),
        (pack({"type": "BlockRemoved", "block_hashes": [1] * (MAX_EVENT_HASHES + 1), "medium": "GPU"}), "length"),
        (pack({"type": "BlockRemoved", "block_hashes": [b"x" * 65], "medium": "GPU"}), "length"),
        (pack({"type": "BlockRemoved", "block_hashes": ["text"], "medium": "GPU"}), "Expected"),
        (pack({"type": "Unheard"}), "Invalid value"),
        (pack(ts="now"), "float"),
        (b"\x93\xcb" + b"\0" * 8 + b"\x91\x81\xa1x" + b"\x91" * 100_000, "recursion"),
        (b"\x93\xcb" + b"\0" * 8 + b"\xdd\xff\xff\xff\xff", "length"),
    ],
)
def test_what_is_no_batch_is_refused(payload: bytes, reason: str) -> None:
    for decode in (decode_own, decode_foreign):
        with pytest.raises(ProtocolError, match=f"(?i){reason}|Expected"):
            decode(payload, 16 * LIMIT)


def test_a_kelp_worker_must_send_sequence_hashes() -> None:
    for hashes in ([b"short"], [1], []):
        event = {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"}
        with pytest.raises(ProtocolError):
            decode_own(pack(event), LIMIT)


def test_a_message_beyond_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match=r"101 bytes exceed events\.max_message_bytes=100"):
        decode_own(b"\xc1" * 101, 100)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_batch_or_a_protocol_error(raw: bytes) -> None:
    for payload in (raw, b"\x93\xcb" + b"\0" * 8 + raw, encode_batch(0.0, EVENTS, 16)[: len(raw)] + raw):
        for decode in (decode_own, decode_foreign):
            try:
                decode(payload, LIMIT)
            except ProtocolError:
                continue


def test_sequence_numbers_are_eight_bytes() -> None:
    assert [decode_seq(encode_seq(seq)) for seq in (-1, 0, 2**62)] == [-1, 0, 2**62]
    for frame in (b"", b"\0" * 7, b"\0" * 9, b"\xff" * 7 + b"\0"):
        with pytest.raises(ProtocolError):
            decode_seq(frame)
