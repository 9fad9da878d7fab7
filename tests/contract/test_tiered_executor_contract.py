"""What `executor.base.TieredExecutor` promises to lower tiers, on every engine that has them."""

import ctypes
import threading

import pytest
from executor_harness import BLOCK_SIZE, NUM_BLOCKS, WAIT_S, Client

from kelp.core.errors import InvalidRequest
from kelp.core.hashing import seed_hash, sequence_hashes, tenant_digest
from kelp.core.types import FinishReason, Role
from kelp.executor.base import Admitted, Completed, Prefilled, Reserved, Tokens

PROMPT = [5, 9, 2, 40, 33, 7, 7, 1, 60, 12, 3, 3, 8, 50]
"""Three full blocks and a half."""
NAMES = sequence_hashes(PROMPT, BLOCK_SIZE, seed_hash("contract"))
OTHER = [61, 62, 63, 1, 2, 3, 4, 5, 6, 7]


class Watch:
    """Keeps up to `room` blocks at a time, with a copy of what was in them when it was told."""

    def __init__(self, client: Client, room: int = NUM_BLOCKS) -> None:
        self.executor = client.executor
        self.room = room
        self.told = []
        self.kept = []
        self.copies = {}
        self._changed = threading.Condition()

    def __call__(self, blocks):
        with self._changed:
            num_kept = min(self.room - len(self.kept), len(blocks))
            self.told += blocks
            for block in blocks[:num_kept]:
                self.kept.append(block)
                self.copies[block.sequence_hash] = content(self.executor, block.block_id)
            self._changed.notify_all()
            return num_kept

    def wait_kept(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.copies) >= count, WAIT_S), self.told

    def release(self) -> None:
        with self._changed:
            kept, self.kept = self.kept, []
        self.executor.release_kept([block.block_id for block in kept])


def content(executor, block_id: int) -> bytes:
    size = executor.layout.block_bytes
    return ctypes.string_at(executor.pool_memory.base_address + block_id * size, size)


def fill(executor, block_ids, contents) -> None:
    size = executor.layout.block_bytes
    for block_id, raw in zip(block_ids, contents, strict=True):
        ctypes.memmove(executor.pool_memory.base_address + block_id * size, raw, size)


def watched(build, watermark=None, room: int = NUM_BLOCKS, **options) -> tuple[Client, Watch]:
    client = Client(build(**options))
    watch = Watch(client, room)
    client.executor.watch_seals(watch, watermark)
    return client, watch


@pytest.fixture
def below(build) -> dict[bytes, bytes]:
    """What lower tiers have of the prompt."""
    client, watch = watched(build)
    client.submit(PROMPT, max_tokens=1).end()
    watch.wait_kept(3)
    watch.release()
    return {name: watch.copies[name] for name in NAMES}


def flood(client: Client) -> None:
    """Evict everything that nobody holds."""
    for start in range(3):
        client.submit([start + 1] * (NUM_BLOCKS * BLOCK_SIZE - 1), max_tokens=1).end()
    client.settle()


def test_write_through_tells_of_each_block_once_with_its_place(build):
    client, watch = watched(build)
    client.submit(PROMPT, max_tokens=3, tenant=tenant_digest("salt")).end()
    client.submit(PROMPT, max_tokens=3, tenant=tenant_digest("salt")).end()
    client.settle()
    blocks = [block for block in watch.told if block.sequence_hash in NAMES]
    assert [block.sequence_hash for block in blocks] == NAMES
    assert [block.parent for block in blocks] == [None, *NAMES[:-1]]
    assert [block.position for block in blocks] == [0, 1, 2]
    assert {block.tenant for block in blocks} == {tenant_digest("salt")}


def test_kept_blocks_stay_as_they_are_until_released(build):
    client, watch = watched(build, room=3)
    client.submit(PROMPT, max_tokens=1).end()
    watch.wait_kept(3)
    size = (NUM_BLOCKS - 3) * BLOCK_SIZE - 1
    for start in range(3):
        client.submit([start + 1] * size, max_tokens=1).end()
    kept = {block.sequence_hash: block.block_id for block in watch.kept}
    assert {name: content(client.executor, block_id) for name, block_id in kept.items()} == {
        name: watch.copies[name] for name in NAMES
    }
    assert client.executor.count_cached(NAMES) == 3
    watch.room = 0
    watch.release()
    flood(client)
    assert client.executor.count_cached(NAMES) == 0
    assert client.num_unheld_blocks() == NUM_BLOCKS


def test_a_sequence_that_grows_takes_kept_blocks_rather_than_be_preempted(build):
    client, evicted = Client(build()), []
    watch = Watch(client)
    client.executor.watch_seals(watch, None, evicted.extend)
    client.submit(PROMPT, max_tokens=1).end()
    watch.wait_kept(3)
    longest = NUM_BLOCKS * BLOCK_SIZE - len(OTHER)
    assert client.submit(OTHER, max_tokens=longest).finish_reason() is FinishReason.LENGTH
    assert client.executor.load().num_preemptions == 0
    assert set(NAMES) <= set(evicted)
    client.settle()
    watch.release()
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


