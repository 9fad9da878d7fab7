"""The configured key reaches the disk tier and the object tier, as the `kv_block_manager` model opens them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelp.build.kv_manager import build_kv_manager
from kelp.core.config import load_config
from kelp.core.hashing import seed_hash, sequence_hashes, tenant_digest
from kelp.core.kv_manager_messages import SpaceRecord
from kelp.core.metrics import Metrics
from kelp.kv.manager.parts import Tiers, block_bytes_of
from kelp.kv.tiers.base import BlockRecord
from kelp.kv.tiers.objects.tier import S3ObjectTier
from kelp.kv.tiers.records import checksum
from s3_server import REGION, S3Server
from support.object_rig import READY_S, Bucket

SPACE = SpaceRecord(
    num_layers=2, num_kv_heads=2, block_size=16, head_dim=64, dtype="float32", model_id="m", hash_version=1
)
PLAIN = b"what the customer said in private, as the cache holds it; "
NAMES = sequence_hashes(range(32), 16, seed_hash("m"))


def _open_tiers(folder: Path, server: S3Server, bucket: Bucket, settings: dict[str, str]) -> Tiers:
    num_bytes = block_bytes_of(SPACE)
    config = load_config(
        {
            "kv_manager.arena_folder": str(folder / "arena"),
            "kv_manager.host_bytes": str(8 * (num_bytes + 4096)),
            "disk_tier.path": str(folder / "disk"),
            "disk_tier.max_bytes": str(8 * (num_bytes + 8192)),
            "object_tier.bucket": bucket.name,
            "object_tier.endpoint": server.endpoint,
            "object_tier.region": REGION,
            "object_tier.object_bytes": str(len(NAMES) * num_bytes),
            "object_tier.timeout_s": "10",
            **settings,
        }
    )
    return build_kv_manager(config, "manager", Metrics())._parts.open_tiers(SPACE, num_bytes)


def _contents() -> list[bytes]:
    num_bytes = block_bytes_of(SPACE)
    return [(b"%d: " % index + PLAIN * num_bytes)[:num_bytes] for index in range(len(NAMES))]


def _records() -> list[BlockRecord]:
    return [
        BlockRecord(name, NAMES[index - 1] if index else None, index, tenant_digest(""), checksum(content, name))
        for index, (name, content) in enumerate(zip(NAMES, _contents(), strict=True))
    ]


def _store(tiers: Tiers) -> None:
    """Have all blocks on disk and in the store, by way of the arena's first slots."""
    assert tiers.disk is not None and isinstance(tiers.objects, S3ObjectTier)
    assert tiers.objects.wait_ready(READY_S)
    slots, records = list(range(len(NAMES))), _records()
    for slot, content in zip(slots, _contents(), strict=True):
        tiers.arena.view(slot)[:] = content
    assert all(tiers.disk.write([(slot, slot, records[slot]) for slot in slots]))
    assert tiers.objects.put(slots, records)


def _read_back(tiers: Tiers) -> None:
    """Everything comes back from either tier."""
    assert tiers.disk is not None and tiers.objects is not None
    records = _records()
    for first, is_right in (
        (2, lambda slots: all(tiers.disk.read([(index, slot, records[index]) for index, slot in enumerate(slots)]))),
        (4, lambda slots: tiers.objects.get(list(zip(NAMES, slots, strict=True)), 0, tenant_digest("")) == records),
    ):
        slots = range(first, first + len(NAMES))
        assert is_right(slots)
        assert [bytes(tiers.arena.view(slot)) for slot in slots] == _contents()


@pytest.mark.parametrize("is_encrypted", [True, False])
def test_nothing_lies_at_rest_in_the_clear_once_a_key_is_configured(
    tmp_path: Path, s3_server: S3Server, bucket: Bucket, is_encrypted: bool
) -> None:
    key = tmp_path / "kv.key"
    key.write_bytes(bytes(range(32)))
    settings = {"disk_tier.key_file": str(key)} if is_encrypted else {}
    tiers = _open_tiers(tmp_path, s3_server, bucket, settings)
    try:
        _store(tiers)
        _read_back(tiers)
    finally:
        tiers.close(is_kept=False)
    on_disk = b"".join(path.read_bytes() for path in (tmp_path / "disk").rglob("*") if path.is_file())
    in_store = b"".join(bucket.read(name) for name in bucket.list_keys())
    assert [PLAIN in on_disk, PLAIN in in_store] == [not is_encrypted] * 2
