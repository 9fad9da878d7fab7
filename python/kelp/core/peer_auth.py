"""The token that the processes of one deployment share, and what they prove and key with it.

Every use has a key of its own, derived from the token (HKDF-SHA256), so that what is said in one place proves nothing
in another. The token itself never leaves this module: no wire, log or representation has it. Knows no sockets.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import stat
import struct
from pathlib import Path
from typing import Final

from kelp.core.config_peers import PeersConfig
from kelp.core.errors import ConfigError, PeerRefused

MIN_TOKEN_BYTES = 16
MAX_TOKEN_BYTES = 4096
TAG_BYTES = 32
SEAL: Final = b"\xc1KELPTG1"
"""Begins a sealed document; neither JSON nor MessagePack can begin so."""
MAX_OPEN_BYTES = 256
"""Of an unsealed document that is looked at although there is a token: a question for counts."""
WORKER_COMMAND_PROOF, KV_OPERATIONS_PROOF, KV_RESULTS_PROOF = "worker command", "kv operations", "kv results"
_SALT = b"kelp peers 1"
_LENGTH = struct.Struct("<Q")
_log = logging.getLogger(__name__)


class PeerToken:
    """See the module docstring.

    Args:
        secret: `MIN_TOKEN_BYTES` bytes at least.
    """

    def __init__(self, secret: bytes) -> None:
        assert len(secret) >= MIN_TOKEN_BYTES, "load_token refuses shorter ones"
        self._base = hmac.digest(_SALT, secret, hashlib.sha256)
        self._keys: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return "PeerToken(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("a peer token stays in its process")

    def key(self, purpose: str) -> bytes:
        """32 bytes for one purpose and no other."""
        key = self._keys.get(purpose)
        if key is None:
            key = self._keys[purpose] = hmac.digest(self._base, purpose.encode() + b"\x01", hashlib.sha256)
        return key

    def tag(self, purpose: str, *parts: bytes) -> bytes:
        """`TAG_BYTES` bytes that only who knows the token can make of these parts, in this order."""
        keyed = hmac.new(self.key(purpose), digestmod=hashlib.sha256)
        for part in parts:
            keyed.update(_LENGTH.pack(len(part)))
            keyed.update(part)
        return keyed.digest()

    def is_tag(self, tag: bytes, purpose: str, *parts: bytes) -> bool:
        """Whether `tag` is what `tag` makes; takes as long for a wrong one as for the right one."""
        return hmac.compare_digest(tag, self.tag(purpose, *parts))


def load_token(config: PeersConfig) -> PeerToken | None:
    """The deployment's token; None where there is none.

    Raises:
        ConfigError: The file cannot be read, others may read it, or it is too short; says what to do.
    """
    return None if config.token_file is None else PeerToken(read_secret(config.token_file))


def token_of_server(config: PeersConfig, who: str) -> PeerToken | None:
    """See `load_token`; without one, a line in the log says whose ports are open to everybody."""
    token = load_token(config)
    if token is None:
        _log.warning("peers.token_file is not set: whoever reaches a port of this %s is taken for a peer", who)
    return token


def read_secret(path: Path) -> bytes:
    """The token in a file, without the white space around it.

    Raises:
        ConfigError: See `load_token`.
    """
    secret = read_private(path, "peers.token_file")
    if not MIN_TOKEN_BYTES <= len(secret) <= MAX_TOKEN_BYTES:
        raise ConfigError(
            f"peers.token_file: {path}: {len(secret)} bytes, {MIN_TOKEN_BYTES} to {MAX_TOKEN_BYTES} are needed; "
            f"make one with `openssl rand -hex 32 > {path}`"
        )
    return secret


def read_private(path: Path, field: str) -> bytes:
    """What a file that nobody else may open holds, without white space around it; `MAX_TOKEN_BYTES` and one at most.

    Raises:
        ConfigError: It cannot be read, or others may read it; names the field.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            raw = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{field}: {path}: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigError(f"{field}: {path}: others may open it (mode {mode:04o}); run `chmod 600 {path}`")
    return raw.strip()


def make_token_file(path: Path) -> None:
    """Write a new random token that only its owner may read.

    Raises:
        OSError: It cannot be written, or there is one.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))


def seal(token: PeerToken | None, purpose: str, scope: tuple[str, ...], body: bytes, beside: bytes = b"") -> bytes:
    """A document with the proof that a peer wrote it for the incarnation that `scope` names; as it is without a token.

    `beside` is proven, too, and travels by another way.
    """
    if token is None:
        return body
    return SEAL + token.tag(purpose, *_names(scope), body, beside) + body


def unseal(token: PeerToken | None, purpose: str, scope: tuple[str, ...], raw: bytes, beside: bytes = b"") -> bytes:
    """The document in what `seal` made.

    Raises:
        PeerRefused: The sender has not shown the token, or means another incarnation; or it has one, and we have none.
    """
    is_sealed = raw.startswith(SEAL)
    if token is None:
        if is_sealed:
            raise PeerRefused(f"{purpose}: the sender has a token, here peers.token_file is not set")
        return raw
    begin = len(SEAL) + TAG_BYTES
    body = raw[begin:]
    if not is_sealed or not token.is_tag(raw[len(SEAL) : begin], purpose, *_names(scope), body, beside):
        raise PeerRefused(
            f"{purpose}: the sender does not know the token of peers.token_file here, or means another incarnation"
        )
    return body


def proof_in(raw: bytes) -> bytes:
    """Of a sealed document, what no other document has: an answer that is sealed beside it answers this one."""
    return raw[: len(SEAL) + TAG_BYTES]


def _names(scope: tuple[str, ...]) -> list[bytes]:
    return [name.encode() for name in scope]
