from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kelp.core.errors import ConfigError
from kelp.sim.bound import hit_share, pooled_hits, prompt_tokens
from kelp.sim.pacing import at_rate, at_speed, halves, part_of, rate_rps
from kelp.sim.requests import SimRequest, Workload
from kelp.sim.traces import BLOCK_SIZE, read_trace

SAMPLES = Path(__file__).parents[3] / "perf" / "sim" / "sample"


def row(timestamp: float = 0, num_prompt: int = 1200, num_output: int = 5, ids: object = (0, 1, 2)) -> str:
    fields = {"timestamp": timestamp, "input_length": num_prompt, "output_length": num_output, "hash_ids": ids}
    return json.dumps(fields)


def trace(folder: Path, *rows: str, name: str = "trace.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_partial_last_block_has_no_hash(tmp_path: Path) -> None:
    (request,) = read_trace(trace(tmp_path, row(num_prompt=1200))).requests
    assert len(request.block_hashes) == 1200 // BLOCK_SIZE == 2


def test_equal_ids_are_equal_blocks_within_a_file_and_foreign_ones_in_another(tmp_path: Path) -> None:
    path = trace(tmp_path, row(ids=[7, 8, 9]), row(ids=[7, 3, 4]))
    one, other = (request.block_hashes for request in read_trace(path).requests)
    assert one[0] == other[0] and one[1] != other[1]
    assert all(len(block_hash) == 16 for block_hash in one)
    (elsewhere,) = read_trace(trace(tmp_path, row(ids=[7, 8, 9]), name="another.jsonl")).requests
    assert not set(elsewhere.block_hashes) & set(one)


def test_a_gzipped_trace_reads_like_a_plain_one(tmp_path: Path) -> None:
    plain = trace(tmp_path, row(5), row(10))
    packed = tmp_path / "trace.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_trace(packed) == read_trace(plain)


def test_timestamps_become_seconds_in_order(tmp_path: Path) -> None:
    workload = read_trace(trace(tmp_path, row(2500), row(1000), row(1000)))
    assert [request.arrival_s for request in workload.requests] == [1.0, 1.0, 2.5]


def test_spreading_keeps_every_request_between_its_timestamp_and_the_next(tmp_path: Path) -> None:
    path = trace(tmp_path, *[row(0)] * 20, *[row(1000)] * 20, *[row(9000)] * 20)
    arrivals = [request.arrival_s for request in read_trace(path, spread_s=3.0, seed=1).requests]
    assert arrivals == sorted(arrivals) and len(set(arrivals)) == 60
    assert all(0 <= at_s < 1 for at_s in arrivals[:20])
    assert all(1 <= at_s < 4 for at_s in arrivals[20:40])
    assert all(9 <= at_s < 12 for at_s in arrivals[40:])


def test_spreading_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = trace(tmp_path, *[row(0)] * 5)
    assert read_trace(path, 3.0, seed=1) == read_trace(path, 3.0, seed=1) != read_trace(path, 3.0, seed=2)


@pytest.mark.parametrize(
    "bad",
    [
        "not json",
        "[1]",
        '{"timestamp": 0}',
        row(num_prompt=0),
        row(num_output=0),
        row(-1),
        row(ids=[-1, 0]),
        row(ids=5),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, bad: str) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        read_trace(trace(tmp_path, row(), bad))


def test_too_few_ids_for_the_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 hash_ids are too few for 1200 tokens"):
        read_trace(trace(tmp_path, row(num_prompt=1200, ids=[0])))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--trace .*nothing\.jsonl: No such file"):
        read_trace(tmp_path / "nothing.jsonl")
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(ConfigError, match=r"broken\.jsonl\.gz"):
        read_trace(broken)
    with pytest.raises(ConfigError, match="no requests"):
        read_trace(trace(tmp_path, ""))


@pytest.mark.parametrize("name", ["mooncake_conversation_200", "mooncake_synthetic_200"])
def test_the_samples_are_traces_that_share_prefixes(name: str) -> None:
    workload = read_trace(SAMPLES / f"{name}.jsonl.gz")
    assert workload.name == name and len(workload.requests) == 200
    assert 0 < hit_share(pooled_hits(workload, None), prompt_tokens(workload)) < 1


def make(*arrivals: float) -> Workload:
    return Workload("made", 16, tuple(SimRequest(at_s, 32, 4, (), f"s{at_s}") for at_s in arrivals))


def test_speed_scales_arrivals_from_the_first_one() -> None:
    faster = at_speed(make(2.0, 4.0, 8.0), 2.0)
    assert [request.arrival_s for request in faster.requests] == [0.0, 1.0, 3.0]
    assert faster.requests[1].session_id == "s4.0" and faster.requests[-1].num_prompt_tokens == 32


def test_a_rate_is_met_on_average() -> None:
    workload = make(*range(101))
    assert rate_rps(at_rate(workload, 8.0)) == pytest.approx(8.0)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="--rate"):
        at_rate(make(0.0, 1.0), rate)


def test_a_workload_at_one_instant_has_no_rate_to_scale() -> None:
    with pytest.raises(ConfigError, match="one instant"):
        at_rate(make(1.0, 1.0), 2.0)


def test_halves_cover_everything_once_and_start_at_zero() -> None:
    workload = make(1.0, 2.0, 3.0, 5.0, 7.0)
    first, second = halves(workload)
    together = [*first.requests, *second.requests]
    assert [request.session_id for request in together] == [request.session_id for request in workload.requests]
    assert first.requests[0].arrival_s == second.requests[0].arrival_s == 0.0


def test_parts_of_parts_and_slices_are_consistent() -> None:
    quarter = part_of(part_of(make(*range(8)), 0.5, 1.0), 0.5, 1.0)
    assert [request.session_id for request in quarter.requests] == ["s6", "s7"]
    assert quarter.requests[0:2] == list(quarter.requests)
    with pytest.raises(IndexError):
        quarter.requests[2]
