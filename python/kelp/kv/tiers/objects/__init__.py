"""KV in an S3-compatible object store through NIXL, in a process of its own: `tier.S3ObjectTier`.

Exports nothing: the process (`child`) loads this package too, and should not load the manager's side.
"""
