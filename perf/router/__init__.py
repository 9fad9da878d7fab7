"""The router: its index beside a peer's, and the whole request path end to end."""
