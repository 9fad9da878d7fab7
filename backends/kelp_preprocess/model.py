"""The `preprocess` model; everything is in kelp.text.preprocess."""

from kelp_triton.preprocess_model import PreprocessModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
