"""What a registry said last, noted in a file of this host: for a router that starts while the registry is away.

One file for each kind of records and each registry: a line per record and, where there is a token, one that proves that
a peer wrote them. Old records do little harm: a worker's socket refuses who means another incarnation.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter

from kelp.core.clock import Clock
from kelp.core.errors import PeerRefused, ProtocolError
from kelp.core.peer_auth import PeerToken
from kelp.core.wire import decode_message, encode_message
from kelp.registry.base import StampedRecord

_PURPOSE = "registry notes"
_MAX_BYTES = 64 * 1024 * 1024
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_REST_S = 30.0
"""After a note that could not be written: the disk is full, or not ours, and will not change soon."""
_TEMPORARY = ".new-"
_ABANDONED_S = 60.0
_log = logging.getLogger(__name__)
RecordT = TypeVar("RecordT", bound=StampedRecord)


@dataclass(frozen=True, slots=True)
class NotedKind(Generic[RecordT]):
    """One kind of records.

    Attributes:
        suffix: Ends the file's name.
        gist_of: What must have changed for records to be noted again.
        bare_of: A record without what is true for a moment only.
    """

    suffix: str
    adapter: TypeAdapter[RecordT]
    gist_of: Callable[[RecordT], Hashable]
    bare_of: Callable[[RecordT], RecordT]


class LastSeen(Generic[RecordT]):
    """Records of one kind. Routers of a host share the file: they read the same registry, and the last one counts.

    Args:
        folder: Where the file is; made when it is needed.
        registry: The registry's address.
        token: What whoever writes there knows; None: what this user has written counts.
    """

    def __init__(
        self,
        folder: Path,
        registry: str,
        kind: NotedKind[RecordT],
        token: PeerToken | None,
        clock: Clock,
    ) -> None:
        self._path = folder / f"{hashlib.sha256(registry.encode()).hexdigest()[:16]}{kind.suffix}"
        self._kind = kind
        self._token = token
        self._clock = clock
        self._noted: list[Hashable] = []
        self._rests_until_s = 0.0
        self._has_failed = False

    def is_news(self, records: Sequence[RecordT]) -> bool:
        """Whether these should be noted; quick. That nobody is there is not: it is what an empty registry says, too."""
        is_due = self._clock.monotonic_s() >= self._rests_until_s
        return bool(records) and is_due and list(map(self._kind.gist_of, records)) != self._noted

    def note(self, records: Sequence[RecordT]) -> None:
        """Write them in place of those before; blocks. What cannot be written is said once, and tried again later."""
        try:
            self._write(b"".join(encode_message(self._kind.bare_of(record)) + b"\n" for record in records))
        except OSError as error:
            if not self._has_failed:
                _log.warning("what the registry says is not noted for a start without it: %s", error)
            self._has_failed, self._rests_until_s = True, self._clock.monotonic_s() + _REST_S
            return
        self._noted, self._has_failed = list(map(self._kind.gist_of, records)), False

    def recall(self) -> list[RecordT]:
        """What was noted last, by whichever router; blocks. Nothing where that is of no use, which is said."""
        try:
            return self._read()
        except FileNotFoundError:
            return []
        except (OSError, ProtocolError, PeerRefused) as error:
            _log.warning("what the registry said last is of no use: %s", error)
            return []

    def _write(self, document: bytes) -> None:
        folder = self._path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep(folder)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=_TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(document + self._proof_of(document))
            os.replace(temporary, self._path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _sweep(self, folder: Path) -> None:
        """Remove what killed writers left."""
        oldest_ns = self._clock.wall_ns() - int(_ABANDONED_S * 1e9)
        for path in folder.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime_ns < oldest_ns:
                    path.unlink()

    def _read(self) -> list[RecordT]:
        with self._path.open("rb") as file:
            for found in (os.fstat(file.fileno()), self._path.parent.stat()):
                if found.st_uid != os.getuid() or found.st_mode & _OTHERS_WRITE:
                    raise PeerRefused(f"{self._path}: others may write it, or its folder")
            raw = file.read(_MAX_BYTES + 1)
        lines = raw.splitlines(keepends=True)
        if len(raw) > _MAX_BYTES or not lines:
            raise ProtocolError(f"{self._path}: {len(raw)} bytes")
        document, proof = b"".join(lines[:-1]), lines[-1]
        if proof != self._proof_of(document):
            raise PeerRefused(f"{self._path}: it was not written whole by one who knows the token of peers.token_file")
        return [decode_message(self._kind.adapter, line, str(self._path)) for line in lines[:-1]]

    def _proof_of(self, document: bytes) -> bytes:
        """The last line; without a token it shows that nothing is missing."""
        if self._token is None:
            return hashlib.sha256(document).hexdigest().encode() + b"\n"
        return self._token.tag(_PURPOSE, self._path.name.encode(), document).hex().encode() + b"\n"