def test_new_requests_leave_an_eighth_of_the_pool_to_what_is_kept(build):
    client, evicted = Client(build()), []
    watch = Watch(client)
    client.executor.watch_seals(watch, None, evicted.extend)
    long_prompt = [*PROMPT, *PROMPT[::-1]]
    client.submit(long_prompt, max_tokens=1).end()
    watch.wait_kept(len(long_prompt) // BLOCK_SIZE)
    names = sequence_hashes(long_prompt, BLOCK_SIZE, seed_hash("contract"))
    size = (NUM_BLOCKS - NUM_BLOCKS // 8) * BLOCK_SIZE - 1
    client.submit([1] * size, max_tokens=1).end()
    assert set(names) - set(evicted) == set(names[: NUM_BLOCKS // 8])
    watch.room = 0
    watch.release()
    flood(client)
    assert client.num_unheld_blocks() == NUM_BLOCKS


def test_what_the_watch_did_not_keep_is_told_again_when_it_has_room(build):
    client, watch = watched(build, room=1)
    client.submit(PROMPT, max_tokens=1).end()
    for count in (1, 2, 3):
        watch.wait_kept(count)
        watch.release()
    assert list(watch.copies) == NAMES


def test_a_watch_that_was_away_is_told_of_everything_cached_when_it_is_kicked(build):
    client, watch = watched(build, room=0)
    client.submit(PROMPT, max_tokens=1).end()
    client.settle()
    assert not watch.copies
    watch.room = NUM_BLOCKS
    client.executor.release_kept(())
    watch.wait_kept(3)


def test_a_watch_that_raises_keeps_nothing_and_stops_nobody(build):
    client = Client(build())

    def broken(blocks):
        raise RuntimeError("broken watch")

    client.executor.watch_seals(broken, None)
    assert client.submit(PROMPT, max_tokens=3).finish_reason() is FinishReason.LENGTH
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


def test_write_back_tells_only_of_what_is_next_to_be_evicted(build):
    client, watch = watched(build, watermark=0.5)
    client.submit(PROMPT, max_tokens=1).end()
    client.settle()
    assert not watch.told
    client.submit([1] * (NUM_BLOCKS * BLOCK_SIZE // 2), max_tokens=1).end()
    client.submit(OTHER, max_tokens=1).end()
    client.settle()
    names = {block.sequence_hash for block in watch.told}
    assert NAMES[-1] in names, "the tail goes first"
    assert client.executor.load().num_free_blocks < NUM_BLOCKS / 2
    watch.release()
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


@pytest.mark.parametrize("num_brought", [0, 1, 3])
@pytest.mark.parametrize("role", [Role.AGGREGATED, Role.PREFILL])
def test_onboarded_blocks_give_the_tokens_of_a_computed_prompt(build, below, role, num_brought):
    expected = Client(build()).aggregated_tokens(PROMPT, max_tokens=6)
    client, watch = watched(build)
    recorder = client.submit(PROMPT, role, max_tokens=6, onboard_blocks=3)
    reserved = recorder.wait_for(Reserved)
    assert isinstance(recorder.events[0], Admitted)
    assert (len(reserved.block_ids), reserved.num_cached_blocks) == (3, 0)
    assert client.submit(OTHER, max_tokens=4).finish_reason() is FinishReason.LENGTH, "others go on meanwhile"
    fill(client.executor, reserved.block_ids[:num_brought], [below[name] for name in NAMES[:num_brought]])
    client.executor.complete_onboard(recorder.request_id, num_brought)
    end = recorder.end()
    assert isinstance(end, Completed)
    assert recorder.tokens == (expected if role is Role.AGGREGATED else expected[:1])
    assert (end.usage.cached_tokens, end.usage.onboarded_blocks) == (num_brought * BLOCK_SIZE, num_brought)
    client.settle()
    assert [block.sequence_hash for block in watch.told if block.sequence_hash in NAMES] == NAMES[num_brought:]
    if role is Role.PREFILL:
        assert [event.num_tokens for event in recorder.events if isinstance(event, Prefilled)][-1] == len(PROMPT)
        client.executor.release_export(recorder.request_id)
    again = client.submit(PROMPT, max_tokens=1).end()
    assert isinstance(again, Completed) and again.usage.cached_tokens == 3 * BLOCK_SIZE
    watch.release()
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


def test_blocks_that_the_cache_has_are_reserved_with_the_others(build, below):
    client = Client(build())
    client.submit(PROMPT[:6], max_tokens=1).end()
    recorder = client.submit(PROMPT, max_tokens=6, onboard_blocks=3)
    reserved = recorder.wait_for(Reserved)
    assert reserved.num_cached_blocks == 1
    fill(client.executor, reserved.block_ids[1:], [below[name] for name in NAMES[1:]])
    client.executor.complete_onboard(recorder.request_id, 3)
    end = recorder.end()
    assert isinstance(end, Completed)
    assert (end.usage.cached_tokens, end.usage.reused_blocks, end.usage.onboarded_blocks) == (12, 1, 2)
    assert recorder.tokens == Client(build()).aggregated_tokens(PROMPT, max_tokens=6)


def test_without_a_missing_block_nothing_is_reserved(client):
    expected = client.aggregated_tokens(PROMPT, max_tokens=5)
    recorder = client.submit(PROMPT, max_tokens=5, onboard_blocks=3)
    recorder.end()
    assert not any(isinstance(event, Reserved) for event in recorder.events)
    assert recorder.tokens == expected


def test_a_second_request_waits_for_blocks_that_another_one_onboards(build, below):
    client = Client(build())
    first = client.submit(PROMPT, max_tokens=6, onboard_blocks=3)
    reserved = first.wait_for(Reserved)
    second = client.submit(PROMPT, max_tokens=6, onboard_blocks=3)
    fill(client.executor, reserved.block_ids, [below[name] for name in NAMES])
    client.executor.complete_onboard(first.request_id, 3)
    end = second.end()
    assert isinstance(end, Completed)
    assert end.usage.cached_tokens == 12
    assert not any(isinstance(event, Reserved) for event in second.events)
    first.end()
    assert first.tokens == second.tokens


@pytest.mark.parametrize("role", [Role.AGGREGATED, Role.PREFILL])
def test_an_aborted_onboarding_keeps_its_blocks_until_end_import(client, role):
    client.submit(PROMPT[:6], max_tokens=1).end()
    recorder = client.submit(PROMPT, role, onboard_blocks=3)
    recorder.wait_for(Reserved)
    client.executor.abort(recorder.request_id)
    assert recorder.finish_reason() is FinishReason.CANCELLED
    client.executor.release_export(recorder.request_id)
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS - 4
    client.executor.complete_onboard(recorder.request_id, 3)
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS
    client.executor.end_import(recorder.request_id)
    assert client.executor.count_cached(NAMES) == 1, "nothing that was not brought may be found"


def test_an_aborted_prefill_that_onboards_keeps_announced_blocks_for_its_peer(client):
    client.submit(PROMPT[:6], max_tokens=1).end()
    recorder = client.submit(PROMPT, Role.PREFILL, onboard_blocks=3)
    recorder.wait_for(Prefilled)
    client.executor.abort(recorder.request_id)
    client.executor.end_import(recorder.request_id)
    client.settle()
    assert client.num_unheld_blocks() < NUM_BLOCKS
    client.executor.release_export(recorder.request_id)
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


@pytest.mark.parametrize(("role", "num_blocks"), [(Role.AGGREGATED, 4), (Role.AGGREGATED, -1), (Role.DECODE, 1)])
def test_more_blocks_than_a_prompt_can_do_without_computing_are_refused(client, role, num_blocks):
    with pytest.raises(InvalidRequest, match="onboard_blocks"):
        client.submit(PROMPT, role, onboard_blocks=num_blocks)


def test_a_preempted_sequence_that_was_onboarded_gives_the_same_tokens(build, below):
    long = {"max_tokens": 50}
    expected = [Client(build()).aggregated_tokens(prompt, **long) for prompt in (OTHER, PROMPT)]
    client = Client(build())
    older = client.submit(OTHER, **long)
    recorder = client.submit(PROMPT, onboard_blocks=3, **long)
    reserved = recorder.wait_for(Reserved)
    fill(client.executor, reserved.block_ids, [below[name] for name in NAMES])
    client.executor.complete_onboard(recorder.request_id, 3)
    newer = client.submit([9] * 9, max_tokens=60)
    for each in (older, recorder, newer):
        assert each.finish_reason() is FinishReason.LENGTH
    assert client.executor.load().num_preemptions > 0
    assert [older.tokens, recorder.tokens] == expected
    assert sum(isinstance(event, Reserved) for event in recorder.events) == 1
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


def test_a_hint_of_what_is_cached_ends_at_the_first_missing_block(client):
    assert client.executor.count_cached(NAMES) == 0
    assert client.submit(PROMPT[:9], max_tokens=1).finish_reason() is FinishReason.LENGTH
    client.settle()
    assert client.executor.count_cached(NAMES) == 2
    assert isinstance(client.submit(PROMPT, max_tokens=1).wait_for(Tokens), Tokens)
    assert client.executor.count_cached([NAMES[1], NAMES[0][::-1], NAMES[2]]) == 1
