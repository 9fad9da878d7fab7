"""A worker's commands and answers as Triton's tensors.

One sending thread answers all requests; whatever a request has queued up shares a response.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from kelp.client.base import WorkerOutput
from kelp.core.answer_seal import AnswerSeal
from kelp.core.cancel_watch import CancelWatch
from kelp.core.errors import InternalError, InvalidRequest, KelpError
from kelp.core.exchange import Exchange, Tensors
from kelp.core.messages import WORKER_COMMAND, Finished, StatusCommand, WorkerCommand
from kelp.core.outbox import Lane, Outbox
from kelp.core.peer_auth import MAX_OPEN_BYTES, SEAL, WORKER_COMMAND_PROOF, PeerToken, unseal
from kelp.core.wire import decode_message, encode_message
from kelp.worker.channel import Source, StreamItem


class ExchangeChannel:
    """See `worker.channel.Channel`."""

    def __init__(self, exchange: Exchange, outbox: Outbox[StreamItem], watch: CancelWatch, seal: AnswerSeal) -> None:
        self._exchange = exchange
        self._seal = seal
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self._lane: Lane[StreamItem] = outbox.lane(self._send, self._note_failure)
        self._cancel: Callable[[], None] | None = None
        self._failure: KelpError | None = None

    @property
    def failure(self) -> KelpError | None:
        """See `Channel`."""
        return self._failure

    def open(self, source: Source) -> None:
        """See `Channel`."""
        self._source = source

    def put(self, item: StreamItem) -> None:
        """See `Channel`."""
        self._lane.put(item)

    @contextmanager
    def watching(self, cancel: Callable[[], None]) -> Iterator[None]:
        """See `Channel`."""
        self._cancel = cancel
        try:
            with self._watch.watching(self._exchange, lambda: self._loop.call_soon_threadsafe(cancel)):
                yield
        finally:
            self._cancel = None

    def _send(self, items: list[StreamItem]) -> None:
        output = self._source.merge(items)
        is_last = isinstance(output.event, Finished)
        self._exchange.send(self._tensors(output), is_final=is_last)
        if is_last:
            self._loop.call_soon_threadsafe(self._source.on_sent_last)

    def _tensors(self, output: WorkerOutput) -> Tensors:
        token_ids, log_probs = np.array(output.token_ids, dtype="<i4"), np.array(output.log_probs, dtype="<f4")
        tensors: dict[str, npt.NDArray[Any]] = {"output_ids": token_ids, "output_log_probs": log_probs}
        event = b"" if output.event is None else encode_message(output.event)
        sealed = self._seal.seal(event, token_ids.tobytes(), log_probs.tobytes())
        if sealed:
            tensors["event"] = np.array([sealed], dtype=np.object_)
        return tensors

    def _note_failure(self, error: Exception) -> None:
        self._failure = InternalError(f"a response could not be sent: {type(error).__name__}: {error}")
        self._loop.call_soon_threadsafe(self._give_up)

    def _give_up(self) -> None:
        if self._cancel is not None:
            self._cancel()
        self._source.on_sent_last()


def read_command(inputs: Tensors, token: PeerToken | None = None, scope: tuple[str, ...] = ()) -> WorkerCommand:
    """The command of a request; with a token, all but a StatusCommand must prove that a peer gave it to `scope`.

    Raises:
        InvalidRequest: There is not exactly one.
        PeerRefused: It is not proven.
        ProtocolError: It is none; names the field.
    """
    raw = _document(inputs)
    if token is not None and len(raw) <= MAX_OPEN_BYTES and not raw.startswith(SEAL):
        command = decode_message(WORKER_COMMAND, raw, "command")
        if isinstance(command, StatusCommand):
            return command
    beside = b"" if "input_ids" not in inputs else inputs["input_ids"].tobytes()
    return decode_message(WORKER_COMMAND, unseal(token, WORKER_COMMAND_PROOF, scope, raw, beside), "command")


def answer_seal(inputs: Tensors, token: PeerToken | None, scope: tuple[str, ...]) -> AnswerSeal:
    """What proves the answers to the command that `read_command` found here."""
    return AnswerSeal(token, scope, _document(inputs))


def _document(inputs: Tensors) -> bytes:
    if "command" not in inputs or inputs["command"].size != 1:
        raise InvalidRequest("command: exactly one JSON document is required")
    return bytes(inputs["command"].reshape(-1)[0])


def read_prompt(inputs: Tensors) -> npt.NDArray[np.int32]:
    """The prompt beside a GenerateCommand, `[num_tokens] int32`.

    Raises:
        InvalidRequest: It is missing, or of another type or shape.
    """
    prompt = inputs.get("input_ids")
    if prompt is None or prompt.dtype != np.int32 or prompt.ndim != 1:
        raise InvalidRequest("input_ids: INT32 of shape [num_tokens] is required")
    return prompt
