"""kelp's index in the index bench: from the wire bytes that a worker publishes to the matches a router reads."""

from __future__ import annotations

import random

from kelp.core.kv_events import BlocksRemoved, BlocksStored, KVEvent
from kelp.core.types import SequenceHash
from kelp.kv.events.codec import decode_own, encode_batch
from kelp.router.index.kv_index import KVIndex
from perf.router.index_protocol import serve
from perf.router.index_workload import History, Stored

_HASH_BYTES = 16
_BLOCK_SIZE = 16
_MAX_MESSAGE_BYTES = 1 << 20


class KelpIndex:
    """Fed one `KVEventBatch` an event: nothing is saved by batching, which the other side cannot do."""

    def __init__(self) -> None:
        self._index = KVIndex()
        self._messages: list[tuple[int, bytes]] = []
        self._queries: dict[int, list[list[SequenceHash]]] = {}

    def prepare(self, history: History) -> None:
        self._index = KVIndex()
        raw = random.Random(1).randbytes(_HASH_BYTES * (1 + max(map(max, history.documents))))
        names = [SequenceHash(raw[start : start + _HASH_BYTES]) for start in range(0, len(raw), _HASH_BYTES)]
        self._messages = []
        for event in history.events:
            hashes = tuple(names[block] for block in event.blocks)
            told: KVEvent = BlocksRemoved(hashes)
            if isinstance(event, Stored):
                told = BlocksStored(hashes, names[event.parent] if event.parent >= 0 else None)
            self._messages.append((event.worker, encode_batch(1.0, [told], _BLOCK_SIZE)))
        self._queries = {
            length: [[names[block] for block in history.documents[document][:length]] for document in documents]
            for length, documents in history.queries.items()
        }

    def ingest(self) -> None:
        self._index = KVIndex()
        apply = self._index.apply
        for worker, message in self._messages:
            for event in decode_own(message, _MAX_MESSAGE_BYTES).events:
                apply(worker, event)

    def match(self, length: int) -> None:
        match = self._index.match
        for query in self._queries[length]:
            match(query)

    def answers(self, length: int) -> list[dict[int, int]]:
        found = (self._index.match(query) for query in self._queries[length])
        return [dict(zip(matches.slots.tolist(), matches.blocks[:, 0].tolist(), strict=True)) for matches in found]


if __name__ == "__main__":
    serve(KelpIndex())
