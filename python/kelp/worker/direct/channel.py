"""One request on a direct connection, as the request sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kelp.client.direct.wire import Output
from kelp.core.errors import KelpError
from kelp.core.messages import Finished, WorkerStatus
from kelp.core.wire import encode_message
from kelp.executor.base import Tokens
from kelp.worker.channel import Source, StreamItem

ChannelItem = StreamItem | WorkerStatus | KelpError
"""What a request, or a control command, may have to say."""


class DirectChannel:
    """See `worker.channel.Channel`; everything but `put` belongs to the loop.

    Args:
        number: The request's on its connection.
        post: Takes what is to be sent to the connection; thread-safe.

    Attributes:
        is_over: Its last output has been made; nothing is sent any more.
        has_said_tokens: The connection has been given some.
    """

    def __init__(self, number: int, post: Callable[[DirectChannel, ChannelItem], None]) -> None:
        self.number = number
        self.is_over = self.has_said_tokens = False
        self._post = post
        self._source: Source | None = None
        self._cancel: Callable[[], None] | None = None
        self._failure: KelpError | None = None

    @property
    def failure(self) -> KelpError | None:
        """See `Channel`."""
        return self._failure

    def open(self, source: Source) -> None:
        """See `Channel`."""
        self._source = source

    def put(self, item: ChannelItem) -> None:
        """See `Channel`."""
        self._post(self, item)

    @contextmanager
    def watching(self, cancel: Callable[[], None]) -> Iterator[None]:
        """See `Channel`."""
        self._cancel = cancel
        try:
            if self._failure is not None:
                cancel()
            yield
        finally:
            self._cancel = None

    def cancel(self, reason: KelpError) -> None:
        """The router wants the request to end; how it ended is still to be said."""
        self._failure = self._failure or reason
        if self._cancel is not None:
            self._cancel()

    def break_off(self, reason: KelpError) -> None:
        """Nothing can be said any more."""
        self.is_over = True
        self.cancel(reason)
        self.note_sent_last()

    def output(self, items: list[ChannelItem]) -> Output:
        """What the request has to say, of all that it has posted since the last time."""
        spoken: list[StreamItem] = []
        for item in items:
            if isinstance(item, Tokens | Finished):
                spoken.append(item)
            else:
                self.is_over = True
                return self._last(item, spoken)
        assert self._source is not None, "only a request speaks"
        said = self._source.merge(spoken)
        self.is_over = isinstance(said.event, Finished)
        event = b"" if said.event is None else encode_message(said.event)
        return Output(self.number, said.token_ids, said.log_probs, event, "", self.is_over)

    def failed(self, error: KelpError) -> Output:
        """Its last output, when what it has to say cannot be said; ends the request."""
        self.is_over = True
        self.cancel(error)
        return Output(self.number, (), (), b"", str(error), True)

    def note_sent_last(self) -> None:
        """The last output has been handed to the connection, or never will be."""
        if self._source is not None:
            self._source.on_sent_last()

    def _last(self, item: WorkerStatus | KelpError, spoken: list[StreamItem]) -> Output:
        if isinstance(item, WorkerStatus):
            return Output(self.number, (), (), encode_message(item), "", True)
        if self._source is None or not spoken:
            return Output(self.number, (), (), b"", str(item), True)
        said = self._source.merge(spoken)
        event = b"" if said.event is None or isinstance(said.event, Finished) else encode_message(said.event)
        return Output(self.number, said.token_ids, said.log_probs, event, str(item), True)
