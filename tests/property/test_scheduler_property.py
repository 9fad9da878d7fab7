"""Random lives of many requests in one small engine, against an unbatched reference."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from history_runner import BLOCK_SIZE, EOS, GARBAGE, VOCAB_SIZE, HistoryRunner, MostlyRight, next_token, reference
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kelp.core.clock import FakeClock
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import BlockId, FinishReason, Role, SequenceHash, num_blocks_for
from kelp.executor.base import (
    Admitted,
    Completed,
    ExecutorEvent,
    ExecutorRequest,
    Failed,
    Prefilled,
    Reserved,
    SealedBlock,
    Tokens,
)
from kelp.executor.batching.engine import Engine, EngineRules
from kelp.executor.batching.history import SequenceRules
from kelp.executor.batching.scheduler import SchedulerLimits
from kelp.executor.batching.speculation import SpeculationRules
from kelp.kv.pool import BlockPool
from support.examples import examples

MAX_DRAIN_STEPS = 3000


@dataclass
class Life:
    role: Role
    prompt: list[int]
    expected: list[int]
    expected_reason: FinishReason
    num_admissions: int = 0
    tokens: list[int] = field(default_factory=list)
    announced: list[BlockId] = field(default_factory=list)
    num_announced_tokens: int = 0
    reserved: Reserved | None = None
    is_transferring: bool = False
    is_leased: bool = False
    is_released: bool = False
    end: Completed | Failed | None = None

    def receive(self, event: ExecutorEvent) -> None:
        assert self.end is None, "an event after the terminal one"
        if isinstance(event, Admitted):
            self.num_admissions += 1
        elif isinstance(event, Tokens):
            self.tokens += event.token_ids
        elif isinstance(event, Prefilled):
            self.announced += event.block_ids
            self.num_announced_tokens = event.num_tokens
            self.is_leased = not self.is_released
        elif isinstance(event, Reserved):
            self.reserved = event
            self.is_transferring = True
        else:
            self.end = event

    def verify(self) -> None:
        expected, reason = self.expected, self.expected_reason
        assert isinstance(self.end, Completed)
        if self.end.finish_reason is FinishReason.CANCELLED:
            assert self.tokens == expected[: len(self.tokens)]
            return
        assert self.num_admissions == 1
        if self.role is Role.PREFILL:
            assert self.tokens == expected[:1]
            assert self.end.finish_reason is (reason if len(expected) == 1 else None)
            assert len(self.announced) == num_blocks_for(len(self.prompt), BLOCK_SIZE)
        else:
            assert self.tokens == expected
            assert self.end.finish_reason is reason


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 9),
        limits=st.builds(SchedulerLimits, st.integers(4, 9), st.integers(1, 4), st.booleans()),
        num_drafts=st.sampled_from([0, 3]),
        max_in_flight=st.sampled_from([2, 1]),
        is_watched=st.booleans(),
        are_evictions_told=st.booleans(),
        watermark=st.sampled_from([None, 0.5]),
    )
    def start(
        self,
        num_blocks: int,
        limits: SchedulerLimits,
        num_drafts: int,
        max_in_flight: int,
        is_watched: bool,
        are_evictions_told: bool,
        watermark: float | None,
    ) -> None:
        self.runner = HistoryRunner(num_blocks, limits.max_step_tokens)
        self.pool = BlockPool(num_blocks)
        self.lives: dict[str, Life] = {}
        self.retired: set[str] = set()
        rules = EngineRules(
            sequence=SequenceRules(BLOCK_SIZE, (EOS,)),
            scheduler=limits,
            vocab_size=VOCAB_SIZE,
            speculation=SpeculationRules(num_drafts, row_cost=0.01),
            max_in_flight=max_in_flight,
        )
        self.clock = FakeClock()
        self.engine = Engine(self.runner, self.pool, rules, self.clock, self.retired.add, MostlyRight())
        self.kept: dict[BlockId, list[int]] = {}
        self.names: dict[BlockId, SequenceHash] = {}
        self.room = 0
        if is_watched:
            self.engine.offers.watch(self.keep, watermark, self.note_evicted if are_evictions_told else None)

    def keep(self, blocks: Sequence[SealedBlock]) -> int:
        taken = blocks[: max(0, self.room - len(self.kept))]
        assert len({block.tenant for block in blocks}) == 1
        for block in taken:
            assert block.block_id not in self.kept, "a block is kept twice"
            self.kept[block.block_id] = self.runner.memory[block.block_id].tolist()
            self.names[block.block_id] = block.sequence_hash
        return len(taken)

    def note_evicted(self, names: Sequence[SequenceHash]) -> None:
        for name in names:
            self.kept_blocks_stay_as_they_are()
            self.kept = {key: value for key, value in self.kept.items() if self.names[key] != name}

    @rule(room=st.integers(0, 3))
    def change_room(self, room: int) -> None:
        self.room = room

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def release_kept(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.kept)), unique=True))
        self.engine.offers.release(chosen)
        for block_id in chosen:
            del self.kept[block_id]

    @rule(
        role=st.sampled_from(Role),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        max_tokens=st.integers(1, 14),
        num_resumed=st.integers(0, 4),
        penalty=st.sampled_from([0.0, 0.0, 0.5]),
        num_copies=st.integers(1, 3),
        num_onboardable=st.integers(0, 6),
    )
    def submit(
        self,
        role: Role,
        prompt: list[int],
        max_tokens: int,
        num_resumed: int,
        penalty: float,
        num_copies: int,
        num_onboardable: int,
    ) -> None:
        num_positions = len(prompt) + max_tokens - 1
        if num_blocks_for(num_positions, BLOCK_SIZE) > self.pool.num_blocks:
            return
        output, reason = reference(prompt, max_tokens)
        num_generated = min(num_resumed, len(output) - 1)
        given = prompt + output[:num_generated]
        if role is Role.DECODE:
            num_onboardable = 0
        for _ in range(num_copies):
            request_id = str(len(self.lives))
            life = self.lives[request_id] = Life(role, given, output[num_generated:], reason)
            request = ExecutorRequest(
                request_id=request_id,
                prompt=np.asarray(given, np.int32),
                role=role,
                sampling=SamplingParams(max_tokens=max_tokens, presence_penalty=penalty),
                seed_hash=seed_hash("model"),
                sink=life.receive,
                num_generated=num_generated,
                tenant=bytes(16) if prompt[0] else b"",
                onboard_blocks=min(num_onboardable, (len(given) - 1) // BLOCK_SIZE),
            )
            self.engine.add(request, 1)

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @rule()
    def let_time_pass(self) -> None:
        self.clock.advance(1)

    @precondition(lambda self: any(life.end is None for life in self.lives.values()))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = [request_id for request_id, life in self.lives.items() if life.end is None]
        request_id = data.draw(st.sampled_from(live))
        self.engine.abort(request_id)
        end = self.lives[request_id].end
        assert isinstance(end, Completed) and end.finish_reason is FinishReason.CANCELLED

    @precondition(lambda self: any(life.is_transferring for life in self.lives.values()))
    @rule(data=st.data(), is_lost=st.booleans())
    def end_transfer(self, data: st.DataObject, is_lost: bool) -> None:
        busy = [request_id for request_id, life in self.lives.items() if life.is_transferring]
        self.settle_transfer(data.draw(st.sampled_from(busy)), is_lost)

    def settle_transfer(self, request_id: str, is_lost: bool) -> None:
        life = self.lives[request_id]
        assert life.reserved is not None
        self.check_cached_part(life)
        is_wanted = life.end is None and (not is_lost or life.role is not Role.DECODE)
        self.transfer(life, life.prompt if is_wanted else [GARBAGE] * len(life.prompt))
        life.is_transferring = False
        if life.end is not None:
            self.engine.end_import(request_id)
        elif life.role is not Role.DECODE:
            first, end = life.reserved.num_cached_blocks, len(life.reserved.block_ids)
            self.engine.complete_onboard(request_id, first + (end - first) // 2 if is_lost else end)
        elif is_lost:
            self.engine.fail_import(request_id)
        else:
            first = next_token(life.prompt)
            life.tokens.append(first)
            self.engine.complete_import(request_id, first, -1.0, 1)

    def check_cached_part(self, life: Life) -> None:
        assert life.reserved is not None
        num_cached_tokens = life.reserved.num_cached_blocks * BLOCK_SIZE
        kv = self.runner.memory[list(life.reserved.block_ids)].ravel()
        assert kv[:num_cached_tokens].tolist() == life.prompt[:num_cached_tokens]

    def transfer(self, life: Life, tokens: list[int]) -> None:
        assert life.reserved is not None
        first, num_blocks = life.reserved.num_cached_blocks, len(life.reserved.block_ids)
        self.runner.write(life.reserved.block_ids[first:], tokens[first * BLOCK_SIZE : num_blocks * BLOCK_SIZE])

    @precondition(lambda self: any(life.is_leased for life in self.lives.values()))
    @rule(data=st.data())
    def release_export(self, data: st.DataObject) -> None:
        leased = [request_id for request_id, life in self.lives.items() if life.is_leased]
        self.release_lease(data.draw(st.sampled_from(leased)))

    def release_lease(self, request_id: str) -> None:
        life = self.lives[request_id]
        life.is_leased, life.is_released = False, True
        self.engine.release_export(request_id)
        self.engine.release_export(request_id)

    @invariant()
    def bookkeeping_is_sound(self) -> None:
        self.pool.check_integrity()

    @invariant()
    def kept_blocks_stay_as_they_are(self) -> None:
        for block_id, held in self.kept.items():
            assert self.runner.memory[block_id].tolist() == held

    @invariant()
    def announced_blocks_keep_their_content_while_leased(self) -> None:
        for life in self.lives.values():
            if life.is_leased:
                kv = self.runner.memory[life.announced].ravel()[: life.num_announced_tokens]
                assert kv.tolist() == life.prompt[: life.num_announced_tokens]

    @invariant()
    def a_running_transfer_scribbles_into_blocks_of_nobody_else(self) -> None:
        for life in self.lives.values():
            if life.is_transferring and life.reserved is not None:
                written = life.reserved.block_ids[life.reserved.num_cached_blocks :]
                assert all(self.pool.num_references(block_id) == 1 for block_id in written)
                self.transfer(life, [GARBAGE] * len(life.prompt))

    @invariant()
    def a_retired_request_has_ended(self) -> None:
        assert all(self.lives[request_id].end is not None for request_id in self.retired)

    def settle_peers(self) -> bool:
        """End one transfer or lease; False if there is none."""
        for request_id, life in self.lives.items():
            if life.is_transferring:
                self.settle_transfer(request_id, is_lost=False)
                return True
            if life.is_leased:
                self.release_lease(request_id)
                return True
        if self.kept:
            self.engine.offers.release(list(self.kept))
            self.kept.clear()
            self.room = 0
            return True
        return False

    def teardown(self) -> None:
        for _ in range(MAX_DRAIN_STEPS):
            if not self.engine.step() and not self.settle_peers():
                break
        assert len(self.retired) == len(self.lives), "a request never ended"
        for life in self.lives.values():
            life.verify()
        assert self.pool.num_held == self.pool.num_pinned == 0


EngineMachine.TestCase.settings = settings(max_examples=examples(80), stateful_step_count=40, deadline=None)
TestEveryScheduleYieldsTheUnbatchedTokens = EngineMachine.TestCase
