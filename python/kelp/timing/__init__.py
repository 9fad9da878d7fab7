"""What things cost in seconds: modelled for workers that only pretend (`model`), learned from those that work."""
