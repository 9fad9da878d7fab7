"""Ways to choose a worker: each one small module over one cost record (`router.decision.costs`)."""
