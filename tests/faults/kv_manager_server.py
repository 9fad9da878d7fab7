"""A KV block manager in a process of its own, behind the one RPC of Triton that its clients use; no Triton.

Arguments: port, then `key=value` settings. Prints READY and what the manager logs; stops on SIGTERM.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import struct
import sys
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kelp.build.kv_manager import KvManagerAssembly
from kelp.core.config import load_config
from kelp.core.metrics import Metrics

_LENGTH = struct.Struct("<I")


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, assembly: KvManagerAssembly) -> None:
        self._assembly = assembly

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = await self._assembly.handle(request.raw_input_contents[0][_LENGTH.size :])
        return service_pb2.ModelInferResponse(raw_output_contents=[_LENGTH.pack(len(answer)) + answer])


async def serve(port: int, settings: dict[str, str]) -> None:
    assembly = KvManagerAssembly(load_config(settings), f"127.0.0.1:{port}", "kv_block_manager", Metrics())
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(assembly), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await assembly.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print("READY", flush=True)
    await stopping.wait()
    await server.stop(0.5)
    await assembly.stop()


if __name__ == "__main__":
    os.environ.setdefault("UCX_MODULES", "^efa")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    asyncio.run(serve(int(sys.argv[1]), dict(argument.split("=", 1) for argument in sys.argv[2:])))
