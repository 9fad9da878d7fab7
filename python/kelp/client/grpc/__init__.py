"""Triton over gRPC: workers' and `llm`'s streams, control of a server. Only here is `tritonclient` imported."""

from kelp.client.grpc.control import TritonControl
from kelp.client.grpc.kv_manager import GrpcKvManagerClient
from kelp.client.grpc.llm import LlmClient, LlmError, LlmResponse
from kelp.client.grpc.workers import GrpcWorkerClient

__all__ = ["GrpcKvManagerClient", "GrpcWorkerClient", "LlmClient", "LlmError", "LlmResponse", "TritonControl"]
