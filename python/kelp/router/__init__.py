"""The `llm` model: chooses workers, relays tokens, and answers for every request until it has ended."""
