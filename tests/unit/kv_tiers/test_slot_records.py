from __future__ import annotations

import msgspec
import pytest

from kelp.kv.tiers.records import RECORD_BYTES, RecordFormat, SlotRecord, checksum, space_digest
from support.tier_rig import BLOCK_BYTES, SPACE, block, content, name

FORMAT = RecordFormat(b"space" + bytes(11))


@pytest.mark.parametrize("number", [0, 1, 2**31 - 1])
def test_a_record_says_what_was_put_into_it(number: int) -> None:
    record = SlotRecord(block(number), BLOCK_BYTES, key_id=b"k" * 8, seal=b"s" * 28)
    raw = FORMAT.pack(3, record)
    assert len(raw) == RECORD_BYTES <= 160
    assert FORMAT.unpack(3, raw) == record


def test_a_record_with_any_damaged_byte_is_none() -> None:
    raw = FORMAT.pack(3, SlotRecord(block(1), BLOCK_BYTES))
    meaningful = len(raw.rstrip(b"\0"))
    for position in range(meaningful):
        damaged = bytearray(raw)
        damaged[position] ^= 0x10
        assert FORMAT.unpack(3, bytes(damaged)) is None


def test_a_torn_record_is_none() -> None:
    old, new = FORMAT.pack(3, SlotRecord(block(1), BLOCK_BYTES)), FORMAT.pack(3, SlotRecord(block(2), BLOCK_BYTES))
    for cut in range(9, 109):
        assert FORMAT.unpack(3, new[:cut] + old[cut:]) is None
        assert FORMAT.unpack(3, new[:cut]) is None


def test_a_record_counts_only_in_its_slot_and_space() -> None:
    raw = FORMAT.pack(3, SlotRecord(block(1), BLOCK_BYTES))
    assert FORMAT.unpack(4, raw) is None
    assert RecordFormat(b"other" + bytes(11)).unpack(3, raw) is None


def test_an_empty_place_is_none() -> None:
    assert FORMAT.unpack(0, bytes(RECORD_BYTES)) is None
    assert FORMAT.unpack(0, b"") is None


def test_the_checksum_depends_on_bytes_and_name() -> None:
    right = checksum(content(1), name(1))
    assert len(right) == 8
    assert right == checksum(memoryview(content(1)), name(1))
    assert right != checksum(content(1), name(2))
    assert right != checksum(content(2), name(1))


def test_spaces_differ_in_every_field() -> None:
    changed = {"dtype": "float16", "model_id": "n"}
    digests = {space_digest(SPACE, 64), space_digest(SPACE, 128)}
    for field in SPACE.__struct_fields__:
        other = msgspec.structs.replace(SPACE, **{field: changed.get(field, 7)})
        digests.add(space_digest(other, 64))
    assert len(digests) == 2 + len(SPACE.__struct_fields__)
