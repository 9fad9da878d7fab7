"""How a record is written: its document and, where there is a token, a second line that proves that a peer wrote it.

What stands in a registry says where prompts go. Who has no token reads the document alone. The proof covers the name
that the record stands under, so that none can be copied to another one. The bytes are the same in every registry.
"""

from __future__ import annotations

import logging
import re
from typing import Generic, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from kelp.core.errors import PeerRefused, ProtocolError
from kelp.core.peer_auth import PeerToken
from kelp.core.wire import decode_message, encode_message
from kelp.registry.base import StampedRecord

MAX_RECORD_BYTES = 64 * 1024
_PURPOSE = "registry record"
_PROOF = re.compile(rb"\n([0-9a-f]{64})\n?\Z")
_log = logging.getLogger(__name__)
RecordT = TypeVar("RecordT", bound=StampedRecord)


class RecordSeal(Generic[RecordT]):
    """Writes and reads records of one kind.

    Args:
        suffix: Ends the names that they stand under; tells the kinds apart.
        token: What whoever writes here knows; None: anybody's records count.
    """

    def __init__(self, suffix: str, adapter: TypeAdapter[RecordT], token: PeerToken | None) -> None:
        self.suffix = suffix
        self._adapter = adapter
        self._token = token

    def place(self, name: str) -> str:
        """The name under which a record stands: fit for a file, and for a part of a key."""
        return quote(name, safe="") + self.suffix

    def written(self, record: RecordT, place: str) -> bytes:
        """The record's bytes at `place`."""
        document = encode_message(record)
        if self._token is None:
            return document
        return b"%b\n%b\n" % (document, self._token.tag(_PURPOSE, place.encode(), document).hex().encode())

    def read(self, raw: bytes, place: str) -> RecordT:
        """The record in what `written` made.

        Raises:
            ProtocolError: It is too long, or no record.
            PeerRefused: No peer wrote it, or not for this place.
        """
        if len(raw) > MAX_RECORD_BYTES:
            raise ProtocolError(f"registry record {place}: it exceeds the limit of {MAX_RECORD_BYTES} bytes")
        found = _PROOF.search(raw)
        document, tag = (raw, "") if found is None else (raw[: found.start()], found.group(1).decode())
        if self._token is not None and not self._token.is_tag(bytes.fromhex(tag), _PURPOSE, place.encode(), document):
            raise PeerRefused(f"registry record {place}: nobody who knows the token of peers.token_file wrote it")
        return decode_message(self._adapter, document, f"registry record {place}")


class Refusals:
    """Records that were no use: each is said once, until it is another one."""

    def __init__(self) -> None:
        self._errors: dict[str, Exception] = {}

    def note(self, place: str, error: Exception) -> None:
        """This one is ignored."""
        if str(self._errors.get(place)) != str(error):
            # Strangers choose places' names: a line break in one must not begin a line that looks like ours.
            _log.warning("ignored: %s", str(error).encode("unicode_escape").decode())
        self._errors[place] = error

    def clear(self, place: str) -> None:
        """It is of use now."""
        self._errors.pop(place, None)

    def is_strangers(self, place: str) -> bool:
        """Whether it is refused for who wrote it."""
        return isinstance(self._errors.get(place), PeerRefused)

    def keep(self, places: set[str]) -> None:
        """Forget all others: they are gone."""
        self._errors = {place: error for place, error in self._errors.items() if place in places}
