"""A worker's own socket for routers, beside Triton's gRPC (docs/decisions/0010)."""

from kelp.worker.direct.server import DirectServer

__all__ = ["DirectServer"]
