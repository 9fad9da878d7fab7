"""What the engines are asked to do: the cases, their prompts, and which figure is read off a turn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kelp.text.tokenizer import Tokenizer
from perf.executor.protocol import Job, Turn
from perf.suite import BenchError

_LOWEST_PLAIN_TOKEN = 1000
"""Below are special tokens and single bytes."""

_PASSAGE_SENTENCES = 9
_SENTENCES = """\
The ferry leaves the harbour at seven and reaches the island before noon.
Tickets are sold on board, and children under six travel free of charge.
A small museum beside the lighthouse shows tools used by fishermen long ago.
Visitors may climb the tower when the wind is below forty kilometres per hour.
Fresh bread arrives twice a day from the bakery behind the post office.
The northern path crosses two wooden bridges and ends at a quiet beach.
Dogs must be kept on a lead between April and September because birds nest there.
In winter the island is home to ninety people and several hundred sheep.
The school has a single classroom, a library and a garden with apple trees.
Electricity comes from three turbines that stand on the western hill.
When the sea is rough, letters and medicine are delivered by helicopter.
Every summer a choir from the mainland gives a concert inside the old chapel.
Campers should bring water, since the only spring lies an hour from the meadow.
The last boat returns at half past five and does not wait for latecomers.
Bicycles can be rented near the pier for eight euros, helmets included.
A doctor visits on Tuesdays and sees patients in the room above the shop."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case of the suite.

    Attributes:
        prompt_tokens: Length of each prompt; 0 is a passage that the model will copy.
        max_tokens: 1 measures the prefill, more the decoding.
        repeats: Jobs of one turn, of which the median counts; short ones need several.
    """

    name: str
    num_sequences: int
    prompt_tokens: int
    max_tokens: int
    repeats: int = 1

    @property
    def is_prefill(self) -> bool:
        """Whether the figure is that of the prefill."""
        return self.max_tokens == 1


COPY = Case("ngram_copy", num_sequences=1, prompt_tokens=0, max_tokens=120)
CASES = (
    Case("prefill_512", num_sequences=1, prompt_tokens=512, max_tokens=1, repeats=3),
    Case("prefill_2048", num_sequences=1, prompt_tokens=2048, max_tokens=1),
    Case("decode_b1", num_sequences=1, prompt_tokens=128, max_tokens=64),
    Case("decode_b8", num_sequences=8, prompt_tokens=128, max_tokens=64),
    Case("decode_b32", num_sequences=32, prompt_tokens=128, max_tokens=48),
    COPY,
)
WARM_UP = (
    Case("warm_up_prefill", num_sequences=1, prompt_tokens=512, max_tokens=1),
    Case("warm_up_decode", num_sequences=8, prompt_tokens=16, max_tokens=8),
)


def make_job(case: Case, tokenizer: Tokenizer, seed: int) -> Job:
    """A job of the case; the same seed gives the same one, another seed prompts that share no first block with it."""
    generator = random.Random(f"{case.name} {seed}")
    if case is COPY:
        prompts = [copy_prompt(tokenizer, generator) for _ in range(case.num_sequences)]
    else:
        prompts = [_random_prompt(case.prompt_tokens, tokenizer, generator) for _ in range(case.num_sequences)]
    return Job(tuple(prompts), case.max_tokens)


def copy_prompt(tokenizer: Tokenizer, generator: random.Random) -> tuple[int, ...]:
    """A passage twice and its first sentence once more: the model goes on with the second sentence."""
    sentences = generator.sample(_SENTENCES.splitlines(), _PASSAGE_SENTENCES)
    passage = " ".join(sentences)
    return tuple(tokenizer.encode(f"{passage}\n\n{passage}\n\n{sentences[0]}").tolist())


def _random_prompt(num_tokens: int, tokenizer: Tokenizer, generator: random.Random) -> tuple[int, ...]:
    return tuple(generator.choices(range(_LOWEST_PLAIN_TOKEN, tokenizer.vocab_size), k=num_tokens))


def tokens_per_s(case: Case, job: Job, turn: Turn) -> float:
    """The figure of the case.

    Raises:
        BenchError: The sequences were never decoded together.
    """
    return prefill_tokens_per_s(job, turn) if case.is_prefill else decode_tokens_per_s(turn)


def prefill_tokens_per_s(job: Job, turn: Turn) -> float:
    """Prompt tokens over the time until every sequence had its first token."""
    last_first_s = max(arrivals[0][0] for arrivals in turn.sequences)
    return sum(len(prompt) for prompt in job.prompts) / (last_first_s - turn.start_s)


def decode_tokens_per_s(turn: Turn) -> float:
    """The pace of all sequences together while all of them decode.

    That is from the first token of the one that started last to the last token of the one that ended first. Each
    sequence's pace is taken between arrivals of its own within that time, so that it does not matter on which side
    of the limits the rest of a step falls.

    Raises:
        BenchError: There is no such time.
    """
    begin_s = max(arrivals[0][0] for arrivals in turn.sequences)
    end_s = min(arrivals[-1][0] for arrivals in turn.sequences)
    return sum(_pace([item for item in arrivals if begin_s <= item[0] <= end_s]) for arrivals in turn.sequences)


def _pace(arrivals: Sequence[tuple[float, int]]) -> float:
    if len(arrivals) < 2:
        raise BenchError("the sequences of a batch were never decoded together")
    return sum(count for _, count in arrivals[1:]) / (arrivals[-1][0] - arrivals[0][0])
