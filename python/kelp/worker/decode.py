"""The decode side of a disaggregated request: reserve, fetch the prompt's KV, go on from the first token."""

from __future__ import annotations

import asyncio

from kelp.core.errors import InternalError, ProtocolError
from kelp.core.messages import Finished, GenerateCommand
from kelp.executor.base import Completed, Executor, ExecutorRequest, Reserved
from kelp.kv.handoff import FetchPlan, FetchResult, HandoffReader, QuarantinedTransferError
from kelp.worker.stream import RequestStream


class DecodeRun:
    """One request on the decode side.

    Reserved blocks go back only when no READ can write into them any more, whatever ends the request.

    Args:
        quarantined: Keeps the tasks that wait for that beyond the end of a request.
    """

    def __init__(
        self,
        executor: Executor,
        reader: HandoffReader,
        command: GenerateCommand,
        quarantined: set[asyncio.Task[None]],
    ) -> None:
        if command.rendezvous is None:
            raise ProtocolError("command.rendezvous: required for role decode")
        self._executor = executor
        self._reader = reader
        self._quarantined = quarantined
        self._rendezvous = command.rendezvous
        self._fetch: asyncio.Task[FetchResult] | None = None
        self._is_imported = False

    async def run(self, request: ExecutorRequest, stream: RequestStream) -> Finished:
        """Run to the end and return the last message to the router.

        Raises:
            KelpError: The KV did not come, or the executor failed the request.
        """
        self._executor.submit(request)
        try:
            return stream.completed(await self._follow(request, stream))
        except BaseException:
            self._executor.abort(request.request_id)
            raise
        finally:
            await self._let_go(request.request_id)

    async def _follow(self, request: ExecutorRequest, stream: RequestStream) -> Completed:
        async for event in stream.events():
            if isinstance(event, Reserved):
                await self._import(request, stream, event)
            elif isinstance(event, Completed):
                return event
        raise InternalError("the executor's events ended without Completed")

    async def _import(self, request: ExecutorRequest, stream: RequestStream, reserved: Reserved) -> None:
        plan = FetchPlan(
            block_ids=reserved.block_ids,
            num_cached_blocks=reserved.num_cached_blocks,
            num_prompt_tokens=len(request.prompt),
            deadline_s=request.deadline_s,
        )
        self._fetch = asyncio.ensure_future(self._reader.fetch(self._rendezvous, plan))
        fetched = await asyncio.shield(self._fetch)
        stream.note_time(transfer_start_ns=fetched.transfer_start_ns, transfer_done_ns=fetched.transfer_done_ns)
        stream.note_usage(transferred_blocks=fetched.num_transferred_blocks)
        self._is_imported = True
        self._executor.complete_import(
            request.request_id, fetched.first_token, fetched.first_log_prob, fetched.num_transferred_blocks
        )

    async def _let_go(self, request_id: str) -> None:
        if self._is_imported:
            return
        if self._fetch is None:
            # The executor may have reserved blocks already: the cancellation can be faster than its event.
            self._executor.end_import(request_id)
            return
        self._fetch.cancel()
        # A task of its own, because this one may be cancelled once more while the READs are being stopped.
        returning = asyncio.ensure_future(self._return_blocks(self._fetch, request_id))
        self._quarantined.add(returning)
        returning.add_done_callback(self._quarantined.discard)
        await asyncio.wait({self._fetch})

    async def _return_blocks(self, fetch: asyncio.Task[FetchResult], request_id: str) -> None:
        await asyncio.wait({fetch})
        error = None if fetch.cancelled() else fetch.exception()
        if isinstance(error, QuarantinedTransferError):
            await error.quarantine_released()
        self._executor.end_import(request_id)
