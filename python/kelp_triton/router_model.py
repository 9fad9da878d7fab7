"""The `llm` model."""

from __future__ import annotations

import logging

from kelp.build import RouterAssembly
from kelp.core.preprocess_messages import (
    PreparedPrompt,
    decode_prepared,
    encode_preprocess_request,
    options_for,
)
from kelp.core.request import LlmRequest
from kelp.core.schema import PREPROCESS
from kelp_triton.bls import BlsClient
from kelp_triton.exchange import Exchange
from kelp_triton.model import KelpModel
from kelp_triton.server import parent_flags

_log = logging.getLogger(__name__)


class BlsPreprocess:
    """Asks the `preprocess` model of the same server."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._bls = BlsClient(PREPROCESS.name, tuple(spec.name for spec in PREPROCESS.outputs))

    async def prepare(self, request: LlmRequest) -> PreparedPrompt:
        """See `router.service.Preprocess`."""
        options = options_for(request, self._block_size)
        return decode_prepared(await self._bls.call(encode_preprocess_request(request.prompt, options)))


class RouterModel(KelpModel):
    """Bridges `kelp.router` to Triton."""

    async def start(self) -> None:
        """See `KelpModel`."""
        if not parent_flags().is_explicit:
            _log.warning(
                "tritonserver runs without --model-control-mode=explicit: workers cannot be added or recovered"
            )
        self._router = RouterAssembly(self.config, BlsPreprocess(self.config.executor.block_size), self.metrics)
        await self._router.start()

    async def handle(self, exchange: Exchange) -> None:
        """See `KelpModel`."""
        await self._router.service.handle(exchange)

    async def stop(self) -> None:
        """See `KelpModel`."""
        await self._router.stop()
