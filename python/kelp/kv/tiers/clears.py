"""What has to be cleared still, written down: a manager that is killed meanwhile goes on with it at its next start.

One small file beside the arena or the slot files, replaced as a whole. One that cannot be read stands for everything:
better to compute some blocks again than to keep what somebody wanted gone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kelp.core.types import Tier

_log = logging.getLogger(__name__)
_HEADER = "kelp-kv-clears-1"
_EVERYBODY = "*"
_TENANT_BYTES = 16
JOURNAL_NAME = "clears"
"""Names of journals begin with this."""
LOWER_TIERS = frozenset({Tier.HOST, Tier.DISK, Tier.OBJECT})


@dataclass(frozen=True, slots=True)
class OwedClear:
    """A tenant's blocks (None: everybody's) have to go from these tiers still."""

    tenant: bytes | None
    tiers: frozenset[Tier]


class ClearJournal:
    """See the module docstring; one caller at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> list[OwedClear]:
        """What is owed; blocks."""
        try:
            lines = self._path.read_text(encoding="ascii").splitlines()
            if lines[:1] != [_HEADER] or lines[-1] != str(len(lines) - 2):
                raise ValueError("it is not whole")
            return [_parse(line) for line in lines[1:-1]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            _log.error("%s: %s; everything will be cleared", self._path, error)
            return [OwedClear(None, LOWER_TIERS)]

    def save(self, owed: Iterable[OwedClear]) -> None:
        """From now on this is owed, also after power loss if the file system outlives it; blocks.

        Raises:
            OSError: What was owed before still is.
        """
        lines = sorted({_line(one) for one in owed})
        if not lines:
            self._path.unlink(missing_ok=True)
            return
        fresh = self._path.with_name(f"{self._path.name}.new")
        with fresh.open("w", encoding="ascii") as file:
            file.write("\n".join([_HEADER, *lines, str(len(lines))]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        _sync_folder(self._path.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _line(owed: OwedClear) -> str:
    tenant = _EVERYBODY if owed.tenant is None else owed.tenant.hex()
    return " ".join([tenant, *(tier.name.lower() for tier in sorted(owed.tiers))])


def _parse(line: str) -> OwedClear:
    tenant, *names = line.split()
    tiers = frozenset(tier for tier in LOWER_TIERS if tier.name.lower() in names)
    digest = None if tenant == _EVERYBODY else bytes.fromhex(tenant)
    if len(tiers) != len(names) or (digest is not None and len(digest) != _TENANT_BYTES):
        raise ValueError(f"line {line!r} makes no sense")
    return OwedClear(digest, tiers)
