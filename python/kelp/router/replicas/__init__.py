"""Several routers of the same workers: what each has under way (`loads`), told to the others over ZMQ (`link`)."""
