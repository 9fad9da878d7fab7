"""The `kv_block_manager` model."""

from __future__ import annotations

import numpy as np

from kelp.build.kv_manager import KvManagerAssembly
from kelp.core.errors import InvalidRequest
from kelp_triton.exchange import Exchange
from kelp_triton.model import KelpModel
from kelp_triton.server import parent_flags


class KvManagerModel(KelpModel):
    """Bridges `kelp.kv.manager` to Triton."""

    async def start(self) -> None:
        """See `KelpModel`."""
        grpc_port = self.config.server.grpc_port or parent_flags().grpc_port
        endpoint = f"{self.config.server.host}:{grpc_port}"
        self._assembly = KvManagerAssembly(self.config, endpoint, self.model_name, self.metrics)
        await self._assembly.start()

    async def handle(self, exchange: Exchange) -> None:
        """See `KelpModel`."""
        operations = exchange.inputs().get("operations")
        if operations is None or operations.size != 1:
            raise InvalidRequest("operations: exactly one batch is required")
        results = await self._assembly.handle(bytes(operations.reshape(-1)[0]))
        exchange.send({"results": np.array([results], dtype=np.object_)}, is_final=True)

    async def stop(self) -> None:
        """See `KelpModel`."""
        await self._assembly.stop()
