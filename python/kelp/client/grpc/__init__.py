"""Triton over gRPC: workers' streams and the control of a server. Only here is `tritonclient` imported."""

from kelp.client.grpc.control import TritonControl
from kelp.client.grpc.kv_manager import GrpcKvManagerClient
from kelp.client.grpc.workers import GrpcWorkerClient

__all__ = ["GrpcKvManagerClient", "GrpcWorkerClient", "TritonControl"]
