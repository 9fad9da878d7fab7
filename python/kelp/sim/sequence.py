"""A sequence without tokens: what the real scheduler needs to know of it is numbers and names of blocks.

Blocks with output are never named: the workload does not say what was generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kelp.core.types import BlockId, Role, SequenceHash
from kelp.executor.batching.schedulable import Sealable, Stage


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is asked for.

    Attributes:
        num_tokens: Prompt, and output of earlier attempts.
        num_output_tokens: How many more to generate, at least 1.
        hashes: Names of the prompt's full blocks.
        block_size: Tokens per block.
    """

    role: Role
    num_tokens: int
    num_output_tokens: int
    hashes: Sequence[SequenceHash]
    block_size: int


class SimSequence:
    """One task on one worker; see `executor.batching.schedulable.Schedulable` for what the scheduler reads.

    Attributes:
        owner: Whatever its sender wants back.
        num_left: Tokens still to be generated.
        num_generated: Tokens generated here, or imported with the prompt.
        num_computed: Positions whose KV is in the blocks.
        num_cached_tokens: Of these, found in the cache at the first admission; -1 before.
        submitted_s: Came to the worker.
        first_scheduled_s: First got blocks.
    """

    __slots__ = (
        "_num_sealed",
        "arrival",
        "awaited_hash",
        "block_ids",
        "block_size",
        "first_scheduled_s",
        "hashes",
        "is_import",
        "is_prefill_only",
        "num_blocks_wanted",
        "num_cached_tokens",
        "num_computed",
        "num_generated",
        "num_left",
        "num_pending",
        "num_tokens",
        "owner",
        "promise_end_s",
        "stage",
        "submitted_s",
    )

    num_flights = 0
    num_foreseen = 0
    num_onboardable = 0
    is_foreseeable = True

    def __init__(self, task: Task, owner: object, arrival: int, now_s: float) -> None:
        self.owner = owner
        self.arrival = arrival
        self.submitted_s = now_s
        self.block_size = task.block_size
        self.hashes = task.hashes
        self.is_import = task.role is Role.DECODE
        self.is_prefill_only = task.role is Role.PREFILL
        self.stage = Stage.WAITING
        self.awaited_hash: SequenceHash | None = None
        self.promise_end_s: float | None = None
        self.block_ids: list[BlockId] = []
        self.num_tokens = self.num_pending = task.num_tokens
        self.num_blocks_wanted = -(-task.num_tokens // task.block_size)
        self.num_left = 1 if self.is_prefill_only else task.num_output_tokens
        self.num_generated = 0
        self.num_computed = 0
        self.num_cached_tokens = -1
        self.first_scheduled_s = 0.0
        self._num_sealed = 0

    @property
    def is_preemptible(self) -> bool:
        """See `Schedulable`."""
        return self.stage is Stage.RUNNING and not self.is_prefill_only

    @property
    def num_missing_blocks(self) -> int:
        """Blocks without known content."""
        return len(self.block_ids) - self._num_sealed

    def matchable_hashes(self) -> Sequence[SequenceHash]:
        """See `Schedulable`: without an import, at least the last token is computed."""
        num_positions = self.num_tokens if self.is_import else self.num_tokens - 1
        return self.hashes[: num_positions // self.block_size]

    def full_hashes(self) -> Sequence[SequenceHash]:
        """See `Schedulable`."""
        return self.hashes

    def adopt(self, matched: list[BlockId], allocated: list[BlockId]) -> None:
        """See `Schedulable`."""
        self.block_ids = [*matched, *allocated]
        self._num_sealed = len(matched)
        self.num_computed = len(matched) * self.block_size
        self.num_pending = self.num_tokens - self.num_computed

    def extend(self, allocated: list[BlockId]) -> None:
        """See `Schedulable`."""
        self.block_ids += allocated

    def surrender(self) -> list[BlockId]:
        """See `Schedulable`."""
        block_ids, self.block_ids = self.block_ids, []
        self.num_computed = self._num_sealed = 0
        self.num_pending = self.num_tokens
        return block_ids

    def take_sealable(self) -> Sealable | None:
        """See `Schedulable`."""
        first, num_full = self._num_sealed, min(self.num_computed // self.block_size, len(self.hashes))
        if num_full <= first:
            return None
        self._num_sealed = num_full
        parent = self.hashes[first - 1] if first else None
        return Sealable(self.block_ids[first:num_full], self.hashes[first:num_full], parent, first)

    def import_prompt(self) -> None:
        """A peer has put the prompt's KV into the blocks, and sends the first token."""
        self.is_import = False
        self.num_computed = self.num_tokens - 1
        self.decode(1)

    def compute(self, num_tokens: int) -> bool:
        """A step has computed some pending tokens, not more than there are.

        Returns:
            Whether these were the last ones, so that a new one came.
        """
        if num_tokens == self.num_pending:
            self.num_computed += num_tokens - 1
            self.decode(1)
            return True
        self.num_computed += num_tokens
        self.num_pending -= num_tokens
        return False

    def decode(self, num_steps: int) -> None:
        """Steps have computed the only pending token and those that came of it, all but the last."""
        self.num_computed += num_steps
        self.num_tokens += num_steps
        self.num_generated += num_steps
        self.num_left -= num_steps
        self.num_pending = 1
        self.num_blocks_wanted = -(-self.num_tokens // self.block_size)
