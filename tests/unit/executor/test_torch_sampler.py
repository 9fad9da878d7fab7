import math
from collections import Counter

import numpy as np
import pytest
import torch

from kelp.core.messages import SamplingParams
from kelp.executor.batching.batch import SamplePoint
from kelp.executor.torch.noise import exponential_noise, noise_key
from kelp.executor.torch.sampler import sample

VOCAB_SIZE = 8
KNOWN_NOISE = [0.7029513361191123, 0.25971148324052745, 0.7967333039869232]


def point(prompt=(0,), output=(), stop=(), **params) -> SamplePoint:
    return SamplePoint(
        params=SamplingParams(**params),
        tokens=np.asarray([*prompt, *output], np.int32),
        num_prompt_tokens=len(prompt),
        stop_token_ids=frozenset(stop),
    )


def choose(logits, **fields) -> int:
    (chosen,) = sample(torch.tensor([logits], dtype=torch.float32), [point(**fields)])
    return chosen.token_id


def support(logits, **fields) -> set[int]:
    """Ids that any of many seeds chooses."""
    return {choose(logits, seed=seed, **fields) for seed in range(300)}


def noise(seed: int, index: int, token_ids) -> torch.Tensor:
    return exponential_noise(torch.tensor([[noise_key(seed, index)]]), torch.tensor(list(token_ids)))[0]


def test_temperature_zero_takes_the_largest_logit():
    assert choose([0, 1, 5, 2]) == 2


def test_the_log_prob_is_under_the_raw_logits_whatever_the_filters():
    logits = torch.tensor([[0.0, 1.0, 5.0, 2.0]])
    fields = {"temperature": 3.0, "top_k": 1, "output": [2], "presence_penalty": 1.0}
    (chosen,) = sample(logits, [point(**fields)])
    assert chosen.token_id == 2
    assert chosen.log_prob == pytest.approx(float(torch.log_softmax(logits, -1)[0, 2]))


def test_no_rows_sample_nothing():
    assert sample(torch.empty(0, VOCAB_SIZE), []) == []


def test_the_logits_of_the_caller_stay_untouched():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    sample(logits, [point(output=[2], repetition_penalty=2.0, bad_words_ids=((1,),))])
    assert logits.tolist() == [[1.0, 2.0, 3.0]]


def test_frequencies_follow_the_softmax():
    probabilities = [0.5, 0.3, 0.15, 0.05]
    logits = [math.log(probability) for probability in probabilities]
    counts = Counter(choose(logits, temperature=1.0, seed=seed) for seed in range(4000))
    for token_id, probability in enumerate(probabilities):
        assert counts[token_id] / 4000 == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens_and_flattens():
    logits = [0.0, 1.0]
    cold = Counter(choose(logits, temperature=0.1, seed=seed) for seed in range(400))
    hot = Counter(choose(logits, temperature=10.0, seed=seed) for seed in range(400))
    assert cold[1] == 400
    assert 150 < hot[0] < 250


def test_top_k_keeps_the_k_largest():
    assert support([1.0, 1.1, 1.2, 0.9], temperature=1.0, top_k=2) == {1, 2}


def test_a_top_k_beyond_the_vocabulary_is_no_limit():
    assert support([1.0, 1.0, 1.0], temperature=1.0, top_k=100) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = [math.log(probability) for probability in (0.5, 0.3, 0.15, 0.05)]
    assert support(logits, temperature=1.0, top_p=0.4) == {0}
    assert support(logits, temperature=1.0, top_p=0.6) == {0, 1}
    assert support(logits, temperature=1.0, top_p=0.9) == {0, 1, 2}


def test_top_p_is_taken_of_what_top_k_leaves():
    logits = [math.log(probability) for probability in (0.4, 0.3, 0.2, 0.1)]
    assert support(logits, temperature=1.0, top_k=2, top_p=0.55) == {0}


def test_min_p_is_relative_to_the_largest_probability():
    logits = [math.log(probability) for probability in (0.5, 0.3, 0.15, 0.05)]
    assert support(logits, temperature=1.0, min_p=0.5) == {0, 1}


