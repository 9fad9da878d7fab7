"""A prefill worker; everything is in kelp.worker."""

from kelp_triton.worker_model import PrefillModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
