"""Dynamo's RadixTree in the index bench; runs in Dynamo's environment."""

from __future__ import annotations

import json
import random

from dynamo._core import RadixTree  # type: ignore[import-not-found]

from perf.router.index_protocol import serve
from perf.router.index_workload import History, Stored


class DynamoIndex:
    """Fed as Dynamo's own binding wants it: one JSON document an event, local hashes in queries."""

    def __init__(self) -> None:
        self._tree = RadixTree()
        self._messages: list[tuple[int, bytes]] = []
        self._queries: dict[int, list[list[int]]] = {}

    def prepare(self, history: History) -> None:
        self._tree = RadixTree()
        dice = random.Random(1)
        count = 1 + max(map(max, history.documents))
        local = [dice.getrandbits(64) for _ in range(count)]
        chained = [dice.getrandbits(64) for _ in range(count)]
        self._messages = []
        for number, event in enumerate(history.events):
            if isinstance(event, Stored):
                blocks = [{"block_hash": chained[block], "tokens_hash": local[block]} for block in event.blocks]
                parent = chained[event.parent] if event.parent >= 0 else None
                data: object = {"stored": {"parent_hash": parent, "blocks": blocks}}
            else:
                data = {"removed": {"block_hashes": [chained[block] for block in event.blocks]}}
            document = {"event_id": number, "dp_rank": 0, "data": data}
            self._messages.append((event.worker, json.dumps(document, separators=(",", ":")).encode()))
        self._queries = {
            length: [[local[block] for block in history.documents[document][:length]] for document in documents]
            for length, documents in history.queries.items()
        }

    def ingest(self) -> None:
        tree = self._tree = RadixTree()
        apply = tree.apply_event
        for worker, message in self._messages:
            apply(worker, message)

    def match(self, length: int) -> None:
        find = self._tree.find_matches
        for query in self._queries[length]:
            find(query).scores  # noqa: B018 (the scores are made when they are asked for)

    def answers(self, length: int) -> list[dict[int, int]]:
        find = self._tree.find_matches
        return [{worker: depth for (worker, _), depth in find(q).scores.items()} for q in self._queries[length]]


if __name__ == "__main__":
    serve(DynamoIndex())
