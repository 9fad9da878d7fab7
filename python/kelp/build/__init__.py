"""Puts parts together from configuration; the only package that knows which implementation stands behind a contract.

One module per process that there is: `preprocess`, `worker`, `router` and `standalone` (`kelp router`). Each imports
what its process needs and no more, because workers are started by the dozen.
"""
