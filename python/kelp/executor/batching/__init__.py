"""Continuous batching over a paged KV pool, whatever computes the steps: the torch engine, or the mock's timing model.

Path in: `executor.py` owns thread and inbox, `engine.py` steps, `scheduler.py` decides, `batch.py` is the seam behind
which a `ModelRunner` computes. Imports no engine and no torch.
"""
