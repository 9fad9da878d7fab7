"""Hosts whose KV block managers share an object store, and prompts of known answers on pools of a few blocks."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hf_reference import Expected
from prompts import long_text

from kelp.core.errors import WorkerLost
from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.core.types import SequenceHash
from s3_server import REGION, S3Server
from support.kv_stats import KvStats, num_in_memory, stats_of, wait_nothing_held, wait_stats
from support.llm_client import Answer
from support.serving import KelpServer
from support.waiting import wait_until

BLOCK_TOKENS = 16
BLOCK_BYTES = 30 * 2 * 3 * BLOCK_TOKENS * 64 * 4
"""Of SmolLM2-135M in float32."""
GROUP_BLOCKS = 2
NUM_BLOCKS = 24
"""A pool that holds the longest prompt here with its answer, and nothing else."""
_SETTINGS: dict[str, object] = {
    "executor.max_step_tokens": 256,
    "executor.threads": 1,
    "kv_manager.lease_ttl_s": 3,
    "disk_tier.max_bytes": 320 * BLOCK_BYTES,
    "offload.call_timeout_s": 3,
    "offload.onboard": "always",
    "registry.heartbeat_s": 0.5,
}
_salts = itertools.count()


def store_settings(store: S3Server, bucket: str) -> dict[str, object]:
    """Configuration of the object tier."""
    return {
        "object_tier.bucket": bucket,
        "object_tier.endpoint": store.endpoint,
        "object_tier.region": REGION,
        "object_tier.object_bytes": GROUP_BLOCKS * BLOCK_BYTES,
        "object_tier.timeout_s": 20,
        "object_tier.refresh_s": 1,
    }


def reusable_blocks(reference: Expected) -> int:
    """Full blocks that a later request with the same prompt need not compute."""
    return (len(reference.prompt_ids) - 1) // BLOCK_TOKENS


class KvHost:
    """One host: memory and disk of its own, which outlive its servers, and one server at a time.

    Args:
        folder: For the disk tier.
        store: See `store_settings`.
        is_isolated: One tritonserver per worker, one for the manager.
    """

    def __init__(self, folder: Path, store: dict[str, object], is_isolated: bool = False) -> None:
        self.disk_folder = folder
        self.arena_folder = Path(tempfile.mkdtemp(prefix="kelp-test-arena-", dir="/dev/shm"))
        self._store = store
        self._is_isolated = is_isolated
        self._server: KelpServer | None = None

    @property
    def server(self) -> KelpServer:
        """The running one."""
        assert self._server is not None
        return self._server

    def start(self, num_host_blocks: int, **settings: object) -> None:
        """Start a server with a host tier of so many blocks, and wait until its worker has joined the manager."""
        chosen = {
            **_SETTINGS,
            **self._store,
            "kv_manager.arena_folder": self.arena_folder,
            "kv_manager.host_bytes": num_host_blocks * BLOCK_BYTES,
            "disk_tier.path": self.disk_folder,
            **settings,
        }
        server = KelpServer("aggregated", isolate=self._is_isolated, num_blocks=NUM_BLOCKS, settings=chosen)
        self._server = server.start()
        self.wait_joined()

    def kill(self) -> None:
        """SIGKILL for all of it."""
        self.server.kill()
        self._server = None

    def stop(self) -> None:
        """SIGTERM, if it runs; nothing may be left of it but what lies on disk."""
        if self._server is not None:
            server, self._server = self._server, None
            server.stop()
            assert not [path for path in self.arena_folder.rglob("*") if path.is_file()], "an arena is left"

    def close(self) -> None:
        """Whatever state it is in."""
        if self._server is not None:
            self.kill()
        shutil.rmtree(self.arena_folder, ignore_errors=True)

    def is_joined(self) -> bool:
        """Whether every worker has a manager, and that one answers."""
        records = self.server.records()
        return bool(records) and all(record.kv_manager_id for record in records.values()) and self.stats() is not None

    def wait_joined(self) -> None:
        """After a start."""
        wait_until(self.is_joined, "the manager", 60.0)

    def stats(self) -> KvStats | None:
        """What the manager counts; None while there is none."""
        return stats_of(self.server)

    def check(self, reference: Expected, **fields: object) -> int:
        """Ask for the reference's prompt, compare the answer; returns how many of its blocks were not computed."""
        answer = self.ask(reference.prompt_ids, len(reference.token_ids), **fields)
        assert answer.token_ids == reference.token_ids
        assert answer.text == reference.text
        cached = answer.last.number("cached_tokens")
        assert cached % BLOCK_TOKENS == 0
        return cached // BLOCK_TOKENS

    def have_computed(self, reference: Expected, num_blocks: int, cache_salt: str = "") -> int:
        """Ask for the first blocks of the reference's prompt; returns how many were not computed."""
        answer = self.ask(reference.prompt_ids[: num_blocks * BLOCK_TOKENS + 1], 1, cache_salt=cache_salt)
        return answer.last.number("cached_tokens") // BLOCK_TOKENS

    def names(self, reference: Expected, num_blocks: int, cache_salt: str = "") -> list[SequenceHash]:
        """Of the prompt's first blocks."""
        (model_id,) = {record.layout.model_id for record in self.server.records().values()}
        tokens = reference.prompt_ids[: num_blocks * BLOCK_TOKENS]
        return sequence_hashes(tokens, BLOCK_TOKENS, seed_hash(model_id, cache_salt=cache_salt))

    def have_stored(self, reference: Expected, num_blocks: int, cache_salt: str = "") -> None:
        """Wait until the prompt's first blocks are in memory; what did not arrive there is computed again.

        A worker offers blocks for as long as it has them; a pool of few blocks, on busy cores, may evict some before.
        """
        names = self.names(reference, num_blocks, cache_salt)
        for _ in range(3):
            with contextlib.suppress(AssertionError):
                wait_until(lambda: num_in_memory(self.server, names) == num_blocks, "blocks in memory", 20.0)
                return
            self.flood_pool()
            self.have_computed(reference, num_blocks, cache_salt)
        raise AssertionError(f"{num_in_memory(self.server, names)} of {num_blocks} blocks are in memory")

    def ask(self, prompt_ids: Sequence[int], max_tokens: int, **fields: object) -> Answer:
        """One greedy request."""
        return self.server.ask(input_ids=np.array(prompt_ids, np.int32), max_tokens=max_tokens, stream=True, **fields)

    def flood_pool(self) -> None:
        """Evict nearly everything from the worker's own pool."""
        answer = self.server.ask(text_input=long_text(13, start=300), max_tokens=1, cache_salt=f"flood {next(_salts)}")
        assert answer.last.number("num_input_tokens") > (NUM_BLOCKS - 3) * BLOCK_TOKENS

    def flood_memory(self) -> None:
        """Flood until as many blocks have left the host tier as were there: with `lru`, just those."""
        before = wait_stats(self.server, "statistics")
        wanted = before.evicted("host") + before.resident("host")
        for _ in range(20):
            self.flood_pool()
            if wait_nothing_held(self.server).evicted("host") >= wanted:
                return
        raise AssertionError("the host tier evicts nothing")

    def wait_back(self, killed_pid: int) -> None:
        """Wait for another manager, and the worker with it."""

        def is_back() -> bool:
            with contextlib.suppress(AssertionError, WorkerLost):
                return self.server.stub("kv_block_manager").pid != killed_pid and self.is_joined()
            return False

        try:
            wait_until(is_back, "another manager", 60.0)
        except AssertionError:
            raise AssertionError(f"no manager after {killed_pid}: {self.server.output}") from None
