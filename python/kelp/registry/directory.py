"""Registry of one host: a directory with one JSON file per worker.

A rename makes each renewal atomic. A record whose heartbeat is older than `expiry_s` is dead; a starting
worker sweeps such files away. Wall-clock time is compared within one host only.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from urllib.parse import quote

from kelp.core.clock import Clock, SystemClock
from kelp.core.errors import ProtocolError
from kelp.core.wire import decode_message, encode_message
from kelp.registry.base import WORKER_RECORD, WorkerRecord

_log = logging.getLogger(__name__)
_SUFFIX = ".worker.json"


class DirectoryRegistry:
    """See the module docstring; implements `registry.base.Registry`."""

    def __init__(self, folder: Path, expiry_s: float, clock: Clock | None = None) -> None:
        self._folder = folder
        self._expiry_ns = int(expiry_s * 1e9)
        self._clock = clock or SystemClock()

    def publish(self, record: WorkerRecord) -> None:
        """See `Registry`; stamps the heartbeat."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        stamped = record.model_copy(update={"heartbeat_ns": self._clock.wall_ns()})
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(encode_message(stamped))
            os.replace(temporary, self._path_of(record.worker_id))
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def withdraw(self, worker_id: str, epoch: str) -> None:
        """See `Registry`."""
        record = self._read(self._path_of(worker_id))
        if record is not None and record.epoch == epoch:
            self._path_of(worker_id).unlink(missing_ok=True)

    def snapshot(self) -> list[WorkerRecord]:
        """See `Registry`; a missing directory is an empty registry."""
        oldest_ns = self._clock.wall_ns() - self._expiry_ns
        records = [self._read(path) for path in self._paths()]
        return [record for record in records if record and record.heartbeat_ns >= oldest_ns]

    def sweep(self) -> int:
        """Remove the records of dead workers and return how many there were."""
        oldest_ns = self._clock.wall_ns() - self._expiry_ns
        dead = [
            path for path in self._paths() if (record := self._read(path)) is None or record.heartbeat_ns < oldest_ns
        ]
        for path in dead:
            path.unlink(missing_ok=True)
        return len(dead)

    def _paths(self) -> list[Path]:
        if not self._folder.exists():
            return []
        return sorted(path for path in self._folder.iterdir() if path.name.endswith(_SUFFIX))

    def _path_of(self, worker_id: str) -> Path:
        return self._folder / (quote(worker_id, safe="") + _SUFFIX)

    def _read(self, path: Path) -> WorkerRecord | None:
        try:
            return decode_message(WORKER_RECORD, path.read_bytes(), f"registry record {path.name}")
        except FileNotFoundError:
            return None
        except ProtocolError as error:
            _log.warning("ignored: %s", error)
            return None
