"""The `llm` model; everything is in kelp.router."""

from kelp_triton.router_model import RouterModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
