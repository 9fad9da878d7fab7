"""The embedded engine: continuous batching over a paged KV pool, in torch and a few own kernels.

Path in: `load.py` assembles, `executor.py` owns thread and inbox, `engine.py` steps, `scheduler.py` decides,
`runner.py` computes (`decoder.py`, `attention/`, `sampler.py`). Importing this package does not import torch.
"""
