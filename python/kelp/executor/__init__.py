"""Engines that run the model, behind the one contract of `executor.base`."""
