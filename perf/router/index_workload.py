"""What the index bench feeds to everybody: one seeded history of KV events, and prompts to be looked up.

Documents share the prompt of their group; every worker keeps a few documents up to some depth, evicts some from the
end, and, where its residency shall not be prefix-closed, has lost one block in the middle of each of them.

Imported by a process in an environment without kelp: nothing but the standard library may be imported here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

DOCUMENT_BLOCKS = 1024
PROMPT_BLOCKS = 32
NUM_GROUPS = 16
MAX_EVENT_BLOCKS = 64
NUM_PAIRS = 1_000_000
QUERY_BLOCKS = (64, 256, 1024)
NUM_QUERIES = 500
_NUM_STREAMS = 64
_MIN_HELD_BLOCKS = 128
_COPIES = 3
_SEED = 20261121


@dataclass(frozen=True, slots=True)
class IndexCase:
    """One history. `percent_open` of the workers are not prefix-closed."""

    num_workers: int
    percent_open: int
    num_pairs: int = NUM_PAIRS

    @property
    def name(self) -> str:
        return f"index_w{self.num_workers}_open{self.percent_open}"


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks by number; a block's number names it on both sides. `parent` is -1 at the start of a document."""

    worker: int
    parent: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Removed:
    worker: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class History:
    """Everything that happens.

    Attributes:
        documents: Blocks of each, in order.
        queries: By length, documents to be looked up.
        num_blocks: Blocks in all events together.
    """

    events: list[Stored | Removed]
    documents: list[list[int]]
    queries: dict[int, list[int]]
    num_blocks: int


def make_history(case: IndexCase) -> History:
    """The same case always gives the same history."""
    dice = random.Random(f"{_SEED} {case.name} {case.num_pairs}")
    num_documents = _num_documents(case)
    documents = _documents(num_documents)
    num_open = -(-case.num_workers * case.percent_open // 100)
    streams = []
    taken = set()
    pairs = 0
    while pairs < case.num_pairs:
        worker, document = dice.randrange(case.num_workers), dice.randrange(num_documents)
        if (worker, document) in taken:
            continue
        taken.add((worker, document))
        events, held = _residency(dice, worker, documents[document], worker < num_open)
        streams.append(events)
        pairs += held
    events = _interleave(dice, streams)
    queries = {length: [dice.randrange(num_documents) for _ in range(NUM_QUERIES)] for length in QUERY_BLOCKS}
    return History(events, documents, queries, sum(len(event.blocks) for event in events))


def _num_documents(case: IndexCase) -> int:
    mean_held = (_MIN_HELD_BLOCKS + DOCUMENT_BLOCKS) // 2
    return max(NUM_GROUPS, case.num_pairs // mean_held // _COPIES)


def _documents(count: int) -> list[list[int]]:
    prompts = [list(range(group * PROMPT_BLOCKS, (group + 1) * PROMPT_BLOCKS)) for group in range(NUM_GROUPS)]
    first = NUM_GROUPS * PROMPT_BLOCKS
    rest = DOCUMENT_BLOCKS - PROMPT_BLOCKS
    return [
        prompts[number % NUM_GROUPS] + list(range(first + number * rest, first + (number + 1) * rest))
        for number in range(count)
    ]


def _residency(
    dice: random.Random, worker: int, document: list[int], is_open: bool
) -> tuple[list[Stored | Removed], int]:
    """Events of one document on one worker in order, and blocks held in the end."""
    stored = dice.randint(_MIN_HELD_BLOCKS, DOCUMENT_BLOCKS)
    kept = max(_MIN_HELD_BLOCKS, stored - dice.choice((0, 0, dice.randint(1, 256))))
    events: list[Stored | Removed] = []
    start = 0
    while start < stored:
        end = min(stored, start + dice.randint(1, MAX_EVENT_BLOCKS))
        events.append(Stored(worker, document[start - 1] if start else -1, document[start:end]))
        start = end
    while stored > kept:
        count = min(stored - kept, dice.randint(1, MAX_EVENT_BLOCKS // 4))
        events.append(Removed(worker, document[stored - count : stored][::-1]))
        stored -= count
    if is_open:
        events.append(Removed(worker, [document[dice.randrange(PROMPT_BLOCKS, kept - 1)]]))
    return events, kept - is_open


def _interleave(dice: random.Random, streams: list[list[Stored | Removed]]) -> list[Stored | Removed]:
    """A worker computes several prompts at a time; each one's events stay in order."""
    waiting = [events[::-1] for events in streams]
    running = [waiting.pop() for _ in range(min(_NUM_STREAMS, len(waiting)))]
    merged = []
    while running:
        place = dice.randrange(len(running))
        merged.append(running[place].pop())
        if not running[place]:
            if waiting:
                running[place] = waiting.pop()
            else:
                running.pop(place)
    return merged
