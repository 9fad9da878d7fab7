"""What the mock says is a pure function of what came before, however the sequence is cut."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kelp.core.messages import SamplingParams
from kelp.executor.mock.language import EMPTY, Vocabulary, next_state, next_states

VOCABULARY = Vocabulary(100, (0, 7, 99))
TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40)


def states_of(tokens: list[int]) -> list[int]:
    return next_states(EMPTY, np.array(tokens, np.int32), 0).tolist()


@given(TOKENS, st.integers(0, 40))
def test_states_are_the_same_one_by_one_in_pieces_and_at_once(tokens: list[int], cut: int) -> None:
    whole = states_of(tokens)
    state, one_by_one = EMPTY, []
    for position, token_id in enumerate(tokens):
        state = next_state(state, token_id, position)
        one_by_one.append(state)
    assert one_by_one == whole
    head, tail = tokens[:cut], tokens[cut:]
    if head and tail:
        rest = next_states(whole[len(head) - 1], np.array(tail, np.int32), len(head)).tolist()
        assert whole[: len(head)] + rest == whole


@given(TOKENS, st.sampled_from([0.0, 1.0]), st.integers(0, 2**32))
def test_the_tokens_after_many_states_are_those_after_each_of_them(
    tokens: list[int], temperature: float, seed: int
) -> None:
    sampling = SamplingParams(temperature=temperature, seed=seed)
    states = next_states(EMPTY, np.array(tokens, np.int32), 0)
    one_by_one = [VOCABULARY.token_after(state, sampling) for state in states.tolist()]
    assert VOCABULARY.tokens_after(states, sampling) == one_by_one
    said = VOCABULARY.continuation(tokens, 3, sampling)
    assert said == [
        VOCABULARY.token_after(states_of([*tokens, *said[:index]])[-1], sampling) for index in range(len(said))
    ]


@given(st.lists(st.integers(0, 150_000), min_size=2, max_size=40), st.data())
def test_a_state_tells_another_token_and_another_order_apart(tokens: list[int], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:index], tokens[index] + 1, *tokens[index + 1 :]]
    assert states_of(changed)[-1] != states_of(tokens)[-1]
    swapped = [tokens[-1], *tokens[1:-1], tokens[0]]
    assert (states_of(swapped)[-1] == states_of(tokens)[-1]) == (tokens[0] == tokens[-1])


def test_a_continuation_goes_on_as_if_its_beginning_had_been_given() -> None:
    whole = VOCABULARY.continuation([5, 6], 30)
    for cut in range(1, 30):
        assert VOCABULARY.continuation([5, 6, *whole[:cut]], 30 - cut) == whole[cut:]


def test_every_token_but_the_silent_ones_is_said() -> None:
    said = set(VOCABULARY.continuation([1], 3000))
    assert said == set(range(100)) - {0, 7, 99}


def test_the_seed_counts_where_the_temperature_is_not_0() -> None:
    greedy = VOCABULARY.continuation([1, 2], 20)
    assert VOCABULARY.continuation([1, 2], 20, SamplingParams(seed=3)) == greedy
    one, other = (VOCABULARY.continuation([1, 2], 20, SamplingParams(temperature=1.0, seed=seed)) for seed in (3, 4))
    assert one != other
    assert greedy not in (one, other)
