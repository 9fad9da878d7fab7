"""Groups of blocks in a real store: by name alone, whole or in part, and never a wrong one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kelp.core.clock import FakeClock
from kelp.kv.tiers.objects.header import header_bytes
from support.object_rig import BLOCK_BYTES, GROUP_BLOCKS, SPACE, Bucket, ObjectRig, Story

HEADER = header_bytes(GROUP_BLOCKS)


def test_a_group_comes_back_as_it_was(host: ObjectRig, bucket: Bucket) -> None:
    story = Story(1, 2 * GROUP_BLOCKS)
    host.put_all(story)

    assert host.find(story) == 2 * GROUP_BLOCKS
    assert host.get(story, 0, 2 * GROUP_BLOCKS) == story.records
    assert bucket.list_keys() == sorted(
        f"kelp/{SPACE.hex()}/{story.tenant.hex()}/{story.names[last].hex()}.{GROUP_BLOCKS}" for last in (3, 7)
    )


def test_another_host_finds_by_name_what_it_has_never_written(host: ObjectRig, other: ObjectRig) -> None:
    story = Story(2, 3 * GROUP_BLOCKS)
    host.put_all(story)

    assert other.find(story) == 3 * GROUP_BLOCKS
    assert other.get(story, 0, 3 * GROUP_BLOCKS) == story.records
    assert other.count("num_asked") == 1


def test_long_prompts_are_found_with_one_question_that_names_a_few_groups(host: ObjectRig, other: ObjectRig) -> None:
    story = Story(21, 40 * GROUP_BLOCKS)
    host.put_all(story)

    assert other.find(story) == 40 * GROUP_BLOCKS
    assert other.count("num_asked") == 1
    assert other.get(story, 18 * GROUP_BLOCKS, 2 * GROUP_BLOCKS) == story.records[18 * GROUP_BLOCKS : 20 * GROUP_BLOCKS]


def test_the_end_of_what_is_stored_is_found_by_asking_again(host: ObjectRig, other: ObjectRig) -> None:
    story = Story(22, 40 * GROUP_BLOCKS)
    for group in range(20):
        host.put(story, group * GROUP_BLOCKS)

    found = [other.find(story) // GROUP_BLOCKS for _ in range(3)]
    assert 16 <= found[0] <= found[1] <= found[2] <= 20


def test_a_group_that_is_missing_among_those_taken_to_be_there_is_not_served(
    host: ObjectRig, other: ObjectRig, bucket: Bucket
) -> None:
    story = Story(23, 40 * GROUP_BLOCKS)
    host.put_all(story)
    bucket.delete(next(key for key in bucket.list_keys() if story.names[4 * GROUP_BLOCKS - 1].hex() in key))

    assert other.find(story) == 40 * GROUP_BLOCKS
    assert other.get(story, 3 * GROUP_BLOCKS, GROUP_BLOCKS) == [None] * GROUP_BLOCKS
    assert other.find(story) == 3 * GROUP_BLOCKS


def test_what_is_written_elsewhere_is_learned_by_a_listing(host: ObjectRig, other: ObjectRig) -> None:
    story = Story(3, 2 * GROUP_BLOCKS)
    host.put_all(story)

    assert sorted(other.tier.refresh()) == sorted([(story.names[3],), (story.names[7],)])
    assert other.find(story) == 2 * GROUP_BLOCKS
    assert other.count("num_asked") == 0


def test_the_writer_knows_all_blocks_of_its_groups(host: ObjectRig) -> None:
    story = Story(4, GROUP_BLOCKS)
    host.put_all(story)
    assert list(host.tier.refresh()) == [tuple(story.names)]


@pytest.mark.parametrize(("first", "num_blocks"), [(2, 2), (1, 6), (3, 3), (5, 7), (2, 1)])
def test_parts_of_groups_are_read_alone(host: ObjectRig, first: int, num_blocks: int) -> None:
    story = Story(5, 3 * GROUP_BLOCKS)
    host.put_all(story)

    assert host.find(story, first) == 3 * GROUP_BLOCKS - first
    before = host.arena.snapshot()
    assert host.get(story, first, num_blocks) == story.records[first : first + num_blocks]
    for slot in [*range(8), *range(8 + num_blocks, 32)]:
        start = host.arena.map.offset_bytes + slot * host.arena.map.stride_bytes
        assert host.arena.content(slot) == before[start : start + BLOCK_BYTES]


def test_large_groups_are_read_in_two_ranges(new_host: Callable[..., ObjectRig]) -> None:
    block_bytes = 200 * 1024
    host = new_host(block_bytes=block_bytes)
    story = Story(6, GROUP_BLOCKS, block_bytes=block_bytes)
    host.put_all(story)
    assert host.get(story, 3, 1) == story.records[3:]
    assert host.get(story, 1, 3) == story.records[1:]


def test_the_end_of_a_group_is_remembered_from_finding_it(host: ObjectRig, other: ObjectRig) -> None:
    story = Story(7, GROUP_BLOCKS)
    host.put_all(story)

    assert other.get(story, 0, 2) == [None, None], "nobody has told it how the group ends"
    assert other.find(story) == GROUP_BLOCKS
    assert other.get(story, 0, 2) == story.records[:2]


def test_a_group_that_the_store_has_is_not_written_again(host: ObjectRig, other: ObjectRig, bucket: Bucket) -> None:
    story = Story(8, GROUP_BLOCKS)
    host.put_all(story)
    written = bucket.client.head_object(Bucket=bucket.name, Key=bucket.list_keys()[0])["LastModified"]

    assert other.put(story)
    assert other.put(story)
    assert (other.count("num_puts"), other.count("num_present")) == (0, 1)
    assert bucket.client.head_object(Bucket=bucket.name, Key=bucket.list_keys()[0])["LastModified"] == written


def test_several_groups_are_written_at_once(host: ObjectRig) -> None:
    story = Story(9, 6 * GROUP_BLOCKS)
    groups = []
    for first in range(0, 6 * GROUP_BLOCKS, GROUP_BLOCKS):
        slots = list(range(first, first + GROUP_BLOCKS))
        host.arena.fill(slots, story.contents[first : first + GROUP_BLOCKS])
        groups.append((slots, story.records[first : first + GROUP_BLOCKS]))
    assert host.tier.put_groups(groups) == [True] * 6
    assert host.get(story, 0, 6 * GROUP_BLOCKS) == story.records


def test_a_slot_that_no_longer_holds_what_it_should_is_not_stored(host: ObjectRig, bucket: Bucket) -> None:
    story, other = Story(10, GROUP_BLOCKS), Story(11, GROUP_BLOCKS)
    host.arena.fill(range(GROUP_BLOCKS), [*story.contents[:3], other.contents[3]])
    assert not host.tier.put(range(GROUP_BLOCKS), story.records)
    assert bucket.list_keys() == []
    assert host.count("num_mismatches") == 1
    assert host.find(story) == 0


def test_what_nobody_stored_is_asked_for_once_in_a_while(new_host: Callable[..., ObjectRig], other: ObjectRig) -> None:
    clock = FakeClock()
    host, story = new_host(clock=clock), Story(12, 2 * GROUP_BLOCKS)
    assert [host.find(story) for _ in range(5)] == [0] * 5
    assert host.count("num_asked") == 1

    other.put_all(story)
    clock.advance(3600)
    assert host.find(story) == 2 * GROUP_BLOCKS


def test_tenants_and_prefixes_see_nothing_of_each_other(
    new_host: Callable[..., ObjectRig], host: ObjectRig, other: ObjectRig
) -> None:
    story = Story(13, GROUP_BLOCKS, salt="one")
    host.put_all(story)
    assert other.tier.find(story.names, 0, Story(13, GROUP_BLOCKS, salt="two").tenant) == 0
    assert new_host(prefix="elsewhere").find(story) == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_block_is_detected_and_its_neighbours_are_served(host: ObjectRig, bucket: Bucket, seed: int) -> None:
    story, chance = Story(20 + seed, GROUP_BLOCKS), random.Random(seed)
    host.put_all(story)
    victim = chance.randrange(GROUP_BLOCKS)
    at = HEADER + victim * BLOCK_BYTES + chance.randrange(BLOCK_BYTES)
    flip = 1 << chance.randrange(8)
    bucket.change(bucket.list_keys()[0], lambda content: content.__setitem__(at, content[at] ^ flip))

    found = host.get(story, 0, GROUP_BLOCKS)
    assert [record is None for record in found] == [index == victim for index in range(GROUP_BLOCKS)]
    assert host.count("num_damaged") == 1
    assert host.tier.is_available, "the store is not at fault"


@pytest.mark.parametrize("at", [0, 20, 40, 60, 200, 300])
def test_a_damaged_header_serves_nothing(host: ObjectRig, bucket: Bucket, at: int) -> None:
    story = Story(30, GROUP_BLOCKS)
    host.put_all(story)
    bucket.change(bucket.list_keys()[0], lambda content: content.__setitem__(at, content[at] ^ 0x10))
    assert host.get(story, 0, GROUP_BLOCKS) == [None] * GROUP_BLOCKS
    assert host.count("num_damaged") == GROUP_BLOCKS


@pytest.mark.parametrize("num_bytes", [0, 10, HEADER - 1, HEADER, HEADER + 1, HEADER + 3 * BLOCK_BYTES + 7])
@pytest.mark.parametrize("first", [0, 3])
def test_truncated_objects_are_detected(host: ObjectRig, bucket: Bucket, num_bytes: int, first: int) -> None:
    story = Story(31, GROUP_BLOCKS)
    host.put_all(story)
    bucket.write(bucket.list_keys()[0], bucket.read(bucket.list_keys()[0])[:num_bytes])
    whole = max(0, (num_bytes - HEADER) // BLOCK_BYTES)
    found = host.get(story, first, GROUP_BLOCKS - first)
    assert [record is not None for record in found] == [index < whole for index in range(first, GROUP_BLOCKS)]
    assert host.count("num_damaged")
    assert host.tier.is_available


def test_objects_of_others_under_our_name_are_not_served(host: ObjectRig, bucket: Bucket) -> None:
    story, other = Story(32, GROUP_BLOCKS), Story(33, GROUP_BLOCKS)
    host.put_all(story)
    host.put_all(other)
    first, second = (next(key for key in bucket.list_keys() if some.names[-1].hex() in key) for some in (story, other))
    bucket.write(first, bucket.read(second))
    assert host.get(story, 0, GROUP_BLOCKS) == [None] * GROUP_BLOCKS
    bucket.write(second, b"<html>" * 10000)
    assert host.get(other, 0, GROUP_BLOCKS) == [None] * GROUP_BLOCKS


def test_a_damaged_group_is_written_anew_when_it_is_offered_again(host: ObjectRig, bucket: Bucket) -> None:
    story = Story(34, GROUP_BLOCKS)
    host.put_all(story)
    bucket.write(bucket.list_keys()[0], b"junk")
    assert host.get(story, 0, GROUP_BLOCKS) == [None] * GROUP_BLOCKS
    host.tier.refresh()
    assert host.find(story) == 0, "it is there, and of no use"

    assert host.put(story)
    assert host.find(story) == GROUP_BLOCKS
    assert host.get(story, 0, GROUP_BLOCKS) == story.records


def test_a_group_that_somebody_deleted_is_missing_and_no_failure(host: ObjectRig, bucket: Bucket) -> None:
    story = Story(35, 2 * GROUP_BLOCKS)
    host.put_all(story)
    bucket.delete(next(key for key in bucket.list_keys() if story.names[-1].hex() in key))
    assert host.get(story, 0, 2 * GROUP_BLOCKS) == [*story.records[:GROUP_BLOCKS], *[None] * GROUP_BLOCKS]
    assert (host.count("num_missing"), host.count("num_failures")) == (1, 0)
    assert host.find(story) == GROUP_BLOCKS


def test_missing_bucket_and_wrong_credentials_are_failures(
    new_host: Callable[..., ObjectRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = new_host(bucket="no-such-bucket", retry_after_s=3600)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong" * 8)
    stranger = new_host(retry_after_s=3600)
    for host in (lost, stranger):
        story = Story(36, GROUP_BLOCKS)
        assert [host.put(story) for _ in range(3)] == [False] * 3
        assert not host.tier.is_available
        assert host.count("num_failures") == 3
        assert host.find(story) == 0
        assert host.get(story, 0, GROUP_BLOCKS) == [None] * GROUP_BLOCKS
        assert host.count("num_failures") == 3, "it is left alone"


def test_encrypted_groups_come_back_and_tell_nobody_anything(
    new_host: Callable[..., ObjectRig], other: ObjectRig, bucket: Bucket
) -> None:
    story, key = Story(37, 2 * GROUP_BLOCKS), bytes(range(32))
    new_host(key=key).put_all(story)
    stored = bucket.read(next(name for name in bucket.list_keys() if story.names[3].hex() in name))
    assert not any(content[:64] in stored for content in story.contents)

    friend = new_host(key=key)
    assert friend.find(story) == 2 * GROUP_BLOCKS
    assert friend.get(story, 1, 7) == story.records[1:]
    assert other.find(story) == 0
    assert new_host(key=bytes(32)).find(story) == 0


def test_a_flipped_bit_of_an_encrypted_block_is_detected(new_host: Callable[..., ObjectRig], bucket: Bucket) -> None:
    host, story = new_host(key=bytes(range(32))), Story(38, GROUP_BLOCKS)
    host.put_all(story)
    bucket.change(bucket.list_keys()[0], lambda content: content.__setitem__(HEADER + 5, content[HEADER + 5] ^ 1))
    assert host.get(story, 0, GROUP_BLOCKS) == [None, *story.records[1:]]
    assert host.count("num_damaged") == 1
