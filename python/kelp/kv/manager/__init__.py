"""The KV block manager: which blocks a host keeps, in which tier, for whom and for how long."""
