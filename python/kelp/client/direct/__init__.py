"""Workers over a socket of their own: what crosses it, and the router's end of it (docs/decisions/0010)."""
