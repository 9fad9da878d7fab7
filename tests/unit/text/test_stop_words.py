"""A stop word is found wherever deltas split it, and nothing of it is shown."""

from __future__ import annotations

import pytest

from kelp.text.stop_words import StopWords


def _run(words, deltas):
    matcher = StopWords(words)
    results = [matcher.push(delta) for delta in deltas]
    return [result.text for result in results], results[-1].is_hit, matcher.flush()


@pytest.mark.parametrize(
    ("words", "deltas", "texts", "is_hit", "held"),
    [
        ([], ["a", "b"], ["a", "b"], False, ""),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], True, ""),
        (["STOP"], ["xS", "TO", "P!"], ["x", "", ""], True, ""),
        (["STOP"], ["xS", "TA"], ["x", "STA"], False, ""),
        (["STOP"], ["xSTO"], ["x"], False, "STO"),
        (["STOP"], ["STSTOP"], ["ST"], True, ""),
        (["abab", "c"], ["aba", "bab"], ["", ""], True, ""),
        (["abcd", "bc"], ["abcd"], ["a"], True, ""),
        (["abcd", "bc"], ["ab", "cd"], ["", "a"], True, ""),
        (["bcd", "abcd"], ["xabcd"], ["x"], True, ""),
        (["aaab"], ["aaaaaab"], ["aaa"], True, ""),
        (["👩‍👩"], ["a👩", "\u200d", "👩!"], ["a", "", ""], True, ""),
    ],
)
def test_text_before_the_first_complete_stop_word_is_shown(words, deltas, texts, is_hit, held):
    assert _run(words, deltas) == (texts, is_hit, held)


def test_text_after_a_hit_is_swallowed():
    matcher = StopWords(["x"])
    assert matcher.push("axb") == ("a", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_flushing_shows_what_was_held_back_once():
    matcher = StopWords(["STOP"])
    matcher.push("ST")
    assert (matcher.flush(), matcher.flush()) == ("ST", "")
