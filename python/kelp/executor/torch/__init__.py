"""The embedded engine: a `ModelRunner` for `executor.batching` in torch and a few own kernels.

Path in: `load.py` assembles, `runner.py` computes (`decoder.py`, `attention/`, `sampler.py`). Importing this package
does not import torch.
"""
