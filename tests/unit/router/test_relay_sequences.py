"""Several sequences of one request in its responses: streamed one by one, or whole in one response."""

from __future__ import annotations

import numpy as np
import pytest
from router_rig import EOS, LetterDetokenizer, letters

from kelp.core.types import FinishReason
from kelp.router.relay import End, NewTokens, Relay, RelayItem, RelayOptions
from kelp.router.sequence_text import SequenceText
from kelp.text.stop_words import StopWords
from support.exchange import FakeExchange


class Sequences:
    """A relay of some sequences behind a prompt of 4 tokens, what it sent and what it called."""

    def __init__(self, count: int, *stop_words: str, is_streaming: bool = True, prefix: str = "") -> None:
        self.exchange = FakeExchange({})
        texts = [
            SequenceText(LetterDetokenizer(), StopWords(stop_words), frozenset({EOS}), prefix) for _ in range(count)
        ]
        self.relay = Relay(self.exchange, texts, RelayOptions(is_streaming, has_log_probs=True, num_input_tokens=4))
        self.calls: list[str] = []
        self.relay.summary = lambda num_tokens: {"num_output_tokens": np.array([num_tokens], dtype=np.uint32)}
        self.relay.on_first_token = lambda: self.calls.append("first token")
        self.relay.on_stop_word = lambda index: self.calls.append(f"stop word in {index}")
        self.relay.on_sent_last = lambda: self.calls.append("sent last")

    def flush(self, *items: RelayItem) -> None:
        self.relay.flush(list(items))

    def seen(self, name: str) -> list[list[object]]:
        """One tensor of every response, empty where a response lacks it."""
        return [list(response[name]) if name in response else [] for response in self.exchange.responses]

    def text_of(self, index: int) -> str:
        """All deltas of one streamed sequence."""
        return b"".join(
            response["text_output"][0] for response in self.exchange.responses if response["sequence_index"][0] == index
        ).decode()


def new(index: int, text: str) -> NewTokens:
    return NewTokens(tuple(letters(text)), tuple(-float(token) for token in letters(text)), index)


def end(index: int, reason: FinishReason = FinishReason.LENGTH) -> End:
    return End(reason, index)


def test_a_streamed_response_is_of_one_sequence_and_says_of_which() -> None:
    sent = Sequences(2)
    sent.flush(new(0, "ab"), new(1, "xy"), new(0, "c"))
    sent.flush(new(1, "z"))
    sent.flush(end(1), end(0))
    assert sent.seen("sequence_index") == [[0], [1], [1], [0], [1]]
    assert (sent.text_of(0), sent.text_of(1)) == ("abc", "xyz")
    assert sent.seen("output_ids") == [letters("abc"), letters("xy"), letters("z"), [], []]


def test_each_streamed_sequence_ends_with_its_reason_and_length_and_the_last_one_sums_up() -> None:
    sent = Sequences(3)
    sent.flush(new(0, "a"), new(1, "x"), new(2, "klm"))
    sent.flush(end(1, FinishReason.STOP))
    sent.flush(new(0, "b"), end(0))
    assert not sent.exchange.is_over and sent.calls == ["first token"]
    sent.flush(end(2))
    assert sent.seen("finish_reason") == [[b""], [b""], [b""], [b"stop"], [b"length"], [b"length"]]
    assert sent.seen("sequence_length") == [[], [], [], [5], [6], [7]]
    assert sent.seen("num_output_tokens") == [[], [], [], [], [], [6]]
    assert sent.exchange.is_over and sent.calls == ["first token", "sent last"]


def test_sequences_that_end_in_one_flush_have_one_final_response_and_it_comes_last() -> None:
    sent = Sequences(3)
    sent.flush(new(2, "c"), end(2), new(0, "a"), end(0), end(1))
    assert sent.seen("sequence_index") == [[0], [1], [2]]
    assert sent.seen("num_output_tokens") == [[], [], [2]]
    assert sent.exchange.num_final == 1


def test_a_sequence_that_has_ended_is_silent_while_others_go_on() -> None:
    sent = Sequences(2)
    sent.flush(new(0, "a"), end(0))
    sent.flush(new(1, "b"))
    sent.flush(new(1, "c"), end(1))
    assert sent.seen("sequence_index") == [[0], [1], [1]]


def test_without_streaming_one_response_has_all_sequences_in_order() -> None:
    sent = Sequences(3, is_streaming=False)
    sent.flush(new(2, "k"), new(0, "ab"), end(2, FinishReason.STOP))
    sent.flush(new(1, "xyz"), end(1), new(0, "c"))
    assert sent.exchange.responses == []
    sent.flush(new(0, "d"), end(0))
    (response,) = sent.exchange.responses
    assert list(response["text_output"]) == [b"abcd", b"xyz", b"k"]
    assert list(response["finish_reason"]) == [b"length", b"length", b"stop"]
    assert list(response["sequence_index"]) == [0, 1, 2]
    assert list(response["num_output_tokens"]) == [8]
    assert sent.exchange.is_over


def test_the_lengths_tell_where_the_tokens_of_each_sequence_end() -> None:
    sent = Sequences(3, is_streaming=False)
    sent.flush(new(1, "xyz"), new(0, "a"), end(0), end(1), end(2))
    (response,) = sent.exchange.responses
    ends = np.cumsum(response["sequence_length"] - 4)
    for name, sign in (("output_ids", 1), ("output_log_probs", -1)):
        parts = np.split(response[name], ends[:-1])
        assert [list(part) for part in parts] == [[sign * ord("a")], [sign * token for token in letters("xyz")], []]


@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_stop_word_ends_the_sequence_that_said_it(is_streaming: bool) -> None:
    sent = Sequences(2, "b", is_streaming=is_streaming)
    sent.flush(new(1, "abc"), new(0, "ac"))
    assert sent.calls.count("stop word in 1") == 1
    sent.flush(new(1, "d"), end(1))
    sent.flush(new(0, "d"), end(0))
    assert [call for call in sent.calls if call.startswith("stop")] == ["stop word in 1"]
    if is_streaming:
        assert (sent.text_of(0), sent.text_of(1)) == ("acd", "a")
    else:
        assert sent.seen("text_output") == [[b"acd", b"a"]]
        assert sent.seen("finish_reason") == [[b"length", b"stop"]]


def test_every_sequence_begins_with_the_prompt_where_asked_for() -> None:
    sent = Sequences(2, is_streaming=False, prefix="prompt: ")
    sent.flush(new(0, "a"), new(1, "b"), end(0), end(1))
    assert sent.seen("text_output") == [[b"prompt: a", b"prompt: b"]]
