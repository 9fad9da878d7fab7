"""The object tier over a small arena, and blocks whose right bytes are known."""

from __future__ import annotations

import dataclasses
import mmap
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from kelp.core.config_kv import ObjectTierConfig
from kelp.core.hashing import seed_hash, sequence_hashes, tenant_digest
from kelp.core.types import SequenceHash
from kelp.kv.tiers.base import BlockRecord
from kelp.kv.tiers.objects.messages import ArenaMap
from kelp.kv.tiers.objects.tier import S3ObjectTier
from kelp.kv.tiers.records import checksum
from s3_server import REGION, S3Server

BLOCK_BYTES = 16 * 1024
GROUP_BLOCKS = 4
NUM_SLOTS = 32
SPACE = bytes(range(16))
READY_S = 60.0
ARENA_PREFIX = f"kelp-objects-{os.getpid()}-"
_OFFSET_BYTES = 8192
_STRIDE_BYTES = BLOCK_BYTES + 4096


class Story:
    """A sequence's blocks: names, records and bytes."""

    def __init__(self, seed: int, num_blocks: int, salt: str = "", block_bytes: int = BLOCK_BYTES) -> None:
        random = np.random.default_rng(seed)
        tokens = random.integers(0, 2**31 - 1, 16 * num_blocks, dtype=np.int32)
        self.names = sequence_hashes(tokens, 16, seed_hash("model", "", salt))
        self.tenant = tenant_digest(salt)
        self.contents = [random.bytes(block_bytes) for _ in self.names]
        self.records = [
            BlockRecord(name, self.names[index - 1] if index else None, index, self.tenant, checksum(content, name))
            for index, (name, content) in enumerate(zip(self.names, self.contents, strict=True))
        ]


class Arena:
    """A file of slots, as the host tier has it."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        stride_bytes = block_bytes + _STRIDE_BYTES - BLOCK_BYTES
        num_bytes = _OFFSET_BYTES + NUM_SLOTS * stride_bytes
        descriptor, name = tempfile.mkstemp(prefix=ARENA_PREFIX, dir="/dev/shm")
        os.truncate(descriptor, num_bytes)
        self._memory = mmap.mmap(descriptor, num_bytes)
        os.close(descriptor)
        self.path = Path(name)
        self.map = ArenaMap(str(self.path), _OFFSET_BYTES, NUM_SLOTS, block_bytes, stride_bytes)

    def _start(self, slot: int) -> int:
        return self.map.offset_bytes + slot * self.map.stride_bytes

    def fill(self, slots: Sequence[int], contents: Sequence[bytes]) -> None:
        for slot, content in zip(slots, contents, strict=True):
            self._memory[self._start(slot) : self._start(slot) + len(content)] = content

    def content(self, slot: int) -> bytes:
        return self._memory[self._start(slot) : self._start(slot) + self.map.block_bytes]

    def snapshot(self) -> bytes:
        return self._memory[:]

    def close(self) -> None:
        self._memory.close()
        self.path.unlink()


class ObjectRig:
    """One host: arena and tier, over a bucket; closes what it made and counts what is left.

    Args:
        endpoint: Where the tier believes the store to be, if not at the server.
    """

    def __init__(self, server: S3Server, bucket: str, endpoint: str = "", **settings: Any) -> None:
        key, clock = settings.pop("key", None), settings.pop("clock", None)
        block_bytes, share = settings.pop("block_bytes", BLOCK_BYTES), settings.pop("tenant_share", 1.0)
        defaults = {"object_bytes": GROUP_BLOCKS * block_bytes, "timeout_s": 10.0, "region": REGION}
        self.config = ObjectTierConfig(bucket=bucket, endpoint=endpoint or server.endpoint, **{**defaults, **settings})
        self.arena = Arena(block_bytes)
        self.tier = S3ObjectTier(self.config, SPACE, self.arena.map, key, clock, share)
        self.mark()

    def __enter__(self) -> ObjectRig:
        assert self.tier.wait_ready(READY_S), "the object-store process did not get ready"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        pid = self.tier.process_id
        self.tier.close()
        self.arena.close()
        assert pid is None or not psutil.pid_exists(pid), "the object-store process is still there"

    def mark(self) -> None:
        """Count from here."""
        self._before = dataclasses.asdict(self.tier.counters)

    def count(self, name: str) -> int:
        """What one of `ObjectCounters` has grown by since `mark`."""
        return int(dataclasses.asdict(self.tier.counters)[name] - self._before[name])

    def put(self, blocks: Story, first: int = 0) -> bool:
        """Store the group that begins at block `first`, from the arena's first slots."""
        slots, group = list(range(GROUP_BLOCKS)), slice(first, first + GROUP_BLOCKS)
        self.arena.fill(slots, blocks.contents[group])
        return self.tier.put(slots, blocks.records[group])

    def put_all(self, blocks: Story) -> None:
        for first in range(0, len(blocks.names), GROUP_BLOCKS):
            assert self.put(blocks, first)

    def get(self, blocks: Story, first: int, num_blocks: int, first_slot: int = 8) -> list[BlockRecord | None]:
        """Read blocks into slots from `first_slot` on; what is said to be right is checked."""
        moves = [(blocks.names[first + index], first_slot + index) for index in range(num_blocks)]
        found = self.tier.get(moves, first, blocks.tenant)
        for index, record in enumerate(found):
            if record is not None:
                assert record == blocks.records[first + index]
                assert self.arena.content(first_slot + index) == blocks.contents[first + index], "a wrong byte"
        return found

    def find(self, blocks: Story, first: int = 0, num_blocks: int | None = None) -> int:
        names: list[SequenceHash] = blocks.names[first : None if num_blocks is None else first + num_blocks]
        return self.tier.find(names, first, blocks.tenant)


class Bucket:
    """The store seen by somebody else: what is there, and doing harm to it."""

    def __init__(self, server: S3Server) -> None:
        self.name = f"kelp-{uuid.uuid4().hex[:12]}"
        self.client = server.client()
        self.client.create_bucket(Bucket=self.name)

    def list_keys(self, prefix: str = "") -> list[str]:
        page = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix)
        return [item["Key"] for item in page.get("Contents", ())]

    def read(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def change(self, key: str, change: Callable[[bytearray], Any]) -> None:
        """Rewrite an object after `change` has been applied to its bytes."""
        content = bytearray(self.read(key))
        change(content)
        self.write(key, bytes(content))

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def empty(self) -> None:
        for key in self.list_keys():
            self.delete(key)

    def close(self) -> None:
        self.empty()
        self.client.delete_bucket(Bucket=self.name)
        self.client.close()
