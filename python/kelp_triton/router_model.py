"""The `llm` model."""

from __future__ import annotations

import asyncio
import logging

from kelp.build.preprocess import build_preprocessor
from kelp.build.router import RouterAssembly
from kelp.core.config import KelpConfig
from kelp.core.one_cpu import settle_on_one_cpu
from kelp.core.preprocess_messages import (
    PreparedPrompt,
    PreprocessOptions,
    decode_prepared,
    encode_preprocess_request,
    options_for,
)
from kelp.core.request import LlmRequest, Prompt
from kelp.core.schema import PREPROCESS
from kelp_triton.bls import BlsClient
from kelp_triton.exchange import Exchange
from kelp_triton.model import KelpModel
from kelp_triton.server import parent_flags

_log = logging.getLogger(__name__)
_CHARS_PER_TOKEN = 4


class SizedPreprocess:
    """Prepares short prompts in this process and asks the `preprocess` model of the same server for all others.

    A call to another model costs more than tokenising a page of text (docs/decisions/0008); a long prompt, or a guide
    to be compiled, would hold up every stream of the router.
    """

    def __init__(self, config: KelpConfig) -> None:
        self._block_size = config.executor.block_size
        self._max_chars = config.router.inline_prompt_chars
        self._preprocessor = build_preprocessor(config)
        self._bls = BlsClient(PREPROCESS.name, tuple(spec.name for spec in PREPROCESS.outputs))

    async def prepare(self, request: LlmRequest) -> PreparedPrompt:
        """See `router.service.Preprocess`."""
        options = options_for(request, self._block_size)
        if self._is_quick(request.prompt, options):
            return self._preprocessor.prepare(request.prompt, options)
        return decode_prepared(await self._bls.call(encode_preprocess_request(request.prompt, options)))

    def _is_quick(self, prompt: Prompt, options: PreprocessOptions) -> bool:
        num_chars = len(prompt.text) + len(prompt.messages)
        if prompt.input_ids is not None:
            num_chars += _CHARS_PER_TOKEN * len(prompt.input_ids)
        return options.guide is None and num_chars <= self._max_chars


class RouterModel(KelpModel):
    """Bridges `kelp.router` to Triton."""

    async def start(self) -> None:
        """See `KelpModel`."""
        flags = parent_flags()
        if not flags.is_explicit:
            _log.warning(
                "tritonserver runs without --model-control-mode=explicit: workers cannot be added or recovered"
            )
        if self.config.router.one_cpu:
            number = self.instance_name.rpartition("_")[2]
            settle_on_one_cpu(int(number) if number.isdecimal() else 0)
        preprocess = await asyncio.to_thread(SizedPreprocess, self.config)
        server = self.config.server
        router_id = f"{server.host}:{server.grpc_port or flags.grpc_port}/{self.instance_name}"
        self._router = RouterAssembly(self.config, router_id, preprocess, self.metrics)
        await self._router.start()

    async def handle(self, exchange: Exchange) -> None:
        """See `KelpModel`."""
        await self._router.service.handle(exchange)

    async def stop(self) -> None:
        """See `KelpModel`."""
        await self._router.stop()
