"""Opening the disk tier: folder, room, files, O_DIRECT, and whoever moves the bytes."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import shutil
from pathlib import Path

from kelp.core.config_kv import DiskTierConfig
from kelp.core.errors import ConfigError
from kelp.core.kv_manager_messages import SpaceRecord
from kelp.kv.tiers.base import HostArena
from kelp.kv.tiers.disk.folder import Manifest, SpaceFolder, claim_folder, make_room
from kelp.kv.tiers.disk.slots import ALIGNMENT_BYTES, DiskSlots
from kelp.kv.tiers.disk.tier import FileDiskTier
from kelp.kv.tiers.records import RECORD_BYTES, RecordFormat, space_digest
from kelp.kv.tiers.sealing import Sealer
from kelp.transport import open_file_transport

_log = logging.getLogger(__name__)


def open_disk_tier(config: DiskTierConfig, space: SpaceRecord, arena: HostArena, sealer: Sealer | None) -> FileDiskTier:
    """The disk tier under `config.path`, with what earlier managers of the same space left there.

    `sealer` encrypts (`keys.open_sealer`); without one nothing is encrypted.

    Raises:
        ConfigError: Names `disk_tier.path`, `disk_tier.max_bytes` or `disk_tier.direct_io`, and what is there.
    """
    assert config.path is not None
    digest = space_digest(space, arena.region.block_bytes)
    folder = claim_folder(config.path, digest)
    try:
        return _open(config, folder, space, arena, sealer)
    except OSError as error:
        folder.release()
        raise ConfigError(f"disk_tier.path: {folder.path}: {error.strerror}") from None
    except BaseException:
        folder.release()
        raise


def _open(
    config: DiskTierConfig, folder: SpaceFolder, space: SpaceRecord, arena: HostArena, sealer: Sealer | None
) -> FileDiskTier:
    region = arena.region
    assert region.stride % ALIGNMENT_BYTES == 0 and region.base_address % ALIGNMENT_BYTES == 0
    num_slots = make_room(folder, config.max_bytes) // (region.stride + RECORD_BYTES)
    if num_slots == 0:
        raise ConfigError(f"disk_tier.max_bytes: {config.max_bytes} bytes leave no room for a block of {region.stride}")
    is_direct = _wants_direct_io(config, folder.path)
    records = RecordFormat(space_digest(space, region.block_bytes))
    slots = DiskSlots(folder.path, region.stride, records, is_direct)
    with contextlib.ExitStack() as undo:
        undo.callback(slots.close)
        _allocate(slots, num_slots, folder.path)
        fields = {name: getattr(space, name) for name in space.__struct_fields__}
        key_id = sealer.key_id.hex() if sealer else ""
        folder.write_manifest(Manifest(fields, region.block_bytes, region.stride, num_slots, key_id))
        transport = open_file_transport(is_direct)
        undo.pop_all()
    _log.info("disk tier: %d slots of %d bytes in %s by %s", num_slots, region.stride, folder.path, transport.name)
    return FileDiskTier(folder, slots, transport, arena, sealer)


def _allocate(slots: DiskSlots, num_slots: int, folder: Path) -> None:
    wanted = num_slots * (slots.file.slot_bytes + RECORD_BYTES)
    is_new = slots.size_bytes == 0
    free = shutil.disk_usage(folder).free + slots.allocated_bytes
    try:
        if wanted > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        slots.resize(num_slots)
        if slots.allocated_bytes >= wanted:
            return
        fault = f"disk_tier.path: the file system of {folder} does not preallocate files"
    except OSError as error:
        fault = f"disk_tier.max_bytes: {wanted} bytes in {folder}: {error.strerror}; {free} are free"
    if is_new:
        shutil.rmtree(folder, ignore_errors=True)
    raise ConfigError(fault)


def _wants_direct_io(config: DiskTierConfig, folder: Path) -> bool:
    if config.direct_io == "never":
        return False
    reason = _direct_io_fault(folder / "probe")
    if reason and config.direct_io == "always":
        raise ConfigError(f"disk_tier.direct_io: always, but the file system of {folder} has none: {reason}")
    return not reason


def _direct_io_fault(path: Path) -> str:
    """Why a file in this place cannot be written and read past the page cache; empty if it can."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        return str(error.strerror)
    try:
        with mmap.mmap(-1, ALIGNMENT_BYTES) as page:
            os.pwritev(fd, [page], 0)
            os.preadv(fd, [page], 0)
    except OSError as error:
        return str(error.strerror)
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)
    return ""
