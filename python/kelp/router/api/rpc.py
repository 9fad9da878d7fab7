"""The standalone router over gRPC: `router.proto`, whose messages are JSON documents as `google.protobuf.Struct`."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from kelp.core.errors import ConfigError, InternalError, InvalidRequest, KelpError
from kelp.core.wire import MAX_MESSAGE_BYTES
from kelp.router.api.auth import Authenticator
from kelp.router.api.operations import Operations

_log = logging.getLogger(__name__)
SERVICE = "kelp.router.v1.Router"
_STOP_GRACE_S = 2.0
# Two servers would share one port otherwise, each getting a part of the calls.
_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)]


def rpc_name(operation: str) -> str:
    """`first_token` -> `FirstToken`."""
    return "".join(part.capitalize() for part in operation.split("_"))


class GrpcApi:
    """Serves `operations` on one port."""

    def __init__(self, operations: Operations, auth: Authenticator) -> None:
        self._operations = operations
        self._auth = auth
        self._server = grpc.aio.server(options=_OPTIONS)
        handlers = {
            rpc_name(name): grpc.unary_unary_rpc_method_handler(
                self._handler(name),
                request_deserializer=Struct.FromString,
                response_serializer=Struct.SerializeToString,
            )
            for name in operations.names
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which the system chooses for 0.

        Raises:
            ConfigError: The address cannot be bound.
        """
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            bound = 0
        if not bound:
            raise ConfigError(f"--grpc-port {port}: cannot listen on {host}; is the port in use?")
        await self._server.start()
        return int(bound)

    async def stop(self) -> None:
        """Answer what has been asked, and close."""
        await self._server.stop(_STOP_GRACE_S)

    def _handler(self, name: str) -> Callable[[Struct, Any], Awaitable[Struct]]:
        async def handle(request: Struct, context: Any) -> Struct:
            metadata = dict(context.invocation_metadata() or ())
            try:
                self._auth.check(metadata.get("authorization"))
                answer = self._operations.call(name, document_of(request))
            except KelpError as error:
                await context.abort(grpc.StatusCode[error.grpc_status], str(error))
            except Exception as error:
                # The outermost guard of a request: the others must go on.
                _log.exception("%s failed", name)
                await context.abort(grpc.StatusCode.INTERNAL, str(InternalError(f"{type(error).__name__}: {error}")))
            return json_format.Parse(answer, Struct())

        return handle


def document_of(request: Struct) -> bytes:
    """JSON of a Struct; its numbers are doubles, which ours are integers of where they are whole.

    Raises:
        InvalidRequest: It holds what JSON cannot say, infinity for example.
    """
    try:
        document = json_format.MessageToDict(request)
    except (ValueError, json_format.Error) as error:
        raise InvalidRequest(f"document: {error}") from None
    return json.dumps(_whole(document)).encode()


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_whole(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
