"""The stop-word matcher agrees with a search over the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kelp.text.stop_words import StopWords

LETTERS = st.sampled_from("abc👩\u200d")
WORDS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=5)
DELTAS = st.lists(st.text(LETTERS, max_size=6), max_size=12)


def _naive(words, text):
    """Text before the word that is complete first; of several complete there, the longest."""
    ends = [(text.find(word) + len(word), -len(word)) for word in words if word in text]
    if not ends:
        return text, False
    end, negative_length = min(ends)
    return text[: end + negative_length], True


@given(WORDS, DELTAS)
def test_the_matcher_agrees_with_a_search_over_the_whole_text(words, deltas):
    matcher = StopWords(words)
    results = [matcher.push(delta) for delta in deltas]
    shown = "".join(result.text for result in results) + matcher.flush()
    is_hit = bool(results) and results[-1].is_hit
    assert (shown, is_hit) == _naive(words, "".join(deltas))


@given(WORDS, DELTAS)
def test_no_more_is_held_back_than_could_become_a_stop_word(words, deltas):
    matcher = StopWords(words)
    text, num_shown = "", 0
    for delta in deltas:
        text += delta
        result = matcher.push(delta)
        if result.is_hit:
            return
        num_shown += len(result.text)
        held = text[num_shown:]
        endings = [text[start:] for start in range(len(text))]
        candidates = [ending for ending in endings if any(word.startswith(ending) for word in words)]
        assert held == (candidates[0] if candidates else "")


@given(WORDS, DELTAS)
def test_a_hit_is_reported_with_the_delta_that_completes_the_word(words, deltas):
    matcher = StopWords(words)
    text = ""
    for delta in deltas:
        text += delta
        assert matcher.push(delta).is_hit == any(word in text for word in words)
