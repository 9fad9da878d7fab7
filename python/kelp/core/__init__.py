"""Types, errors, configuration and wire messages that every other package may use."""
