"""A directory with one JSON file per record, which lives as long as somebody renews it.

A rename makes each renewal atomic. The file is the document and, where there is a token, a second line that proves that
a peer wrote it: what stands in a registry says where prompts go. Who has no token reads the document alone. Knows
nothing of what the records say, but for their heartbeat; wall-clock time is compared within one host only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from kelp.core.clock import Clock
from kelp.core.errors import PeerRefused, ProtocolError
from kelp.core.peer_auth import PeerToken
from kelp.core.wire import decode_message, encode_message
from kelp.registry.base import StampedRecord

MAX_RECORD_BYTES = 64 * 1024
_PURPOSE = "registry record"
_TEMPORARY = ".new-"
_PROOF = re.compile(rb"\n([0-9a-f]{64})\n?\Z")
_log = logging.getLogger(__name__)
RecordT = TypeVar("RecordT", bound=StampedRecord)


class RecordFolder(Generic[RecordT]):
    """Records of one kind.

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
        self._suffix = suffix
        self._adapter = adapter
        self._expiry_ns = int(expiry_s * 1e9)
        self._clock = clock
        self._token = token
        self._refused: dict[str, ProtocolError | PeerRefused | OSError] = {}

    def write(self, name: str, record: RecordT) -> None:
        """Create or renew a record; stamps the heartbeat.

        Raises:
            OSError: The folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        stamped = record.model_copy(update={"heartbeat_ns": self._clock.wall_ns()})
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=_TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._proven(encode_message(stamped), self._path_of(name)))
            os.replace(temporary, self._path_of(name))
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def read(self, name: str) -> RecordT | None:
        """One record, dead or alive."""
        return self._read(self._path_of(name))

    def remove(self, name: str) -> None:
        """Remove a record; idempotent."""
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
        if not isinstance(self._refused.get(path.name), PeerRefused):
            return True
        try:
            return path.stat().st_mtime_ns < oldest_ns
        except FileNotFoundError:
            return False

    def _paths(self) -> list[Path]:
        if not self._folder.exists():
            return []
        paths = sorted(path for path in self._folder.iterdir() if path.name.endswith(self._suffix))
        self._refused = {path.name: self._refused[path.name] for path in paths if path.name in self._refused}
        return paths

    def _path_of(self, name: str) -> Path:
        return self._folder / (quote(name, safe="") + self._suffix)

    def _proven(self, document: bytes, path: Path) -> bytes:
        if self._token is None:
            return document
        return b"%b\n%b\n" % (document, self._token.tag(_PURPOSE, path.name.encode(), document).hex().encode())

    def _believed(self, raw: bytes, path: Path) -> bytes:
        """The document, without what proves it."""
        found = _PROOF.search(raw)
        document, tag = (raw, "") if found is None else (raw[: found.start()], found.group(1).decode())
        if self._token is not None and not self._token.is_tag(
            bytes.fromhex(tag), _PURPOSE, path.name.encode(), document
        ):
            raise PeerRefused(f"registry record {path.name}: nobody who knows the token of peers.token_file wrote it")
        return document

    def _read(self, path: Path) -> RecordT | None:
        """The record; None if there is none, or one that is no use, which is said once."""
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_RECORD_BYTES + 1)
            if len(raw) > MAX_RECORD_BYTES:
                raise ProtocolError(f"registry record {path.name}: it exceeds the limit of {MAX_RECORD_BYTES} bytes")
            record = decode_message(self._adapter, self._believed(raw, path), f"registry record {path.name}")
        except FileNotFoundError:
            return None
        except (ProtocolError, PeerRefused, OSError) as error:
            if str(self._refused.get(path.name)) != str(error):
                _log.warning("ignored: %s", error)
            self._refused[path.name] = error
            return None
        self._refused.pop(path.name, None)
        return record
