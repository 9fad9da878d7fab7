"""Every parser of what another process says: whatever comes, a typed error, and memory for what came alone."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from kelp.client.direct.wire import (
    Hello,
    Output,
    Outputs,
    Start,
    decode_router_frame,
    decode_worker_frame,
    encode_frame,
)
from kelp.core.clock import SystemClock
from kelp.core.errors import ProtocolError
from kelp.core.handoff_messages import (
    HANDOFF_COMMAND,
    HANDOFF_EVENT,
    PEER_DESCRIPTION,
    Announce,
    Attach,
    PeerDescription,
)
from kelp.core.kv_events import BlocksStored
from kelp.core.kv_manager_messages import Clear, Done, Pin, decode_operations, decode_results, encode_batch
from kelp.core.messages import (
    MAX_WORDS,
    WORKER_COMMAND,
    WORKER_EVENT,
    WORKER_STATUS,
    Finished,
    GenerateCommand,
    SamplingParams,
    WorkerStatus,
)
from kelp.core.types import FinishReason, Role, SequenceHash, WorkerState
from kelp.core.wire import MAX_MESSAGE_BYTES, Message, decode_message, encode_message
from kelp.kv.events.codec import decode_foreign, decode_own
from kelp.kv.events.codec import encode_batch as encode_events
from kelp.kv.events.frames import decode_seq
from kelp.registry.base import (
    KV_MANAGER_RECORD,
    ROUTER_RECORD,
    WORKER_RECORD,
    KvManagerRecord,
    LayoutRecord,
    RouterRecord,
    WorkerRecord,
)
from kelp.registry.record_folder import MAX_RECORD_BYTES, RecordFolder
from kelp.router.replicas import messages as replicas
from kelp.transport.metadata import pack_metadata, unpack_metadata

_LAYOUT = LayoutRecord(
    num_blocks=4, num_layers=1, num_kv_heads=1, block_size=16, head_dim=2, dtype="float32", model_id="m"
)
_COMMAND = GenerateCommand(request_id="r", role=Role.DECODE, sampling=SamplingParams(), seed_hash_hex="0" * 32)
_STATUS = WorkerStatus(
    worker="w", epoch="e", role=Role.DECODE, state="ready", num_running=1, num_waiting=0, num_blocks=4,
    num_free_blocks=3, num_cached_blocks=0, num_leases=0,
)  # fmt: skip
_PEER = PeerDescription(
    worker="w", epoch="e", agent_name="a", agent_metadata_hex="00", base_address=1, device="cpu", num_blocks=4,
    num_layers=1, num_kv_heads=1, block_size=16, head_dim=2, dtype="float32", model_id="m",
)  # fmt: skip
_WORKER = WorkerRecord(
    worker_id="w", epoch="e", model_name="m", role=Role.DECODE, state=WorkerState.READY, endpoint="h:1", layout=_LAYOUT
)
_MANAGER = KvManagerRecord(manager_id="m", epoch="e", host="h", endpoint="h:1", model_name="m")
_ROUTER = RouterRecord(router_id="r", epoch=1, loads_endpoint="h:1", answers_endpoint="h:2")
_LOAD = replicas.ActiveLoad("r", ("w", "e"))
_MAX_EVENT_BYTES = 1 << 22


def _json(adapter: TypeAdapter[object]) -> Callable[[bytes], object]:
    return lambda raw: decode_message(adapter, raw, "peer")


def _document(message: Message) -> bytes:
    return encode_message(message)


def _unframed(frame: Hello | Start | Outputs) -> bytes:
    return bytes(encode_frame(frame))[4:]


PARSERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "worker command": (_json(WORKER_COMMAND), _document(_COMMAND)),
    "worker event": (_json(WORKER_EVENT), _document(Finished(finish_reason=FinishReason.STOP))),
    "worker status": (_json(WORKER_STATUS), _document(_STATUS)),
    "handoff command": (_json(HANDOFF_COMMAND), _document(Attach(handoff_id="h"))),
    "handoff event": (_json(HANDOFF_EVENT), _document(Announce(num_tokens=4, block_ids=(1, 2)))),
    "description": (_json(PEER_DESCRIPTION), _document(_PEER)),
    "worker record": (_json(WORKER_RECORD), _document(_WORKER)),
    "router record": (_json(ROUTER_RECORD), _document(_ROUTER)),
    "manager record": (_json(KV_MANAGER_RECORD), _document(_MANAGER)),
    "router frame": (lambda raw: decode_router_frame(raw, "peer"), _unframed(Start(1, b"{}", b"\0" * 8))),
    "worker frame": (
        lambda raw: decode_worker_frame(raw, "peer"),
        _unframed(Outputs((Output(1, (1, 2), (0.0, 0.0), b"{}"),))),
    ),
    "kv operations": (decode_operations, encode_batch([Pin((b"x" * 16,), 1.0), Clear(None)])),
    "kv results": (decode_results, encode_batch([Done(1)])),
    "events": (
        lambda raw: decode_own(raw, _MAX_EVENT_BYTES),
        encode_events(1.0, [BlocksStored((SequenceHash(b"x" * 16),), None)], 16),
    ),
    "foreign events": (
        lambda raw: decode_foreign(raw, _MAX_EVENT_BYTES),
        encode_events(1.0, [BlocksStored((SequenceHash(b"x" * 16),), None)], 16),
    ),
    "sequence number": (decode_seq, b"\0" * 8),
    "loads": (
        lambda raw: replicas.decode(replicas.Deltas, raw),
        replicas.encode(replicas.Deltas("r", 1, 1, (replicas.Add(_LOAD),))),
    ),
    "snapshot": (
        lambda raw: replicas.decode(replicas.Snapshot, raw),
        replicas.encode(replicas.Snapshot("r", 1, 1, (_LOAD,))),
    ),
    "metadata": (lambda raw: unpack_metadata("nixl", raw), pack_metadata("nixl", "a", b"x")),
}
_BOUNDED_ELSEWHERE = ("metadata", "router frame", "worker frame")
"""By the description that holds it, and by the reader of frames."""
_HEADS = (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")
"""MessagePack's longest arrays, maps, bytes, texts and extensions."""
BOMBS: dict[str, bytes] = {
    "nested lists": b"[" * 100_000,
    "nested maps": b'{"a":' * 100_000,
    "a long number": b"1" * 1_000_000,
    "nested arrays": b"\x91" * 100_000,
    "nested arrays of two": b"\x92\x02" * 100_000,
    **{f"{head.hex()} of {length.hex()}": head + length for head in _HEADS for length in (b"\xff" * 4, b"\0\1\0\0")},
}


