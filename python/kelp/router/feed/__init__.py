"""KV events of all workers into the index: `subscriber` runs it, `subscription` decides what to believe and ask for."""
