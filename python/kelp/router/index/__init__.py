"""Which worker holds which blocks, as far as their events tell (`base` is the contract)."""
