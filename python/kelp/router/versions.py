"""Versions of a model side by side: which one serves a request, by the shares that somebody has set.

Workers of several versions (other weights, the same text) share a registry. A request belongs to one version from its
first attempt to its last: block names and answers of different weights have nothing in common. Without shares a router
serves its own model's version alone. Knows neither costs nor load.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.core.metrics import VERSION_REQUESTS, Metrics
from kelp.core.preprocess_messages import PreparedPrompt
from kelp.core.request import LlmRequest
from kelp.core.types import Role, WorkerState
from kelp.registry.base import TrafficRecord, WorkerRecord
from kelp.router.decision.eligibility import is_pinned


class Versions:
    """Belongs to one event loop.

    Args:
        text_id: `core.model_identity.text_identity` of the router's own model; empty: no other version is known.
        records: All workers.
        shares: What is set, if anything is.
    """

    def __init__(
        self,
        text_id: str,
        records: Callable[[], Sequence[WorkerRecord]],
        shares: Callable[[], TrafficRecord | None],
        metrics: Metrics,
    ) -> None:
        self._text_id = text_id
        self._records = records
        self._shares = shares
        self._metrics = metrics

    def choose(self, prompt: PreparedPrompt, request: LlmRequest, name: str) -> PreparedPrompt:
        """The prompt, named for the version that serves it; requests of one session get the same one.

        A request with an adapter stays with the version that the adapter was trained for, the router's own.

        Args:
            prompt: As named for the router's own version.
            request: What the client asked.
            name: Of the request; decides where there is no session.
        """
        if not self._text_id or request.lora_name:
            return prompt
        if request.wishes.worker:
            found = self._pinned(request.wishes.worker)
        else:
            found = self._by_share(request.session_id or name, prompt.message.model_id)
        if found is None or found.layout.model_id == prompt.message.model_id:
            return prompt
        self._metrics.add(VERSION_REQUESTS, version=found.version)
        return _renamed(prompt, found, request.cache_salt)

    def _pinned(self, pin: str) -> WorkerRecord | None:
        return next((record for record in self._serving() if is_pinned(record, pin)), None)

    def _by_share(self, key: str, own_model_id: str) -> WorkerRecord | None:
        traffic = self._shares()
        if traffic is None:
            return None
        serving: dict[str, WorkerRecord] = {}
        for record in self._serving():
            if record.version not in serving or record.layout.model_id == own_model_id:
                serving[record.version] = record
        shares = [(version, share) for version, share in sorted(traffic.shares.items()) if version in serving]
        point = _fraction(key) * sum(share for _, share in shares)
        for version, share in shares:
            if point < share:
                return serving[version]
            point -= share
        return None

    def _serving(self) -> list[WorkerRecord]:
        """Workers that can decode for this router's clients."""
        return [
            record
            for record in self._records()
            if record.role is not Role.PREFILL and record.state is WorkerState.READY and record.text_id == self._text_id
        ]


def _fraction(key: str) -> float:
    """Evenly spread over [0, 1), and the same for a key at every router."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") / 2**56


def _renamed(prompt: PreparedPrompt, record: WorkerRecord, cache_salt: str) -> PreparedPrompt:
    seed = seed_hash(record.layout.model_id, "", cache_salt)
    named = {"seed_hash_hex": seed.hex(), "model_id": record.layout.model_id}
    return replace(
        prompt,
        block_hashes=sequence_hashes(prompt.input_ids, record.layout.block_size, seed),
        message=prompt.message.model_copy(update=named),
    )