def _mutate(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(5), rng.randrange(len(data) + 1)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            data[at : at + 5] = rng.choice(_HEADS) + rng.randbytes(4)
        else:
            data[at:at] = data[: rng.randint(0, 16)]
    return bytes(data)


def _is_typed(parse: Callable[[bytes], object], raw: bytes) -> None:
    try:
        parse(raw)
    except ProtocolError as error:
        assert error.text


@pytest.mark.parametrize("name", PARSERS)
def test_what_it_is_meant_for_is_read(name: str) -> None:
    parse, valid = PARSERS[name]
    parse(valid)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=40)
@given(raw=st.binary(max_size=100), seed=st.integers(0, 2**32))
def test_any_bytes_and_any_damage_is_a_protocol_error_or_a_message(name: str, raw: bytes, seed: int) -> None:
    parse, valid = PARSERS[name]
    _is_typed(parse, raw)
    _is_typed(parse, _mutate(valid, random.Random(seed)))


@pytest.mark.parametrize("name", PARSERS)
def test_what_claims_more_than_it_brings_takes_no_memory(name: str) -> None:
    parse, valid = PARSERS[name]
    raws = [head + bomb for head in (b"", valid[: len(valid) // 2], valid[:-1]) for bomb in BOMBS.values()]
    tracemalloc.start()
    try:
        for raw in raws:
            with pytest.raises(ProtocolError):
                parse(raw)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * max(map(len, raws)) + 2 * 1024 * 1024


@pytest.mark.parametrize("name", [name for name in PARSERS if name not in _BOUNDED_ELSEWHERE])
def test_what_is_too_long_is_refused_by_its_length(name: str) -> None:
    parse, _ = PARSERS[name]
    with pytest.raises(ProtocolError, match=r"exceed|limit|required"):
        parse(b" " * (max(MAX_MESSAGE_BYTES, replicas.MAX_MESSAGE_BYTES) + 1))


def test_a_registry_record_that_is_too_long_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder: RecordFolder[RouterRecord] = RecordFolder(tmp_path, ".json", ROUTER_RECORD, 60.0, SystemClock())
    folder.write("fine", _ROUTER)
    with (tmp_path / "long.json").open("wb") as file:
        file.truncate(2**33)
    tracemalloc.start()
    try:
        assert [record.router_id for record in folder.live()] == ["r"]
        assert tracemalloc.get_traced_memory()[1] < 16 * MAX_RECORD_BYTES
    finally:
        tracemalloc.stop()
    assert f"long.json: it exceeds the limit of {MAX_RECORD_BYTES} bytes" in caplog.text


def test_a_command_may_not_name_words_without_end() -> None:
    document = _COMMAND.model_dump()
    document["sampling"]["stop_token_ids"] = [1] * (MAX_WORDS + 1)
    with pytest.raises(ProtocolError, match="sampling.stop_token_ids"):
        decode_message(WORKER_COMMAND, TypeAdapter(dict).dump_json(document), "command")
