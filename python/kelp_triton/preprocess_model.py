"""The `preprocess` model."""

from __future__ import annotations

import asyncio

from kelp.build.preprocess import build_preprocessor
from kelp.core.exchange import Tensors
from kelp.core.preprocess_messages import decode_preprocess_request, encode_prepared
from kelp_triton.exchange import Exchange
from kelp_triton.model import KelpModel


class PreprocessModel(KelpModel):
    """Bridges `kelp.text.preprocess` to Triton."""

    async def start(self) -> None:
        """See `KelpModel`."""
        self._preprocessor = await asyncio.to_thread(build_preprocessor, self.config)

    async def handle(self, exchange: Exchange) -> None:
        """See `KelpModel`."""
        outputs = await asyncio.to_thread(self._prepare, exchange.inputs())
        exchange.send(outputs, is_final=True)

    def _prepare(self, inputs: Tensors) -> Tensors:
        prompt, options = decode_preprocess_request(inputs)
        return encode_prepared(self._preprocessor.prepare(prompt, options))
