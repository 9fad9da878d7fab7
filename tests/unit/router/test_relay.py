"""From tokens to responses: text assembly, stop words across deltas, hidden tokens, coalescing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from router_rig import EOS, LetterDetokenizer, letters

from kelp.core.types import FinishReason
from kelp.router.relay import End, NewTokens, Relay, RelayItem, RelayOptions
from kelp.router.sequence_text import SequenceText
from kelp.text.stop_words import StopWords
from support.exchange import FakeExchange


class Sent:
    """A relay, what it sent and what it called."""

    def __init__(self, *stop_words: str, is_streaming: bool = True, has_log_probs: bool = False, prefix: str = ""):
        self.exchange = FakeExchange({})
        sequence = SequenceText(LetterDetokenizer(), StopWords(stop_words), frozenset({EOS}), prefix)
        self.relay = Relay(self.exchange, [sequence], RelayOptions(is_streaming, has_log_probs, num_input_tokens=4))
        self.calls: list[str] = []
        self.relay.summary = lambda num_tokens: {"num_output_tokens": np.array([num_tokens], dtype=np.uint32)}
        self.relay.on_first_token = lambda: self.calls.append("first token")
        self.relay.on_stop_word = lambda _: self.calls.append("stop word")
        self.relay.on_sent_last = lambda: self.calls.append("sent last")

    def flush(self, *items: RelayItem) -> None:
        self.relay.flush(list(items))

    @property
    def texts(self) -> list[str]:
        return [response["text_output"][0].decode() for response in self.exchange.responses]


def new(text: str) -> NewTokens:
    return NewTokens(tuple(letters(text)), tuple(-1.0 for _ in text))


def end(reason: FinishReason = FinishReason.LENGTH) -> End:
    return End(reason)


def test_each_flush_of_a_stream_is_one_response_with_the_text_that_is_certain() -> None:
    sent = Sent()
    sent.flush(new("ab"))
    sent.flush(new("c"), new("d"))
    sent.flush(end())
    assert sent.texts == ["a", "bc", "d"]
    assert [list(response["output_ids"]) for response in sent.exchange.responses] == [
        letters("ab"),
        letters("cd"),
        [],
    ]
    assert sent.relay.num_responses == 3


def test_tokens_and_the_end_share_the_last_response() -> None:
    sent = Sent()
    sent.flush(new("a"), new("b"), end(FinishReason.STOP))
    (response,) = sent.exchange.responses
    assert (sent.texts, sent.exchange.finish_reason) == (["ab"], "stop")
    assert list(response["num_output_tokens"]) == [2]
    assert sent.exchange.is_over


def test_the_finish_reason_is_empty_until_the_last_response() -> None:
    sent = Sent()
    sent.flush(new("a"))
    sent.flush(end())
    assert [response["finish_reason"][0] for response in sent.exchange.responses] == [b"", b"length"]


def test_without_streaming_everything_waits_for_the_end() -> None:
    sent = Sent(is_streaming=False)
    for letter in "abc":
        sent.flush(new(letter))
    assert sent.exchange.responses == []
    sent.flush(end())
    assert (sent.texts, sent.exchange.token_ids) == (["abc"], letters("abc"))


def test_keep_alives_make_no_response() -> None:
    sent = Sent()
    sent.flush(NewTokens((), ()))
    assert sent.exchange.responses == [] and sent.calls == []


def test_the_first_token_is_reported_once_and_after_it_was_sent() -> None:
    sent = Sent()
    sent.relay.on_first_token = lambda: sent.calls.append(f"first token after {len(sent.exchange.responses)}")
    for letter in "abc":
        sent.flush(new(letter))
    sent.flush(end())
    assert sent.calls == ["first token after 1", "sent last"]


def test_an_end_without_tokens_reports_no_first_token() -> None:
    sent = Sent()
    sent.flush(end(FinishReason.STOP))
    assert (sent.texts, sent.calls) == ([""], ["sent last"])


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("cuts", list(itertools.product([True, False], repeat=5)))
def test_a_stop_word_is_found_however_the_tokens_are_cut(cuts: tuple[bool, ...], is_streaming: bool) -> None:
    sent = Sent("cde", is_streaming=is_streaming)
    delta = ""
    for letter, is_cut in zip("abcdefg", (*cuts, False, False), strict=True):
        delta += letter
        if is_cut:
            sent.flush(new(delta))
            delta = ""
    sent.flush(new(delta), end())
    assert ("".join(sent.texts), sent.exchange.finish_reason) == ("ab", "stop")
    assert sent.calls.count("stop word") == 1
    assert "".join(sent.texts[:1]) in ("", "a", "ab"), "nothing is shown that a stop word may yet claim"


def test_tokens_after_a_stop_word_are_dropped() -> None:
    sent = Sent("b")
    sent.flush(new("abc"))
    sent.flush(new("d"))
    sent.flush(new("e"), end())
    assert sent.exchange.token_ids == letters("abc")
    assert list(sent.exchange.responses[-1]["num_output_tokens"]) == [3]


def test_a_stop_word_that_only_the_held_back_text_completes_is_found_at_the_end() -> None:
    sent = Sent("b")
    sent.flush(new("ab"), end())
    assert (sent.texts, sent.exchange.finish_reason) == (["a"], "stop")


def test_text_that_only_might_have_become_a_stop_word_is_shown_at_the_end() -> None:
    sent = Sent("bcx")
    sent.flush(new("abc"))
    sent.flush(end())
    assert ("".join(sent.texts), sent.exchange.finish_reason) == ("abc", "length")


def test_the_end_of_sequence_token_counts_but_is_no_text() -> None:
    sent = Sent()
    sent.flush(new("a"), NewTokens((EOS,), (-2.0,)), end(FinishReason.STOP))
    assert (sent.texts, sent.exchange.token_ids) == (["a"], [ord("a"), EOS])
    assert list(sent.exchange.responses[0]["num_output_tokens"]) == [2]


def test_log_probs_come_with_their_tokens_where_asked_for() -> None:
    sent = Sent(has_log_probs=True)
    sent.flush(NewTokens((97,), (-0.5,)))
    sent.flush(NewTokens((98,), (-1.5,)), end())
    assert [list(response["output_log_probs"]) for response in sent.exchange.responses] == [[-0.5], [-1.5]]


def test_log_probs_are_left_out_unless_asked_for() -> None:
    sent = Sent()
    sent.flush(new("a"), end())
    assert "output_log_probs" not in sent.exchange.responses[0]


@pytest.mark.parametrize("is_streaming", [True, False])
def test_the_prompt_comes_first_and_once_where_asked_for(is_streaming: bool) -> None:
    sent = Sent(is_streaming=is_streaming, prefix="prompt: ")
    sent.flush(new("ab"))
    sent.flush(new("c"), end())
    assert "".join(sent.texts) == "prompt: abc"
    assert sent.texts[0].startswith("prompt: ")


def test_a_stop_word_is_not_looked_for_in_the_prompt() -> None:
    sent = Sent("prompt", prefix="prompt: ")
    sent.flush(new("a"), end())
    assert (sent.texts, sent.exchange.finish_reason) == (["prompt: a"], "length")


def test_a_client_that_cannot_be_reached_does_not_leave_the_router_waiting() -> None:
    sent = Sent()

    def refuse(outputs: object, is_final: bool = False) -> None:
        raise RuntimeError("the server is going away")

    sent.exchange.send = refuse  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        sent.flush(new("a"), end())
    assert sent.calls == ["first token", "sent last"]
