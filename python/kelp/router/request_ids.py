"""Names of decisions: the client's id of a request where it gave one, so that it can ask why later.

Clients give what ids they like, also such as look like those made here: `mine-1` for sequence 1 of `mine`. So whatever
is added to a client's id begins with a control character, and ids of clients hold none; people never see it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

_MAX_CHARS = 256
_MARK = "\x1f"
_PRINTABLE = {code: "?" for code in (*range(0x20), 0x7F)}
_SEQUENCE = re.compile(r"-[1-9][0-9]{0,8}$")
_TWIN = re.compile(rf"\.[0-9a-f]{{8}}(?=$|{_MARK})")


class RequestIds:
    """Ids of live requests; belongs to one event loop.

    Clients may give one id to several requests: while one of them runs, others get an ending of their own.
    """

    def __init__(self) -> None:
        self._live: set[str] = set()

    @contextmanager
    def named(self, client_id: str) -> Iterator[str]:
        """A name that no other live request has, nor a sequence of it, while the block runs."""
        given = _cleaned(client_id)[:_MAX_CHARS] or secrets.token_hex(16)
        name = given
        while name in self._live:
            name = f"{given}{_MARK}.{secrets.token_hex(4)}"
        self._live.add(name)
        try:
            yield name
        finally:
            self._live.remove(name)


def sequence_name(name: str, index: int) -> str:
    """Name of sequence `index`, from 1, of the request of this name."""
    return f"{name}{_MARK}-{index}"


def shown(name: str) -> str:
    """A name as people read and write it."""
    return name.replace(_MARK, "")


def meant_by(asked: str) -> list[str]:
    """Names that somebody may mean who writes this, likeliest first: a client's own id before one made of another."""
    written = _cleaned(asked)
    names = [written, _SEQUENCE.sub(rf"{_MARK}\g<0>", written)]
    names += [_TWIN.sub(rf"{_MARK}\g<0>", name) for name in names]
    return list(dict.fromkeys(names))


def _cleaned(client_id: str) -> str:
    return client_id.encode(errors="replace").decode().translate(_PRINTABLE)
