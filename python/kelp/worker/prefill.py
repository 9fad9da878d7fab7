"""The prefill side of a disaggregated request: compute chunk by chunk, announce, keep the KV under a lease."""

from __future__ import annotations

from kelp.core.errors import InternalError, KelpError, ProtocolError, RequestCancelled
from kelp.core.messages import Finished, GenerateCommand, Rendezvous
from kelp.executor.base import Completed, Executor, ExecutorRequest, Prefilled
from kelp.kv.handoff import HandoffServer, Offer
from kelp.worker.stream import RequestStream, is_over


async def run_prefill(
    executor: Executor,
    handoffs: HandoffServer,
    command: GenerateCommand,
    request: ExecutorRequest,
    stream: RequestStream,
) -> Finished:
    """Prefill one prompt and offer its KV to the decode worker that knows the rendezvous.

    The offer outlives this call: its lease ends when the reader acknowledges or goes silent.

    Returns:
        The last message to the router; its `rendezvous` is the ticket, None when the sequence ended here.

    Raises:
        KelpError: The request failed; reader and blocks have been told.
    """
    rendezvous = command.rendezvous
    if rendezvous is None:
        raise ProtocolError("command.rendezvous: required for role prefill")
    request_id = request.request_id
    offer = handoffs.offer(rendezvous.handoff_id, lambda: executor.release_export(request_id))
    try:
        executor.submit(request)
        completed = await _announce_all(offer, stream)
    except KelpError as error:
        offer.fail(error)
        raise
    except BaseException:
        executor.abort(request_id)
        offer.fail(RequestCancelled("the prefill was cancelled"))
        raise
    return _last_message(stream, completed, rendezvous)


async def _announce_all(offer: Offer, stream: RequestStream) -> Completed:
    async for event in stream.events():
        if isinstance(event, Prefilled):
            offer.announce(event.num_tokens, event.block_ids)
        elif isinstance(event, Completed):
            if is_over(event):
                offer.fail(RequestCancelled("the sequence ended with its first token"))
            elif stream.first is None:
                raise InternalError("the executor completed a prefill without a first token")
            else:
                offer.finish(stream.first.token_ids[0], stream.first.log_probs[0])
            return event
    raise InternalError("the executor's events ended without Completed")


def _last_message(stream: RequestStream, completed: Completed, rendezvous: Rendezvous) -> Finished:
    finished = stream.completed(completed)
    if is_over(completed):
        return finished
    return finished.model_copy(update={"rendezvous": rendezvous})
