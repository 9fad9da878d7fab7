"""The KV block manager; everything is in kelp.kv.manager."""

from kelp_triton.kv_manager_model import KvManagerModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
