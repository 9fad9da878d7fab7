"""Folders of the disk tier: one per space, locked while in use, all of them within one bound.

The manifest says what a folder is. Its content proves itself (`tiers.records`), so a damaged manifest is written anew;
an intact one of a version that is not known here is not touched, nor is what lies beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kelp.core.errors import ConfigError

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_NAME = re.compile(r"v\d+-[0-9a-f]{32}(\.\d+)?")
_MAX_UNKNOWN = 8


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds.

    Attributes:
        space: The fields of `SpaceRecord`, the version of the block hash among them.
        key_id: Hex; of the key that blocks are encrypted with now; empty for none.
    """

    space: dict[str, object]
    block_bytes: int
    slot_bytes: int
    num_slots: int
    key_id: str
    format: int = FORMAT_VERSION

    def encode(self) -> str:
        """As it is written."""
        fields = asdict(self)
        return json.dumps({**fields, "digest": _digest(fields)}, indent=1, sort_keys=True) + "\n"


def _digest(fields: dict[str, object]) -> str:
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16).hexdigest()


def _is_foreign(folder: Path) -> bool:
    """Whether an intact manifest says that the folder is of another version."""
    try:
        fields = json.loads((folder / _MANIFEST).read_text())
        digest = fields.pop("digest")
        is_intact = digest == _digest(fields)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return False
    return bool(is_intact and fields.get("format") != FORMAT_VERSION)


@dataclass(eq=False)
class SpaceFolder:
    """The folder of one space, locked by this process."""

    path: Path
    lock: int

    def write_manifest(self, manifest: Manifest) -> None:
        """Say what the folder holds, atomically."""
        text = manifest.encode()
        target = self.path / _MANIFEST
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if target.read_text() == text:
                return
        fresh = self.path / f"{_MANIFEST}.new"
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(target)
        os.fsync(self.lock)

    def release(self) -> None:
        """Let others have it; idempotent."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def claim_folder(root: Path, space: bytes) -> SpaceFolder:
    """Lock the folder of a space, made if need be.

    Raises:
        ConfigError: It cannot be used, or another process uses it; names `disk_tier.path`.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = next(path for path in _candidates(root, space) if not _is_foreign(path))
        path.mkdir(mode=0o700, exist_ok=True)
        lock = _lock(path)
    except StopIteration:
        raise ConfigError(f"disk_tier.path: {root} is full of folders of unknown versions") from None
    except OSError as error:
        raise ConfigError(f"disk_tier.path: {root}: {error.strerror}") from None
    if lock is None:
        raise ConfigError(f"disk_tier.path: {path} is in use by another process")
    os.utime(path)
    return SpaceFolder(path, lock)


def _candidates(root: Path, space: bytes) -> Iterator[Path]:
    name = f"v{FORMAT_VERSION}-{space.hex()}"
    yield root / name
    for number in range(1, _MAX_UNKNOWN):
        yield root / f"{name}.{number}"


def _lock(path: Path) -> int | None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    if os.stat(path).st_ino != os.fstat(fd).st_ino:
        os.close(fd)
        return None
    return fd


def make_room(own: SpaceFolder, max_bytes: int) -> int:
    """Remove other spaces, the one opened longest ago first, until nothing but those in use is in the way.

    Returns:
        Bytes that are left of `max_bytes` for this space.
    """
    others = [path for path in own.path.parent.iterdir() if path != own.path and _NAME.fullmatch(path.name)]
    in_use = 0
    for path in sorted(others, key=lambda other: other.stat().st_mtime):
        lock = _lock(path)
        if lock is None:
            in_use += _size_bytes(path)
            continue
        _log.warning("disk tier: %s is of another space; removed to make room", path)
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
    return max(0, max_bytes - in_use)


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
