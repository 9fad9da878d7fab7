"""The embedded engine: continuous batching over a paged KV pool, in plain torch.

Path in: `load.py` assembles, `executor.py` owns thread and inbox, `engine.py` steps, `scheduler.py` decides,
`runner.py` computes (`model.py`, `attention.py`, `sampler.py`). Importing this package does not import torch.
"""
