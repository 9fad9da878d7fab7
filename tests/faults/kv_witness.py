"""What a manager has promised to keep, remembered by its client; every new manager is asked for it."""

from __future__ import annotations

from collections.abc import Sequence

from kelp.client.base import KvManagerClient, WorkerAddress
from kelp.core.kv_manager_messages import Commit, Done, Joined, Operation, Pin, Result, Store, Stored

_AT_ONCE = 1000


class Witness:
    """A client that looks on. For managers with one worker: nothing comes between `Joined` and its question.

    Prints `FOUND <blocks in the host tier> <blocks that should be>` after the first join of each.
    """

    def __init__(self, client: KvManagerClient) -> None:
        self._client = client
        self._offered: dict[int, tuple[bytes, ...]] = {}
        self._kept: dict[bytes, None] = {}
        self._last_epoch = ""

    async def call(self, address: WorkerAddress, operations: Sequence[Operation], timeout_s: float) -> list[Result]:
        """See `KvManagerClient`."""
        results = await self._client.call(address, operations, timeout_s)
        for operation, result in zip(operations, results, strict=True):
            self._note(operation, result)
            if isinstance(result, Joined) and result.manager_epoch != self._last_epoch:
                await self._look(WorkerAddress(address.endpoint, address.model_name), timeout_s)
                self._last_epoch = result.manager_epoch
        return results

    async def close(self) -> None:
        """See `KvManagerClient`."""
        await self._client.close()

    def _note(self, operation: Operation, result: Result) -> None:
        if isinstance(operation, Store) and isinstance(result, Stored):
            if result.num_read + result.num_known == len(operation.blocks):
                self._offered[operation.store_id] = tuple(block.sequence_hash for block in operation.blocks)
        elif isinstance(operation, Commit) and isinstance(result, Done) and operation.is_valid:
            names = self._offered.pop(operation.store_id, ())
            self._kept.update(dict.fromkeys(name for name in names if name not in operation.lost))

    async def _look(self, address: WorkerAddress, timeout_s: float) -> None:
        names = list(self._kept)
        parts = [tuple(names[start : start + _AT_ONCE]) for start in range(0, len(names), _AT_ONCE)]
        # To unpin what is not pinned changes nothing, and says what is there.
        results = await self._client.call(address, [Pin(part, 0.0) for part in parts], timeout_s)
        num_found = sum(result.num_blocks for result in results if isinstance(result, Done))
        print(f"FOUND {num_found} {len(names)}", flush=True)
