"""`kelp sim`: the real router, index, block pool and scheduler on a virtual clock, against workers with secrets.

The workers' true timings differ from what the router starts from, and it learns from outcomes only, as in life.
"""
