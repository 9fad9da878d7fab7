"""The standalone router over HTTP: `POST /v1/<operation>` with a JSON document.

`GET /health` needs no token; `GET /metrics` is Prometheus text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from aiohttp import web

from kelp.core.errors import InternalError, KelpError, Unauthenticated
from kelp.core.wire import MAX_MESSAGE_BYTES
from kelp.router.api.auth import Authenticator
from kelp.router.api.operations import Operations

_log = logging.getLogger(__name__)
_JSON = "application/json"
_RETRY_AFTER_S = "1"


class HttpApi:
    """Serves `operations` on one port."""

    def __init__(self, operations: Operations, auth: Authenticator, metrics_text: Callable[[], bytes]) -> None:
        self._operations = operations
        self._auth = auth
        self._metrics_text = metrics_text
        app = web.Application(client_max_size=MAX_MESSAGE_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/{operation}", self._call)
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which the system chooses for 0.

        Raises:
            OSError: The address cannot be bound.
        """
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Answer what has been asked, and close."""
        await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            self._check(request)
        except Unauthenticated as error:
            return _failure(error)
        return web.Response(body=self._metrics_text(), content_type="text/plain", charset="utf-8")

    async def _call(self, request: web.Request) -> web.Response:
        try:
            self._check(request)
            answer = self._operations.call(request.match_info["operation"], await request.read() or b"{}")
        except KelpError as error:
            return _failure(error)
        except web.HTTPException:
            raise
        except Exception as error:
            # The outermost guard of a request: the others must go on.
            _log.exception("%s failed", request.path)
            return _failure(InternalError(f"{type(error).__name__}: {error}"))
        return web.Response(body=answer, content_type=_JSON)

    def _check(self, request: web.Request) -> None:
        self._auth.check(request.headers.get("Authorization"))


def _failure(error: KelpError) -> web.Response:
    document = json.dumps({"error": {"code": f"KELP_{error.code}", "message": error.text}})
    return web.Response(text=document, status=error.http_status, content_type=_JSON, headers=_headers(error))


def _headers(error: KelpError) -> dict[str, str]:
    if isinstance(error, Unauthenticated):
        return {"WWW-Authenticate": "Bearer"}
    return {"Retry-After": _RETRY_AFTER_S} if error.http_status in (429, 503) else {}
