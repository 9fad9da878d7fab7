"""Steps of the mock: right tokens on every path, and exactly the time that the timing model says."""

from dataclasses import replace
from pathlib import Path

import pytest
from mock_rig import VOCABULARY, MockRig, request, rig, tokens_of

from kelp.core.config import MockConfig
from kelp.core.messages import SamplingParams
from kelp.core.types import Role
from kelp.executor.base import Completed
from kelp.executor.mock.pace import RealPace
from kelp.timing.model import TimingModel

__all__ = ["rig"]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
DEFAULT = TimingModel()


def test_an_answer_is_the_reference_s_and_as_long_as_asked_for(rig: MockRig) -> None:
    assert rig.answer(PROMPT, 30) == VOCABULARY.continuation(PROMPT, 30)


def test_a_prompt_cut_into_steps_gets_the_same_answer(tmp_path: Path) -> None:
    rig = MockRig(tmp_path, max_step_tokens=3, max_running=2)
    assert rig.answer(PROMPT, 8) == VOCABULARY.continuation(PROMPT, 8)


def test_preempted_sequences_get_the_same_answers(tmp_path: Path) -> None:
    rig = MockRig(tmp_path, num_blocks=8)
    prompts = [PROMPT[:6], PROMPT[2:9], PROMPT[4:]]
    answers = [rig.submit(prompt, 16) for prompt in prompts]
    rig.run()
    assert rig.engine.load().num_preemptions > 0
    assert [tokens_of(answer) for answer in answers] == [VOCABULARY.continuation(prompt, 16) for prompt in prompts]


def test_a_sampled_answer_follows_its_seed(rig: MockRig) -> None:
    sampling = SamplingParams(temperature=0.7, seed=12)
    assert rig.answer(PROMPT, 9, temperature=0.7, seed=12) == VOCABULARY.continuation(PROMPT, 9, sampling)


def test_a_request_takes_a_prefill_and_a_step_for_each_further_token(rig: MockRig) -> None:
    num_prompt_tokens = len(PROMPT)
    expected_s = DEFAULT.prefill_s(num_prompt_tokens, 0)
    expected_s += sum(DEFAULT.batch_s([], [num_prompt_tokens + index]) for index in range(3))
    assert rig.elapsed_s(PROMPT, 4) == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("role", "expected"),
    [(Role.AGGREGATED, ["Tokens", "cached", "Tokens"]), (Role.PREFILL, ["cached", "Prefilled", "Tokens"])],
)
def test_tokens_are_told_before_the_books_are_kept_but_after_blocks_that_a_peer_fetches(
    rig: MockRig, role: Role, expected: list[str]
) -> None:
    order: list[str] = []
    rig.pool.watch(lambda _: order.append("cached"))
    asked = replace(request(PROMPT, 2, [], role=role), sink=lambda event: order.append(type(event).__name__))
    rig.engine.add(asked, rig.clock.wall_ns())
    rig.run()
    assert [name for name in order if name in expected][:3] == expected


def test_cached_blocks_take_no_time(rig: MockRig) -> None:
    rig.answer(PROMPT, 1)
    assert rig.elapsed_s(PROMPT, 1) == pytest.approx(DEFAULT.batch_s([(2, 8)], []))


def test_sequences_share_their_steps(rig: MockRig) -> None:
    for start in range(4):
        rig.submit(PROMPT[start:], 5)
    assert rig.run() == 5


def test_a_speed_up_divides_every_time(tmp_path: Path) -> None:
    slow, fast = (MockRig(tmp_path, MockConfig(speedup=speedup)) for speedup in (1, 8))
    assert slow.elapsed_s(PROMPT, 6) == pytest.approx(8 * fast.elapsed_s(PROMPT, 6))


def test_an_instant_mock_takes_no_time(tmp_path: Path) -> None:
    assert MockRig(tmp_path, MockConfig(speedup=0)).elapsed_s(PROMPT, 6) == 0.0


def test_several_tokens_per_step_are_the_same_tokens_in_fewer_steps(tmp_path: Path) -> None:
    rig = MockRig(tmp_path, MockConfig(tokens_per_step=8))
    answer = rig.submit(PROMPT, 33)
    assert rig.run() == 1 + 32 // 8
    assert tokens_of(answer) == VOCABULARY.continuation(PROMPT, 33)
    load = rig.engine.load()
    assert load.num_draft_tokens == load.num_accepted_tokens == 28


def test_as_many_tokens_per_step_as_configured_come_from_the_first_step_on(tmp_path: Path) -> None:
    rig = MockRig(tmp_path, MockConfig(tokens_per_step=64), num_blocks=128)
    answers = [rig.submit([index + 10, *PROMPT], 65) for index in range(3)]
    assert rig.run() == 2
    assert [len(tokens_of(answer)) for answer in answers] == [65] * 3


def test_wrong_guesses_about_a_sampled_answer_do_no_harm(tmp_path: Path) -> None:
    rig = MockRig(tmp_path, MockConfig(tokens_per_step=4))
    sampling = SamplingParams(temperature=1.0, seed=1)
    assert rig.answer(PROMPT, 40, temperature=1.0, seed=1) == VOCABULARY.continuation(PROMPT, 40, sampling)


def test_a_stop_token_ends_a_step_of_several_tokens_early(tmp_path: Path) -> None:
    rig = MockRig(tmp_path, MockConfig(tokens_per_step=16))
    expected = VOCABULARY.continuation(PROMPT, 40)
    answer = rig.submit(PROMPT, 40, stop_token_ids=(expected[5],))
    rig.run()
    assert tokens_of(answer) == expected[: expected.index(expected[5]) + 1]
    assert isinstance(answer[-1], Completed)


class Sleeper:
    """A clock on which every sleep lasts a little too long."""

    def __init__(self, excess_s: float) -> None:
        self.now_s = 0.0
        self.excess_s = excess_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self.excess_s


def test_sleeps_that_last_too_long_do_not_add_up() -> None:
    sleeper = Sleeper(excess_s=1e-4)
    pace = RealPace(lambda: sleeper.now_s, sleeper.sleep)
    for _ in range(100):
        pace.wait(pace.begin(1e-3))
    assert sleeper.now_s == pytest.approx(0.1, abs=1.1e-4)


def test_a_long_interruption_is_not_caught_up_with() -> None:
    sleeper = Sleeper(excess_s=0.0)
    pace = RealPace(lambda: sleeper.now_s, sleeper.sleep)
    sleeper.excess_s = 5.0
    pace.wait(pace.begin(1e-2))
    sleeper.excess_s = 0.0
    pace.wait(pace.begin(1e-2))
    assert sleeper.now_s == pytest.approx(5.0 + 2e-2 - 1e-3)
