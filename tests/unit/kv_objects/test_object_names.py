"""Names of objects, their headers, and how blocks fall into groups."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kelp.core.types import SequenceHash
from kelp.kv.tiers.objects.header import GroupSpace, StoredBlock, header_bytes, pack_header, unpack_header
from kelp.kv.tiers.objects.names import KeySpace
from kelp.kv.tiers.objects.runs import group_ends, group_runs, spread
from support.object_rig import BLOCK_BYTES, Story

SPACE, TENANT, LAST = bytes(16), b"t" * 16, SequenceHash(b"h" * 16)


@pytest.mark.parametrize("prefix", ["kelp", "/a/b/", "", "with.dot+plus"])
def test_a_key_says_who_and_what(prefix: str) -> None:
    keys = KeySpace(prefix, SPACE, 4)
    key = keys.key(TENANT, LAST)
    assert not key.startswith("/")
    assert key.startswith(keys.tenant_prefix(keys.own_prefix, TENANT))
    name = keys.parse(key)
    assert name is not None
    assert (name.tenant, name.last, name.is_usable) == (TENANT, LAST, True)


def test_objects_of_other_variants_and_spaces_are_ours_to_delete_but_not_to_read() -> None:
    keys = KeySpace("kelp", SPACE, 4)
    for other in (KeySpace("kelp", SPACE, 5), KeySpace("kelp", SPACE, 4, b"k" * 8), KeySpace("kelp", b"s" * 16, 4)):
        name = keys.parse(other.key(TENANT, LAST))
        assert name is not None
        assert not name.is_usable


@pytest.mark.parametrize(
    "key", ["", "kelp/", "kelp/readme.txt", "other/" + KeySpace("kelp", SPACE, 4).key(TENANT, LAST)]
)
def test_what_is_not_ours_is_nobody_s(key: str) -> None:
    assert KeySpace("kelp", SPACE, 4).parse(key) is None


def _stored(seed: int, num_blocks: int) -> tuple[GroupSpace, list[StoredBlock]]:
    story = Story(seed, num_blocks, block_bytes=8)
    blocks = [StoredBlock(record, bytes([index]) * 28) for index, record in enumerate(story.records)]
    return GroupSpace(SPACE, story.tenant, BLOCK_BYTES), blocks


@given(st.integers(0, 1000), st.integers(1, 64))
def test_a_header_says_what_was_packed(seed: int, num_blocks: int) -> None:
    space, blocks = _stored(seed, num_blocks)
    raw = pack_header(space, blocks)
    assert len(raw) == header_bytes(num_blocks)
    assert len(raw) % 4096 == 0
    assert unpack_header(raw, space, num_blocks) == blocks


@given(st.integers(0, 1000), st.integers(0, 8 * 300 - 1))
def test_any_flipped_bit_makes_a_header_worthless(seed: int, bit: int) -> None:
    space, blocks = _stored(seed, 3)
    raw = bytearray(pack_header(space, blocks))
    raw[bit // 8] ^= 1 << bit % 8
    assert unpack_header(bytes(raw), space, 3) is None


@given(st.binary(max_size=5000))
def test_any_bytes_are_no_header(raw: bytes) -> None:
    space, _ = _stored(1, 1)
    assert unpack_header(raw, space, 1) is None


def test_a_header_of_another_space_tenant_key_or_size_is_none() -> None:
    space, blocks = _stored(2, 3)
    raw = pack_header(space, blocks)
    others = [
        GroupSpace(b"x" * 16, space.tenant, BLOCK_BYTES),
        GroupSpace(SPACE, TENANT, BLOCK_BYTES),
        GroupSpace(SPACE, space.tenant, BLOCK_BYTES + 1),
        GroupSpace(SPACE, space.tenant, BLOCK_BYTES, b"k" * 8),
    ]
    assert [unpack_header(raw, other, 3) for other in others] == [None] * 4
    assert unpack_header(raw, space, 2) is None
    assert unpack_header(raw, space, 4) is None


def test_blocks_that_do_not_follow_each_other_are_no_group() -> None:
    space, blocks = _stored(3, 3)
    assert unpack_header(pack_header(space, [blocks[0], blocks[2]]), space, 2) is None
    assert unpack_header(pack_header(space, [blocks[1], blocks[0]]), space, 2) is None


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 40))
def test_every_block_is_in_the_group_of_its_position(group_blocks: int, first: int, num_blocks: int) -> None:
    story = Story(4, 90, block_bytes=1)
    moves = [(story.names[first + index], index) for index in range(num_blocks)]
    ends = {name: story.names[position // group_blocks * group_blocks + group_blocks - 1]
            for position, name in enumerate(story.names[:80])}  # fmt: skip
    seen = []
    for run in group_runs(moves, first, group_blocks, ends.get):
        for offset, (name, slot) in enumerate(zip(run.names, run.slots, strict=True)):
            assert run.last == ends[name]
            assert (first + run.start + offset) % group_blocks == run.first + offset
            assert moves[run.start + offset] == (name, slot)
            seen.append(slot)
    assert seen == list(range(num_blocks))
    whole = group_ends(num_blocks, first, group_blocks)
    assert all((first + end + 1) % group_blocks == 0 for end in whole)
    assert len(whole) == (first + num_blocks) // group_blocks - first // group_blocks


def test_a_group_whose_end_is_unknown_is_left_out() -> None:
    story = Story(5, 8, block_bytes=1)
    moves = [(name, slot) for slot, name in enumerate(story.names[:6])]
    runs = list(group_runs(moves, 0, 4, lambda name: None))
    assert [run.slots for run in runs] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 60, 480])
def test_a_question_names_the_first_and_the_last_group_and_evenly_some_between(count: int) -> None:
    indices = spread(count, 16)
    assert len(indices) == min(count, 16)
    assert (indices[0], indices[-1]) == (0, count - 1)
    gaps = [after - before for before, after in zip(indices, indices[1:], strict=False)]
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
