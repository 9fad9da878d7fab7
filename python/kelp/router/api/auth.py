"""Who may ask: one shared bearer token, compared in constant time."""

from __future__ import annotations

import hmac
from pathlib import Path

from kelp.core.errors import ConfigError

_SCHEME = "Bearer "
_MIN_TOKEN_CHARS = 16


class Authenticator:
    """Accepts one token; made without one, everybody."""

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else token.encode()

    def accepts(self, header: str | None) -> bool:
        """Whether an `Authorization` header (or gRPC metadata entry) lets its sender in."""
        if self._token is None:
            return True
        given = (header or "")[len(_SCHEME) :] if (header or "").startswith(_SCHEME) else ""
        return hmac.compare_digest(given.encode(), self._token)


def read_token(path: Path) -> str:
    """The token in a file, white space around it dropped.

    Raises:
        ConfigError: No such file, or too short a token.
    """
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"--token-file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--token-file {path}: not text") from None
    if len(token) < _MIN_TOKEN_CHARS:
        raise ConfigError(f"--token-file {path}: {len(token)} characters, at least {_MIN_TOKEN_CHARS} are needed")
    return token
