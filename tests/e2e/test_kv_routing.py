"""Three routers before eight mock workers that lose events: prompts meet their blocks, load spreads, workers come and
go, every decision is explained, and the routers agree with the workers afterwards."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from mock_fleet_rig import NUM_ROUTERS, Reference, explain, generate, samples, total, worker_of
from session_load import BLOCK_SIZE, MAX_TOKENS, NUM_TURNS, SessionLoad, Turn

from kelp.core.hashing import seed_hash, sequence_hashes
from support.index_check import blocks_held
from support.llm_client import ServedError
from support.serving import KelpServer, run_cli
from support.waiting import wait_until

NUM_WORKERS = 8
NUM_CLIENTS = 8
NUM_STEADY_SESSIONS = 48
LEAST_HIT_SHARE = 0.85
"""A turn may go elsewhere where its worker is busy, and finds the document at most; round-robin comes to a half."""
SETTINGS: dict[str, object] = {"events.drop_share": 0.1, "handoff.transport": "local"}


@pytest.fixture(scope="module")
def served() -> Iterator[KelpServer]:
    arguments = ("--engine", "mock", "--decode", str(NUM_WORKERS), "--routers", str(NUM_ROUTERS))
    with KelpServer("aggregated", num_blocks=1024, settings=SETTINGS, arguments=arguments).start() as server:
        yield server


@pytest.fixture(scope="module")
def load(served: KelpServer) -> SessionLoad:
    return SessionLoad(served, Reference(), seed=4)


def test_each_router_is_a_process_of_its_own_on_one_cpu_and_knows_the_others(served: KelpServer) -> None:
    assert len(list(served.registry_folder.glob("*.router.json"))) == NUM_ROUTERS
    stubs = [process for process in served.family() if any(part.startswith("llm_0_") for part in process.cmdline())]
    assert [len(process.cpu_affinity()) for process in stubs] == [1] * NUM_ROUTERS

    def known() -> list[float]:
        return [sample.value for sample in samples(served)["kelp_routers_known"]]

    wait_until(lambda: known() == [NUM_ROUTERS - 1] * NUM_ROUTERS, "each router to know the others")


def test_an_unknown_decision_is_not_found(served: KelpServer) -> None:
    with pytest.raises(ServedError) as caught:
        explain(served, "never-asked")
    assert caught.value.code == "NOT_FOUND"


def test_a_burst_over_all_routers_spreads_over_all_workers(served: KelpServer) -> None:
    with ThreadPoolExecutor(16) as pool:
        asked = [f"burst {number}: {number * 7919}" for number in range(32)]
        answers = list(pool.map(lambda text: generate(served, text_input=text, max_tokens=64), asked))
    spread = Counter(worker_of(answer) for answer in answers)
    assert len(spread) == NUM_WORKERS
    assert max(spread.values()) <= 3 * len(asked) / NUM_WORKERS


def test_a_pinned_worker_serves_and_an_unknown_one_is_refused(served: KelpServer) -> None:
    for name in ("decode", "decode_1", "decode_2"):
        assert worker_of(generate(served, text_input="pinned", kelp_worker=name)) == name
    with pytest.raises(ServedError) as caught:
        generate(served, text_input="pinned", kelp_worker="decode_77")
    assert caught.value.code == "NO_WORKER"
    with pytest.raises(ServedError) as caught:
        generate(served, text_input="tagged", kelp_require_tags="zone")
    assert caught.value.code == "INVALID_ARGUMENT"


def test_conversations_return_to_their_blocks_and_no_worker_is_overrun(served: KelpServer, load: SessionLoad) -> None:
    turns = load.run(NUM_CLIENTS, at_most=NUM_STEADY_SESSIONS)
    assert len(turns) == NUM_STEADY_SESSIONS * NUM_TURNS
    assert hit_share(turns) >= LEAST_HIT_SHARE
    spread = Counter(turn.worker for turn in turns)
    assert max(spread.values()) <= 2.5 * len(turns) / NUM_WORKERS


def test_workers_come_and_go_under_load_and_nobody_notices(served: KelpServer, load: SessionLoad) -> None:
    def scale_both_ways() -> None:
        for target in ("decode=10", "decode=7"):
            done = run_cli("scale", target, "--grpc-port", str(served.grpc_port), timeout_s=240)
            assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(1) as pool:
        scaling = pool.submit(scale_both_ways)
        turns = load.run(NUM_CLIENTS, is_over=scaling.done)
        scaling.result()
    turns += load.run(NUM_CLIENTS, at_most=NUM_CLIENTS)
    staying = {"decode", *(f"decode_{number}" for number in range(1, 7))}
    assert set(served.records()) == staying
    assert hit_share(turns, staying) >= LEAST_HIT_SHARE
    serving = {turn.worker for turn in turns}
    assert serving - staying, "a worker that joined serves, too"
    assert len(serving & staying) > len(staying) / 2
    assert {turn.worker for turn in turns[-NUM_CLIENTS * NUM_TURNS // 2 :]} <= staying
    served.wait_quiet()


def test_every_decision_is_explained_by_whichever_router_is_asked(served: KelpServer, load: SessionLoad) -> None:
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        explanations = list(pool.map(lambda turn: explain(served, turn.request_id), load.turns))
    for turn, explanation in zip(load.turns, explanations, strict=True):
        assert explanation["request_id"] == turn.request_id
        choice = explanation["choices"][0]
        assert choice["chosen"] == turn.answer["worker_ids"]
        assert choice["chosen"] in [candidate["worker_id"] for candidate in choice["candidates"]]
        assert explanation["outcome"]["state"] == "completed"
        assert explanation["outcome"]["num_output_tokens"] == MAX_TOKENS
    assert {explanation["router_id"] for explanation in explanations} == routers(served)


def test_lost_events_were_asked_for_and_all_routers_know_in_the_end_what_workers_hold(
    served: KelpServer, load: SessionLoad
) -> None:
    wait_until(lambda: total(samples(served)["kelp_kv_event_recoveries_total"], kind="gap") > 0, "gaps")
    assert total(samples(served)["kelp_kv_event_recoveries_total"], kind="replay") > 0
    records = list(served.records().values())
    wait_until(
        lambda: total(samples(served)["kelp_kv_event_workers"], state="live") == NUM_ROUTERS * len(records),
        "every router to know every worker",
        30.0,
    )
    prompts = [turn.prompt for turn in load.turns[-NUM_TURNS * NUM_CLIENTS :: NUM_TURNS]]
    encode, seed = Reference().encode, seed_hash(records[0].layout.model_id)
    names = [sequence_hashes(encode(prompt), BLOCK_SIZE, seed) for prompt in prompts]
    agreed: defaultdict[str, set[str]] = defaultdict(set)

    def agree() -> bool:
        held = blocks_held(records, names, served.peer_token)
        for number, (prompt, expected) in enumerate(zip(prompts, held, strict=True)):
            router_id, seen = overlaps_seen(served, f"probe-{number}", prompt)
            if seen != expected:
                agreed.clear()
                return False
            agreed[router_id].add(prompt)
        return set(agreed) == routers(served)

    wait_until(agree, "every router's index to equal what workers hold", 60.0)
    assert total(samples(served)["kelp_approximate_workers"]) == 0
    served.wait_quiet()


def overlaps_seen(server: KelpServer, name: str, prompt: str) -> tuple[str, dict[str, int]]:
    """A router, and how many leading blocks of a prompt it thought that each worker had."""
    generate(server, id=name, text_input=prompt, max_tokens=1)
    explanation = explain(server, name)
    seen = {row["worker_id"]: row["overlap_blocks"][0] for row in explanation["choices"][0]["candidates"]}
    return explanation["router_id"], {worker_id: count for worker_id, count in seen.items() if count}


def routers(server: KelpServer) -> set[str]:
    return {sample.labels["router"] for sample in samples(server)["kelp_routers_known"]}


def hit_share(turns: list[Turn], staying: set[str] | None = None) -> float:
    """Of the full blocks of earlier turns at workers that stay, the share that later turns did not compute anew."""
    reference = Reference()
    num_hit = num_possible = 0
    for turn in turns:
        if turn.before is not None and (staying is None or turn.before.worker in staying):
            num_before = len(reference.encode(turn.before.prompt)) // BLOCK_SIZE
            num_possible += num_before
            num_hit += min(num_before, math.ceil(turn.answer["cached_tokens"] / BLOCK_SIZE))
    assert num_possible > 0
    return num_hit / num_possible
