"""The worker models: `prefill`, `decode` and the further ones, `prefill_1`, `decode_1` and so on."""

from __future__ import annotations

import asyncio
import uuid
from typing import ClassVar

from kelp.build.worker import build_worker
from kelp.core.types import Role
from kelp.worker.parts import WorkerIdentity
from kelp_triton.exchange import Exchange
from kelp_triton.model import KelpModel
from kelp_triton.server import parent_flags


class WorkerModel(KelpModel):
    """Bridges `kelp.worker` to Triton."""

    role: ClassVar[Role]

    async def start(self) -> None:
        """See `KelpModel`."""
        grpc_port = self.config.server.grpc_port or parent_flags().grpc_port
        identity = WorkerIdentity(
            model_name=self.model_name,
            role=self.role,
            endpoint=f"{self.config.server.host}:{grpc_port}",
            epoch=uuid.uuid4().hex,
        )
        self._service = await asyncio.to_thread(build_worker, identity, self.config, self.metrics)
        await self._service.start()

    async def handle(self, exchange: Exchange) -> None:
        """See `KelpModel`."""
        await self._service.handle(exchange)

    async def stop(self) -> None:
        """See `KelpModel`."""
        await self._service.stop()


class PrefillModel(WorkerModel):
    """Computes prompts for decode workers."""

    role = Role.PREFILL


class DecodeModel(WorkerModel):
    """Continues prefilled prompts, or serves whole requests."""

    role = Role.DECODE
