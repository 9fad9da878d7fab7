"""One protocol to talk to workers, on this server or another."""
