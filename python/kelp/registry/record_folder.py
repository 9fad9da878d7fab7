"""A directory with one JSON file per record, which lives as long as somebody renews it.

A rename makes each renewal atomic; `registry.record_seal` says what a file holds. Knows nothing of what the records
say, but for their heartbeat; wall-clock time is compared within one host only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Generic

from pydantic import TypeAdapter

from kelp.core.clock import Clock
from kelp.core.errors import PeerRefused, ProtocolError
from kelp.core.peer_auth import PeerToken
from kelp.registry.record_seal import MAX_RECORD_BYTES as MAX_RECORD_BYTES
from kelp.registry.record_seal import RecordSeal, RecordT, Refusals

_TEMPORARY = ".new-"
_log = logging.getLogger(__name__)


class RecordFolder(Generic[RecordT]):
    """Records of one kind; implements `registry.store.RecordStore`.

    Args:
        suffix: Ends the files' names; different kinds share a folder by it.
        expiry_s: A record renewed longer ago is dead.
        token: What whoever writes here knows; None: anybody's records count.
    """

    def __init__(
        self,
        folder: Path,
        suffix: str,
        adapter: TypeAdapter[RecordT],
        expiry_s: float,
        clock: Clock,
        token: PeerToken | None = None,
    ) -> None:
        self._folder = folder
        self._seal = RecordSeal(suffix, adapter, token)
        self._expiry_ns = int(expiry_s * 1e9)
        self._clock = clock
        self._refusals = Refusals()

    def write(self, name: str, record: RecordT) -> None:
        """Create or renew a record; stamps the heartbeat.

        Raises:
            OSError: The folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path_of(name)
        stamped = record.model_copy(update={"heartbeat_ns": self._clock.wall_ns()})
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=_TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._seal.written(stamped, path.name))
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def read(self, name: str) -> RecordT | None:
        """One record, dead or alive."""
        return self._read(self._path_of(name))

    def remove_if(self, name: str, is_it: Callable[[RecordT], bool]) -> None:
        """See `RecordStore`."""
        record = self.read(name)
        if record is not None and is_it(record):
            self._path_of(name).unlink(missing_ok=True)

    def live(self) -> list[RecordT]:
        """All live records in the order of their names; a missing folder has none."""
        oldest_ns = self._clock.wall_ns() - self._expiry_ns
        records = [self._read(path) for path in self._paths()]
        return [record for record in records if record and record.heartbeat_ns >= oldest_ns]

    def sweep(self) -> int:
        """Remove the dead records, and what killed writers left; return how many records there were.

        A folder that cannot be read just now is left as it is.
        """
        oldest_ns = self._clock.wall_ns() - self._expiry_ns
        try:
            dead = [path for path in self._paths() if self._is_dead(path, oldest_ns)]
            for path in (*dead, *self._abandoned(oldest_ns)):
                path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("registry %s is not swept: %s", self._folder, error)
            return 0
        return len(dead)

    def _abandoned(self, oldest_ns: int) -> list[Path]:
        """Files that were never renamed to a record: their writers are gone."""
        found = []
        for path in self._folder.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime_ns < oldest_ns:
                    found.append(path)
        return found

    def _is_dead(self, path: Path, oldest_ns: int) -> bool:
        """Whether nobody needs it; what others wrote, who know another token or none, is theirs while they renew it."""
        record = self._read(path)
        if record is not None:
            return record.heartbeat_ns < oldest_ns
        if not self._refusals.is_strangers(path.name):
            return True
        try:
            return path.stat().st_mtime_ns < oldest_ns
        except FileNotFoundError:
            return False

    def _paths(self) -> list[Path]:
        if not self._folder.exists():
            return []
        paths = sorted(path for path in self._folder.iterdir() if path.name.endswith(self._seal.suffix))
        self._refusals.keep({path.name for path in paths})
        return paths

    def _path_of(self, name: str) -> Path:
        return self._folder / self._seal.place(name)

    def _read(self, path: Path) -> RecordT | None:
        """The record; None if there is none, or one that is no use, which is said once."""
        try:
            with path.open("rb") as file:
                record = self._seal.read(file.read(MAX_RECORD_BYTES + 1), path.name)
        except FileNotFoundError:
            return None
        except (ProtocolError, PeerRefused, OSError) as error:
            self._refusals.note(path.name, error)
            return None
        self._refusals.clear(path.name)
        return record
