"""A new version of the model beside the old one on a live server: traffic shift, rollback, and the end of one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.llm_client import Answer
from support.serving import MODEL, KelpServer, run_cli
from support.waiting import wait_until

SETTINGS: dict[str, object] = {"kv_manager.enabled": False, "registry.heartbeat_s": 0.3}
PROMPT: dict[str, Any] = {"text_input": "One day the old lighthouse keeper", "max_tokens": 4, "ignore_eos": True}
STORY: dict[str, Any] = {"text_input": "Far out at sea", "max_tokens": 600, "ignore_eos": True}
"""Takes longer than a shift of the traffic, unless that takes several times as long as usual."""


@pytest.fixture(scope="module")
def next_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model with another config.json: other weights, as far as names go, and the same text."""
    folder = tmp_path_factory.mktemp("next")
    for path in MODEL.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "kelp_test": 2}))
    return folder


@pytest.fixture(scope="module")
def fleet() -> Iterator[KelpServer]:
    with KelpServer("aggregated", settings=SETTINGS, arguments=("--engine", "mock")).start() as server:
        yield server


def cli(server: KelpServer, *arguments: str) -> str:
    done = run_cli(*arguments, "--grpc-port", str(server.grpc_port), timeout_s=200)
    assert done.returncode == 0, done.stderr + server.output
    return done.stdout


def refused(server: KelpServer, *arguments: str) -> str:
    done = run_cli(*arguments, "--grpc-port", str(server.grpc_port), timeout_s=200)
    assert done.returncode != 0
    return done.stderr


def served_by(server: KelpServer, num_requests: int = 12) -> set[str]:
    answers = [server.ask(**PROMPT) for _ in range(num_requests)]
    return {answer.last.worker_ids[-1].rpartition("/")[2] for answer in answers}


def check(answer: Answer, worker: str, token_ids: list[int]) -> None:
    """A stream has stayed where it was, whatever became of the traffic meanwhile."""
    assert answer.token_ids == token_ids
    assert {name.rpartition("/")[2] for name in answer.last.worker_ids} == {worker}


def test_a_new_version_is_tried_gets_the_traffic_and_gives_it_back(fleet: KelpServer, next_model: Path) -> None:
    cli(fleet, "scale", "decode=1", "--version", "v2", "--model", str(next_model))
    records = fleet.records()
    assert set(records) == {"decode", "decode_v2"}
    assert records["decode"].layout.model_id != records["decode_v2"].layout.model_id
    assert served_by(fleet) == {"decode"}
    expected = fleet.ask(**STORY).token_ids  # Of both: mocks of one vocabulary say the same.

    with fleet.open(**STORY) as old:
        first = old.next()
        cli(fleet, "traffic", "base=1", "v2=1")
        wait_until(lambda: served_by(fleet) == {"decode", "decode_v2"}, "traffic on both", 60.0)
        cli(fleet, "traffic", "v2=1")
        wait_until(lambda: served_by(fleet) == {"decode_v2"}, "traffic on the new one", 60.0)
        check(Answer([first, *old]), "decode", expected)
    assert "v2 has a share" in refused(fleet, "scale", "decode=0", "--version", "v2")

    with fleet.open(**STORY) as new:
        first = new.next()
        cli(fleet, "traffic", "--back")
        wait_until(lambda: served_by(fleet) == {"decode", "decode_v2"}, "traffic on both again", 60.0)
        cli(fleet, "traffic", "base=1")
        wait_until(lambda: served_by(fleet) == {"decode"}, "traffic on the old one", 60.0)
        check(Answer([first, *new]), "decode_v2", expected)

    cli(fleet, "scale", "decode=0", "--version", "v2")
    assert "version 'v2' has no ready decode worker; there are base" in refused(fleet, "traffic", "v2=1")
    assert set(fleet.records()) == {"decode"}
    assert served_by(fleet) == {"decode"}
