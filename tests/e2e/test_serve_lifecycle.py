"""What `kelp serve` refuses before Triton starts, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.llm_client import Answer, ServedError, is_served
from support.serving import CLEAN_STOP_S, HOST, KelpServer, free_ports, run_cli, shm_regions
from support.waiting import wait_until


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def refusal(*arguments: str) -> str:
    """The one line that `kelp serve` prints instead of starting."""
    done = run_cli("serve", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "starting tritonserver" not in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize("option", ["--http-port", "--grpc-port", "--metrics-port"])
def test_a_port_in_use_is_refused_by_option_and_number(option: str, busy_port: int) -> None:
    line = refusal(option, str(busy_port))
    assert line.startswith(f"error: {option}: port {busy_port} is in use")


def test_a_missing_model_is_refused_by_path(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} does not exist" in refusal("--model", str(tmp_path / "nowhere"))


def test_a_folder_without_a_model_is_refused_by_the_file_it_lacks(tmp_path: Path) -> None:
    assert "has no config.json" in refusal("--model", str(tmp_path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    assert str(path) in refusal("--model", str(path))


def test_too_little_memory_is_refused_with_what_to_do() -> None:
    http, grpc, metrics = free_ports(3)
    ports = ("--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics))
    assert "lower --num-blocks" in refusal(*ports, "--num-blocks", "100000000")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--dtype", "int8"), "executor.dtype"),
        (("--set", "executor.blocks=3"), "executor.blocks: no such field"),
        (("--set", "executor.block_size"), "--set"),
        (("--config", "/nowhere/kelp.yaml"), "/nowhere/kelp.yaml"),
    ],
)
def test_a_bad_option_is_refused_by_name(arguments: tuple[str, ...], named: str) -> None:
    assert named in refusal(*arguments)


def test_a_model_that_the_engine_refuses_ends_the_start_with_its_reason() -> None:
    http, grpc, metrics = free_ports(3)
    done = run_cli(
        *("serve", "--mode", "aggregated", "--num-blocks", "64", "--set", "executor.max_model_tokens=1000000"),
        *("--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "executor.max_model_tokens: 1000000 exceeds max_position_embeddings" in done.stderr
    assert shm_regions(grpc) == []


def test_sigterm_in_the_middle_of_an_answer_lets_it_end_and_takes_no_other() -> None:
    # The mock's pace does not depend on the machine's: it takes seconds, and ends before it is stopped the hard way.
    server = KelpServer("aggregated", settings={"drain.grace_s": 50.0}, arguments=("--engine", "mock")).start()
    story: dict[str, Any] = {"text_input": "Count to one hundred:", "max_tokens": 300, "ignore_eos": True}
    expected = server.ask(**story)
    with server.open(**story) as call, ThreadPoolExecutor(1) as pool:
        first = call.next()
        stopping = pool.submit(server.stop)
        wait_until(lambda: not is_served(server.http_url, "llm"), "llm to be taken out", CLEAN_STOP_S)
        with pytest.raises(ServedError):
            server.ask(text_input="One more?", max_tokens=4)
        assert Answer([first, *call]).token_ids == expected.token_ids
        stopping.result()


def test_a_supervisor_that_is_killed_takes_its_servers_along() -> None:
    server = KelpServer("aggregated", num_blocks=128).start()
    family = server.family()
    os.kill(server.pid, signal.SIGKILL)
    try:
        wait_until(lambda: not any(_is_alive(process) for process in family), "all processes gone", CLEAN_STOP_S)
    finally:
        server.kill()


def test_a_killed_server_of_the_isolated_layout_comes_back_and_serves() -> None:
    with KelpServer("aggregated", isolate=True, num_blocks=128).start() as server:
        before = server.records()["decode"]
        port = int(before.endpoint.rpartition(":")[2])
        server.tritonservers()[port].kill()
        wait_until(lambda: "kelp-decode is back" in server.output, "restart", 90.0)
        wait_until(lambda: server.records()["decode"].epoch != before.epoch, "a new epoch", 30.0)
        assert "Paris" in server.ask(text_input="The capital of France is", max_tokens=4).text


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
