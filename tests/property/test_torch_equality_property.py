"""Greedy fp32 tokens equal transformers', however requests are batched, cut, preempted, shared, drafted, overlapped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from kelp.core.clock import FakeClock
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import FinishReason, Role, num_blocks_for
from kelp.executor.base import Completed, ExecutorRequest
from kelp.executor.batching.drafts import DraftContext, DraftProposer, NgramProposer
from kelp.executor.batching.engine import Engine, EngineRules
from kelp.executor.batching.executor import BatchingExecutorParts
from kelp.executor.batching.scheduler import SchedulerLimits
from kelp.executor.batching.speculation import SpeculationRules
from kelp.executor.torch.load import load_parts
from kelp.executor.torch.options import TorchExecutorOptions
from kelp.kv.pool import BlockPool
from support.examples import examples
from unit.executor.tiny_llama import Answer, random_prompt, save_model

BLOCK_SIZE = 4
MIN_MARGIN = 1e-3
"""Where the two best logits are closer, rounding may decide."""


@dataclass(frozen=True)
class Job:
    """A request: the first `num_shared` tokens of a known text, then tokens of its own, `num_copies` times the lot."""

    arrival_step: int
    num_shared: int
    num_own: int
    num_copies: int
    max_tokens: int
    abort_after: int | None
    temperature: float = 0.0

    @property
    def prompt(self) -> list[int]:
        return (random_prompt(1, self.num_shared) + random_prompt(self.num_own, self.num_own)) * self.num_copies


@dataclass(frozen=True)
class Scene:
    num_blocks: int
    limits: SchedulerLimits
    num_draft_tokens: int
    max_in_flight: int
    jobs: list[Job]


Jobs = st.builds(
    Job,
    arrival_step=st.integers(0, 12),
    num_shared=st.sampled_from([0, 4, 9, 13]),
    num_own=st.integers(1, 9),
    num_copies=st.integers(1, 2),
    max_tokens=st.integers(1, 24),
    abort_after=st.sampled_from([None, None, None, 5]),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
)
Scenes = st.builds(
    Scene,
    num_blocks=st.integers(17, 40),
    limits=st.builds(SchedulerLimits, st.integers(6, 40), st.integers(2, 6), st.booleans()),
    num_draft_tokens=st.sampled_from([0, 4]),
    max_in_flight=st.sampled_from([1, 2]),
    jobs=st.lists(Jobs, min_size=2, max_size=6),
)
CROWDED = Scene(
    num_blocks=17,
    limits=SchedulerLimits(16, 6, True),
    num_draft_tokens=4,
    max_in_flight=2,
    jobs=[Job(step, 13, own, 1, 24, None) for step, own in enumerate([3, 3, 5, 7, 9])],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny-llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return save_model(folder)


@pytest.fixture(scope="module")
def parts(folder: Path, model: LlamaForCausalLM) -> BatchingExecutorParts:
    """One pool for all examples: what earlier ones left in it must not matter."""
    return load_parts(folder, TorchExecutorOptions(dtype="float32", block_size=BLOCK_SIZE, num_blocks=40, threads=1))


@pytest.fixture(scope="module")
def check_greedy(model: LlamaForCausalLM) -> Callable[[list[int], list[int]], None]:
    @torch.inference_mode()
    def check(prompt: list[int], output: list[int]) -> None:
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        for row, token in enumerate(output):
            is_clear = bool(best[row, 0] - best[row, 1] > MIN_MARGIN)
            assert not is_clear or int(logits[row].argmax()) == token, f"token {row} of {output}"

    return check


class Prompter:
    """Drafts what an earlier run of the same scene said, with an error now and then."""

    def __init__(self, scene: Scene, answers: dict[int, Answer]) -> None:
        self.texts = {str(index): scene.jobs[index].prompt + answer.tokens for index, answer in answers.items()}

    def propose(self, contexts: Sequence[DraftContext]) -> list[np.ndarray]:
        return [self.draft(context) for context in contexts]

    def draft(self, context: DraftContext) -> np.ndarray:
        start = len(context.tokens)
        draft = np.asarray(self.texts[context.request_id][start : start + context.max_tokens], np.int32)
        draft[start % 7 :: 7] = 0
        return draft


class Run:
    """One scene, played to its end."""

    def __init__(self, parts: BatchingExecutorParts, scene: Scene, proposer: DraftProposer) -> None:
        self.scene = scene
        self.pool = BlockPool(scene.num_blocks)
        rules: EngineRules = replace(
            parts.rules,
            scheduler=scene.limits,
            speculation=SpeculationRules(scene.num_draft_tokens, row_cost=0.01),
            max_in_flight=scene.max_in_flight,
        )
        self.engine = Engine(parts.runner, self.pool, rules, FakeClock(), proposer=proposer)
        self.answers: dict[int, Answer] = {}

    def play(self) -> None:
        num_steps = 0
        is_busy = True
        while is_busy or len(self.answers) < len(self.scene.jobs):
            for index, job in enumerate(self.scene.jobs):
                if job.arrival_step == num_steps:
                    self.submit(index, job)
                if job.abort_after is not None and job.arrival_step + job.abort_after == num_steps:
                    self.engine.abort(str(index))
            is_busy = self.engine.step()
            self.pool.check_integrity()
            num_steps += 1

    def submit(self, index: int, job: Job) -> None:
        answer = self.answers[index] = Answer()
        request = ExecutorRequest(
            request_id=str(index),
            prompt=np.asarray(job.prompt, np.int32),
            role=Role.AGGREGATED,
            sampling=SamplingParams(max_tokens=job.max_tokens, temperature=job.temperature, seed=index),
            seed_hash=seed_hash("tiny"),
            sink=answer.events.append,
        )
        assert num_blocks_for(len(job.prompt) + job.max_tokens, BLOCK_SIZE) <= self.scene.num_blocks
        self.engine.add(request, 1)


def play(parts: BatchingExecutorParts, scene: Scene) -> tuple[Run, Run]:
    """The scene one step at a time without drafts, and as it is."""
    plain = Run(parts, replace(scene, num_draft_tokens=0, max_in_flight=1), NgramProposer())
    plain.play()
    run = Run(parts, scene, Prompter(scene, plain.answers))
    run.play()
    return plain, run


def test_a_crowded_scene_preempts_drafts_and_shares(parts):
    _, run = play(parts, CROWDED)
    load = run.engine.load()
    assert load.num_preemptions > 0
    assert 0 < load.num_accepted_tokens < load.num_draft_tokens
    assert any(answer.end.usage.cached_tokens for answer in run.answers.values())


@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(scene=CROWDED)
@given(scene=Scenes)
def test_greedy_answers_are_transformers_and_sampled_ones_are_those_of_single_steps(parts, check_greedy, scene):
    plain, run = play(parts, scene)
    for index, job in enumerate(scene.jobs):
        answer, alike = run.answers[index], plain.answers[index]
        assert isinstance(answer.end, Completed)
        if answer.end.finish_reason is not FinishReason.CANCELLED:
            assert len(answer.tokens) == job.max_tokens
        num_tokens = min(len(answer.tokens), len(alike.tokens))
        assert job.temperature == 0 or answer.tokens[:num_tokens] == alike.tokens[:num_tokens]
        if job.temperature == 0:
            check_greedy(job.prompt, answer.tokens)
    assert run.pool.num_held == 0
