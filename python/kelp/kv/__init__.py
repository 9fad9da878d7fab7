"""KV blocks of one worker: who holds them, what they contain, how they move between workers."""
