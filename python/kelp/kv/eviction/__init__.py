"""Which block leaves a full tier first: one small module per policy over one contract."""
