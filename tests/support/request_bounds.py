"""What holds of every request that was accepted, whatever it came from."""

from __future__ import annotations

import numpy as np

from kelp.core.request import LlmRequest
from kelp.core.request_limits import RequestLimits


def assert_within(request: LlmRequest, limits: RequestLimits) -> None:
    prompts = [request.prompt.text, request.prompt.messages, request.prompt.input_ids is not None]
    assert sum(map(bool, prompts)) == 1
    for words in (request.stop_words, request.bad_words):
        assert len(words) <= limits.max_stop_words
        assert all(0 < len(word.encode()) <= limits.max_word_bytes for word in words)
    assert len(request.sampling.stop_token_ids) <= limits.max_stop_words + 1
    assert request.sampling.min_tokens <= request.sampling.max_tokens
    assert np.isfinite([request.sampling.temperature, request.sampling.top_p, request.sampling.min_p]).all()
