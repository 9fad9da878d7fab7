"""What is too long is refused by its length, before anything is read of it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from fuzz.examples import COMMAND, ROUTER
from fuzz.families import FAMILIES
from kelp.core.clock import SystemClock
from kelp.core.errors import ProtocolError
from kelp.core.messages import MAX_WORDS, WORKER_COMMAND
from kelp.core.wire import MAX_MESSAGE_BYTES, decode_message
from kelp.registry.base import ROUTER_RECORD, RouterRecord
from kelp.registry.record_folder import MAX_RECORD_BYTES, RecordFolder
from kelp.router.replicas.messages import MAX_MESSAGE_BYTES as MAX_LOADS_BYTES

BOUNDED = (
    "worker command", "worker event", "worker status", "handoff command", "handoff event", "description",
    "worker record", "router record", "manager record", "traffic record", "kv operations", "kv results", "own events",
    "foreign events", "sequence number", "loads", "snapshot",
)  # fmt: skip
"""Frames and metadata have their bounds in the reader of frames, and in the description around them."""


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_too_long_is_refused_by_its_length(name: str) -> None:
    (parser,) = (parser for family in FAMILIES.values() for parser in family.parsers if parser.name == name)
    with pytest.raises(ProtocolError, match=r"exceed|limit|required"):
        parser.parse(b" " * (max(MAX_MESSAGE_BYTES, MAX_LOADS_BYTES) + 1))


def test_a_registry_record_that_is_too_long_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder: RecordFolder[RouterRecord] = RecordFolder(tmp_path, ".json", ROUTER_RECORD, 60.0, SystemClock())
    folder.write("fine", ROUTER)
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
    document = COMMAND.model_dump()
    document["sampling"]["stop_token_ids"] = [1] * (MAX_WORDS + 1)
    with pytest.raises(ProtocolError, match="sampling.stop_token_ids"):
        decode_message(WORKER_COMMAND, TypeAdapter(dict).dump_json(document), "command")
