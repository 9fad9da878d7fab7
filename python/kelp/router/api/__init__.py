"""`kelp router`: the decision alone, over HTTP and gRPC, for stacks that bring their own workers.

Path in: `messages` says what is asked and answered, `operations` does it, `http` and `grpc` carry it, `server` is the
process. Transports know no routing, operations no transport.
"""
