"""Who may ask: one shared bearer token, compared in constant time."""

from __future__ import annotations

import hmac
from pathlib import Path

from kelp.core.errors import ConfigError, Unauthenticated

_SCHEME = "Bearer "
_MIN_TOKEN_CHARS = 16


class Authenticator:
    """Accepts one token; made without one, everybody."""

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else token.encode()

    def check(self, header: str | None) -> None:
        """Let the sender of an `Authorization` header (or gRPC metadata entry) in.

        Raises:
            Unauthenticated: It shows no token, or another one.
        """
        if self._token is None:
            return
        given = (header or "")[len(_SCHEME) :] if (header or "").startswith(_SCHEME) else ""
        # HTTP servers hand over bytes that are no UTF-8 as surrogates.
        if not hmac.compare_digest(given.encode(errors="surrogatepass"), self._token):
            raise Unauthenticated("a bearer token is required")


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
