"""How each model family's config.json is read: one module per family, with transformers' defaults."""
