"""A decode worker; everything is in kelp.worker."""

from kelp_triton.worker_model import DecodeModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