def test_repetition_penalty_counts_prompt_and_output():
    assert choose([2.0, 1.5, 0.0], prompt=[0], repetition_penalty=2.0) == 1
    assert choose([2.0, 1.5, 0.0], prompt=[2], output=[0], repetition_penalty=2.0) == 1


def test_repetition_penalty_pushes_negative_logits_down():
    assert choose([-1.0, -1.5], prompt=[0], repetition_penalty=2.0) == 1


def test_presence_penalty_counts_the_output_only_and_once():
    assert choose([2.0, 1.5], prompt=[0], presence_penalty=1.0) == 0
    assert choose([2.0, 1.5], prompt=[1], output=[0], presence_penalty=1.0) == 1
    assert choose([2.0, 0.5], prompt=[1], output=[0, 0, 0], presence_penalty=1.0) == 0


def test_frequency_penalty_grows_with_every_repetition():
    assert choose([2.0, 0.5], output=[0], frequency_penalty=1.0) == 0
    assert choose([2.0, 0.5], output=[0, 0], frequency_penalty=1.0) == 1


def test_stop_ids_are_masked_until_min_tokens_were_generated():
    assert choose([9.0, 1.0], stop=[0], min_tokens=2, output=[1]) == 1
    assert choose([9.0, 1.0], stop=[0], min_tokens=2, output=[1, 1]) == 0


def test_a_single_token_bad_word_is_never_chosen():
    assert choose([9.0, 1.0], bad_words_ids=((0,),)) == 1


def test_a_longer_bad_word_is_stopped_at_its_last_token():
    word = ((3, 4, 0),)
    assert choose([9.0, 1.0], output=[3, 4], bad_words_ids=word) == 1
    assert choose([9.0, 1.0], output=[4, 3], bad_words_ids=word) == 0
    assert choose([9.0, 1.0], output=[4], bad_words_ids=word) == 0


def test_a_bad_word_begun_in_the_prompt_does_not_count():
    assert choose([9.0, 1.0], prompt=[3, 4], bad_words_ids=((3, 4, 0),)) == 0


def test_ids_outside_the_vocabulary_ban_nothing():
    assert choose([1.0, 9.0], bad_words_ids=((500,),), stop=[400], min_tokens=3) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"bad_words_ids": ((0,), (1,))},
        {"temperature": 1.0, "bad_words_ids": ((0,), (1,))},
        {"temperature": 1e-45},
        {"temperature": 1.0, "repetition_penalty": 1e-300, "prompt": (0, 1)},
        {"temperature": 1.0, "frequency_penalty": -1e300, "output": (1,)},
    ],
)
def test_extreme_parameters_still_choose_a_token(fields):
    assert choose([1.0, 2.0], **fields) in (0, 1)


def test_a_row_is_chosen_alike_alone_and_among_others():
    torch.manual_seed(0)
    logits = torch.randn(4, 50)
    points = [point(output=[1] * row, temperature=1.0, top_p=0.9, seed=row) for row in range(4)]
    together = sample(logits, points)
    assert [sample(logits[row : row + 1], [points[row]])[0].token_id for row in range(4)] == [
        chosen.token_id for chosen in together
    ]


def test_another_seed_or_position_draws_other_numbers():
    logits = [1.0] * VOCAB_SIZE
    by_seed = {choose(logits, temperature=1.0, seed=seed) for seed in range(50)}
    by_position = {choose(logits, temperature=1.0, output=[0] * count) for count in range(50)}
    assert by_seed == by_position == set(range(VOCAB_SIZE))


def test_the_noise_of_a_token_depends_on_seed_index_and_id_alone():
    everything = noise(7, 3, range(1000))
    assert noise(7, 3, [10, 900]).tolist() == everything[[10, 900]].tolist()
    assert everything.mean() == pytest.approx(1.0, abs=0.1)
    assert everything.min() > 0


def test_the_noise_is_the_same_in_every_release():
    found = noise(2**64 - 1, 5, [0, 1, 49151])
    assert found.tolist() == pytest.approx(KNOWN_NOISE, rel=1e-12)
