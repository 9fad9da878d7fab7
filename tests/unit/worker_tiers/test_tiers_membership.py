"""Finding, leaving and finding again the manager of a host, and what blocks go through meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from tiers_rig import BLOCK_SIZE, NUM_BLOCKS, names_of, open_rig

from kelp.client.base import KvManagerClient, WorkerAddress
from kelp.core.clock import FakeClock, SystemClock
from kelp.core.errors import DeadlineExceeded, InvalidRequest, WorkerLost
from kelp.core.hashing import tenant_digest
from kelp.core.kv_manager_messages import Commit, Join, Onboard, Result, Store
from kelp.core.metrics import KV_MANAGER_JOINED, OFFLOAD_BLOCKS, Metrics
from kelp.core.types import BlockId, SequenceHash
from kelp.executor.base import Completed, SealedBlock
from kelp.registry.base import KvManagerRecord
from kelp.worker.tiers import offloader, service
from kelp.worker.tiers.buffer import OffloadBuffer
from kelp.worker.tiers.leases import LeaseBook
from kelp.worker.tiers.link import Links
from kelp.worker.tiers.membership import MemberParts, Membership
from kelp.worker.tiers.pace import DUTY, Pace
from kelp.worker.tiers.service import manager_for
from support.waiting import until

SHORT_LEASES = {"kv_manager.lease_ttl_s": "0.3"}


def record(host: str, number: int) -> KvManagerRecord:
    return KvManagerRecord(
        manager_id=f"{host}:{number}/kv", epoch="e", host=host, endpoint="h:1", model_name="kv", heartbeat_ns=number
    )


def test_the_newest_manager_of_the_own_host_is_chosen() -> None:
    records = [record("here", 1), record("here", 3), record("there", 9), record("here", 2)]
    assert manager_for("here", records, use_other_hosts=False) == records[1]
    assert manager_for("nowhere", records, use_other_hosts=False) is None


def test_a_host_without_manager_may_use_that_of_another() -> None:
    records = [record("here", 1), record("there", 9), record("far", 2)]
    assert manager_for("here", records, use_other_hosts=True) == records[0]
    assert manager_for("nowhere", records, use_other_hosts=True) in records
    assert manager_for("nowhere", [], use_other_hosts=True) is None


def test_which_other_host_is_used_does_not_depend_on_clocks() -> None:
    hour_ns = 3600 * 10**9
    hosts = [f"host-{number}" for number in range(20)]
    chosen = []
    for there, far in ((1, 2), (hour_ns, 2), (1, hour_ns)):
        records = [
            KvManagerRecord(
                manager_id=f"{name}/kv", epoch=name, host=name, endpoint="h:1", model_name="kv", heartbeat_ns=beat_ns
            )
            for name, beat_ns in (("there", there), ("far", far))
        ]
        found = [manager_for(host, records, use_other_hosts=True) for host in hosts]
        chosen.append([each and each.host for each in found])
    assert chosen[0] == chosen[1] == chosen[2]
    assert set(chosen[0]) == {"there", "far"}, "both are used, each by some hosts"


def test_a_failed_manager_of_another_host_is_chosen_last_but_not_never() -> None:
    records = [
        KvManagerRecord(manager_id=f"{name}/kv", epoch=name, host=name, endpoint="h:1", model_name="kv")
        for name in ("a", "b", "c")
    ]
    failed: list[str] = []
    for _ in range(3):
        found = manager_for("nowhere", records, use_other_hosts=True, failed=failed)
        assert found is not None
        failed.append(found.epoch)
    assert sorted(failed) == ["a", "b", "c"]
    found = manager_for("nowhere", records, use_other_hosts=True, failed=failed)
    assert found is not None and found.epoch == failed[0]
    at_home = record("here", 1)
    assert manager_for("here", [*records, at_home], use_other_hosts=True, failed=["e"]) == at_home


def test_while_one_manager_does_not_answer_another_is_tried() -> None:
    asked: list[str] = []

    class Deaf:
        async def call(self, address: WorkerAddress, operations: object, timeout_s: float) -> list[Result]:
            asked.append(address.epoch)
            raise WorkerLost("nobody there")

    records = [
        KvManagerRecord(manager_id=f"{name}/kv", epoch=name, host=name, endpoint="h:1", model_name="kv")
        for name in ("a", "b")
    ]
    parts = MemberParts(
        name="w",
        find=lambda failed: manager_for("nowhere", records, True, failed),
        introduce=lambda: cast(Join, None),
        client=cast(KvManagerClient, Deaf()),
        links=cast(Links, None),
        clock=SystemClock(),
        metrics=Metrics(),
        on_change=lambda: None,
        call_timeout_s=1.0,
        poll_s=1e-3,
    )

    async def scenario() -> None:
        running = asyncio.ensure_future(Membership(parts).run())
        await until(lambda: len(asked) >= 3, "three attempts")
        running.cancel()

    asyncio.run(scenario())
    assert set(asked[:2]) == {"a", "b"}
    assert asked[2] == asked[0]


def test_a_worker_of_another_host_stores_there_and_has_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, **{"offload.use_other_hosts": "true"}) as (_, (worker,)):
            first = await worker.run()
            await worker.stored()
            await worker.forget()
            life = await worker.run()
            assert isinstance(life.end, Completed) and life.end.usage.onboarded_blocks == 3
            assert life.tokens == first.tokens
            await worker.quiet()

    monkeypatch.setattr(service, "socket", SimpleNamespace(gethostname=lambda: "another host"))
    asyncio.run(scenario())


def test_a_restarted_manager_is_joined_again_and_gives_what_it_had(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, manager=SHORT_LEASES) as (host, (worker,)):
            first = await worker.run()
            await worker.stored()
            await host.stop(is_kept=True)
            await until(lambda: worker.tiers.manager_id == "", "absence")
            assert (await worker.run()).tokens == first.tokens
            host.start()
            await worker.join()
            await worker.stored()
            await worker.forget()
            life = await worker.run()
            assert isinstance(life.end, Completed) and life.end.usage.onboarded_blocks == 3
            assert life.tokens == first.tokens
            await worker.quiet()

    asyncio.run(scenario())


def test_a_manager_that_comes_back_empty_is_given_what_is_cached(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, manager=SHORT_LEASES) as (host, (worker,)):
            await host.stop()
            await until(lambda: worker.tiers.manager_id == "", "absence")
            await worker.run()
            host.start()
            await worker.stored()
            await worker.quiet()

    asyncio.run(scenario())


def test_without_a_manager_nobody_is_asked_and_nothing_is_held(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, manager=SHORT_LEASES) as (host, (worker,)):
            await host.stop()
            await until(lambda: worker.tiers.manager_id == "", "absence")
            num_calls = len(host.calls)
            await worker.run()
            assert len(host.calls) == num_calls
            assert worker.num_pinned == 0

    asyncio.run(scenario())


def test_a_manager_that_refuses_is_shown_and_tried_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, manager=SHORT_LEASES) as (host, (worker,)):
            host.errors[Join] = InvalidRequest("join: space.model_id is 'a', blocks here have 'b'")
            await host.stop()
            await until(lambda: worker.counted(KV_MANAGER_JOINED, state="absent") == 1, "absence")
            host.start()
            await until(lambda: worker.counted(KV_MANAGER_JOINED, state="refused") == 1, "refusal")
            assert worker.tiers.manager_id == ""
            del host.errors[Join]
            await worker.join()

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [WorkerLost("died"), DeadlineExceeded("late")])
def test_blocks_of_a_store_without_an_answer_are_held_as_long_as_was_promised(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloader, "_PATIENCE", 1)

    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            host.errors[Store] = error
            await worker.run()
            await until(lambda: host.num_calls(Store) == 1, "the store")
            assert worker.num_pinned == 3
            await until(lambda: worker.num_pinned == 0, "their release")
            assert worker.counted(OFFLOAD_BLOCKS, outcome="failed") == 3
            del host.errors[Store]
            await worker.quiet()

    asyncio.run(scenario())


def test_not_more_is_held_than_allowed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, **{"offload.max_blocks_in_flight": "3"}) as (host, (worker,)):
            gate = host.gates[Store] = asyncio.Event()
            prompt = list(range(1, 60)) * 2
            await worker.run(prompt)
            await until(lambda: worker.num_pinned > 0, "held blocks")
            assert worker.num_pinned <= 3
            gate.set()
            await worker.stored(prompt)
            assert worker.counted(OFFLOAD_BLOCKS, outcome="postponed") > 0
            await worker.quiet()

    asyncio.run(scenario())


def test_a_small_pool_goes_down_in_one_store_and_its_next_prompt_evicts_what_has_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            prompt = list(range(1, 60)) * 2
            await worker.run(prompt, max_tokens=1)
            await worker.stored(prompt)
            assert sum(len(call.blocks) for call in host.calls if isinstance(call, Store)) == len(names_of(prompt))
            assert host.num_calls(Store) <= 2
            gate = host.gates[Store] = asyncio.Event()
            other = list(range(60, 0, -1))
            await worker.run(other, max_tokens=1)
            await worker.run([5] * (NUM_BLOCKS - 8) * BLOCK_SIZE, max_tokens=1)
            assert worker.executor.count_cached(names_of(other)) == len(names_of(other)), "its Store is under way"
            gate.set()
            await worker.stored(other)
            assert worker.counted(OFFLOAD_BLOCKS, outcome="evicted") == 0
            await worker.quiet()

    asyncio.run(scenario())


def test_blocks_that_are_evicted_under_their_store_delay_nobody_and_are_never_given(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, **{"offload.call_timeout_s": "5"}) as (host, (worker,)):
            stalled = host.faults.stall(host.faults.num_reads)
            prompt = list(range(1, 60)) * 2
            first = await worker.run(prompt)
            await until(stalled.is_posted.is_set, "the READ")
            for number in range(2):
                life = await worker.run([number] * (NUM_BLOCKS - 4) * BLOCK_SIZE, max_tokens=1)
                assert isinstance(life.end, Completed), "with the Store still under way"
            stalled.resume()
            await worker.quiet()
            assert worker.counted(OFFLOAD_BLOCKS, outcome="evicted") >= len(names_of(prompt)) - NUM_BLOCKS // 8
            (lost,) = [call.lost for call in host.calls if isinstance(call, Commit) and call.lost]
            shelf = host.manager.space.host.shelf
            assert not [name for name in lost if name in shelf]
            assert [name for name in names_of(prompt) if name in shelf], "an eighth of the pool was left in peace"
            again = await worker.run(prompt)
            assert again.tokens == first.tokens
            await worker.quiet()

    asyncio.run(scenario())


@pytest.mark.parametrize(("num_blocks", "is_urgent"), [(3, False), (NUM_BLOCKS - 2, True)])
def test_a_store_is_urgent_when_little_else_could_be_evicted(tmp_path: Path, num_blocks: int, is_urgent: bool) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            gate = host.gates[Store] = asyncio.Event()
            prompt = [3] * num_blocks * BLOCK_SIZE
            await worker.run(prompt, max_tokens=1)
            await until(lambda: host.num_calls(Store) > 0, "the store")
            gate.set()
            await worker.stored(prompt)
            assert any(call.is_urgent for call in host.calls if isinstance(call, Store)) == is_urgent
            await worker.quiet()

    asyncio.run(scenario())


def test_write_back_offers_what_is_next_to_be_evicted(tmp_path: Path) -> None:
    settings = {"offload.mode": "write-back", "offload.write_back_watermark": "0.5"}

    async def scenario() -> None:
        async with open_rig(tmp_path, **settings) as (host, (worker,)):
            first = await worker.run()
            assert host.num_calls(Store) == 0
            await worker.run(list(range(60, 0, -1)) * 2)
            await worker.stored()
            await worker.forget()
            life = await worker.run()
            assert (life.tokens, life.end.usage.onboarded_blocks) == (first.tokens, 3)

    asyncio.run(scenario())


@pytest.mark.parametrize("settings", [{"offload.mode": "off"}, {"offload.onboard": "never"}])
def test_each_direction_can_be_switched_off(tmp_path: Path, settings: dict[str, str]) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, **settings) as (host, (worker,)):
            await worker.run()
            if settings.get("offload.onboard") == "never":
                await worker.stored()
            await worker.forget()
            await worker.run()
            assert bool(host.num_calls(Store)) == ("offload.mode" not in settings)
            assert bool(host.num_calls(Onboard)) == ("offload.onboard" not in settings)

    asyncio.run(scenario())


def test_what_is_computed_faster_than_asked_for_is_not_asked_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, **{"offload.onboard": "auto"}) as (host, (worker,)):
            for number in range(4):
                await worker.run([number + 1] * (20 * BLOCK_SIZE), max_tokens=1)
            rates = worker.tiers._onboarder._rates
            await until(lambda: rates.recompute(1) is not None, "a measured rate")
            rates.note_call(10.0)
            num_asked = host.num_calls(Onboard)
            await worker.run()
            assert host.num_calls(Onboard) == num_asked

    asyncio.run(scenario())


def block(number: int, salt: str = "") -> SealedBlock:
    return SealedBlock(BlockId(number), SequenceHash(bytes([number]) * 16), None, 0, tenant_digest(salt))


def test_the_buffer_takes_what_it_has_room_for_and_hands_out_one_tenant_at_a_time() -> None:
    wakes: list[int] = []
    buffer = OffloadBuffer(4, FakeClock(), lambda: wakes.append(1))
    assert buffer.keep([block(1)]) == 0, "closed"
    buffer.is_open = True
    assert buffer.keep([block(1), block(2)]) == 2
    assert buffer.keep([block(3, "s"), block(4, "s"), block(5, "s")]) == 2
    assert (buffer.num_postponed, len(wakes)) == (1, 1)
    assert [taken.block_id for taken in buffer.take(9)] == [1, 2]
    assert buffer.keep([block(6)]) == 0, "taken blocks are still held"
    buffer.give_back(2)
    assert buffer.keep([block(6)]) == 1
    assert [taken.block_id for taken in buffer.take(1)] == [3]


def test_the_buffer_forgets_what_is_evicted_and_remembers_what_was_evicted_under_a_read() -> None:
    buffer = OffloadBuffer(6, FakeClock(), lambda: None)
    buffer.note_evicted([block(1).sequence_hash])
    buffer.is_open = True
    assert buffer.keep([block(number) for number in range(1, 7)]) == 6
    assert [taken.block_id for taken in buffer.take(3)] == [1, 2, 3]
    buffer.note_evicted([block(number).sequence_hash for number in (2, 4, 9)])
    buffer.note_evicted([block(2).sequence_hash])
    assert buffer.lost() == {block(2).sequence_hash}
    assert (buffer.num_waiting, buffer.num_held, buffer.num_evicted) == (2, 5, 2)
    assert buffer.keep([block(2), block(7)]) == 1, "computed again, so offered again"
    buffer.give_back(3)
    assert [taken.block_id for taken in buffer.take(9)] == [5, 6, 2]
    assert buffer.lost() == frozenset()
    buffer.give_back(3)
    assert buffer.num_held == 0


def test_stores_wait_for_company_and_take_a_tenth_of_the_time() -> None:
    pace = Pace()
    assert pace.wait_s(now_s=10.0, oldest_s=10.0, share_full=0.1) == pytest.approx(0.25)
    assert pace.wait_s(now_s=10.25, oldest_s=10.0, share_full=0.1) == 0
    assert pace.wait_s(now_s=10.0, oldest_s=10.0, share_full=0.5) == 0
    pace.last_start_s, pace.last_end_s = 10.0, 10.02
    assert pace.wait_s(now_s=10.02, oldest_s=0.0, share_full=1.0) == pytest.approx(0.02 * (1 / DUTY - 1))
    pace.last_end_s = 20.0
    assert pace.wait_s(now_s=20.0, oldest_s=0.0, share_full=1.0) == pytest.approx(1.0), "a slow one is forgiven"


class _Link:
    ttl_s = 10.0


def test_a_lease_is_valid_from_the_sending_of_what_was_answered_last() -> None:
    book, link = LeaseBook(), _Link()
    lease, other = book.open(link), book.open(link)
    assert not lease.covers(1.0)
    assert book.of(link) == [], "nothing is renewed that was not granted"
    lease.renewed(100.0)
    other.renewed(100.0)
    assert lease.covers(109.8) and not lease.covers(110.0)
    book.renewed(book.of(link), {lease.lease_id}, 105.0)
    assert lease.covers(114.8)
    assert not other.covers(101.0), "the manager does not know it any more"
    book.close(lease)
    book.close(other)
    assert len(book) == 0
