"""The `preprocess` model, and the router's own use of it."""

from __future__ import annotations

from kelp.core.config import KelpConfig
from kelp.text.preprocess import PreprocessLimits, Preprocessor


def build_preprocessor(config: KelpConfig) -> Preprocessor:
    """What the `preprocess` model runs."""
    limits = PreprocessLimits(max_model_tokens=config.executor.max_model_tokens)
    return Preprocessor(config.model.path, limits, config.model.lora_adapters)
