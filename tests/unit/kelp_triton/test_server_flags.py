"""What the parent tritonserver was started with."""

from __future__ import annotations

import pb_double  # noqa: F401 - stands in for Triton's own module
import psutil
import pytest

from kelp_triton import server
from kelp_triton.server import ServerFlags, parent_flags, parse_flags


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ServerFlags(8001, False)),
        (["tritonserver", "--grpc-port=9001"], ServerFlags(9001, False)),
        (["tritonserver", "--grpc-port", "9001"], ServerFlags(9001, False)),
        (["tritonserver", "--model-control-mode=explicit", "--grpc-port=1"], ServerFlags(1, True)),
        (["tritonserver", "--model-control-mode", "explicit"], ServerFlags(8001, True)),
        (["tritonserver", "--model-control-mode=poll"], ServerFlags(8001, False)),
        (["tritonserver", "--grpc-port=1", "--grpc-port=2"], ServerFlags(2, False)),
        (["tritonserver", "--strict-readiness"], ServerFlags(8001, False)),
        (["tritonserver", "--grpc-address=host=x", "--http-port=7"], ServerFlags(8001, False)),
    ],
)
def test_flags_are_read_in_both_spellings(arguments: list[str], expected: ServerFlags) -> None:
    assert parse_flags(arguments) == expected


class FakeProcess:
    def __init__(self, *command_lines: list[str]) -> None:
        self._parents = [FakeParent(line) for line in command_lines]

    def parents(self) -> list[FakeParent]:
        return self._parents


class FakeParent:
    def __init__(self, command_line: list[str]) -> None:
        self._command_line = command_line

    def cmdline(self) -> list[str]:
        return self._command_line


def ancestry(monkeypatch: pytest.MonkeyPatch, *command_lines: list[str]) -> None:
    monkeypatch.setattr(server.psutil, "Process", lambda: FakeProcess(*command_lines))


def test_the_nearest_tritonserver_above_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ancestry(
        monkeypatch,
        ["bash"],
        ["/cache/bin/tritonserver", "--grpc-port=9001"],
        ["/cache/bin/tritonserver", "--grpc-port=1"],
    )
    assert parent_flags() == ServerFlags(9001, False)


def test_a_server_run_through_its_loader_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    ancestry(monkeypatch, ["/lib/ld-linux.so.2", "/cache/bin/tritonserver", "--grpc-port=9001"])
    assert parent_flags().grpc_port == 9001


def test_without_a_server_the_defaults_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    ancestry(monkeypatch, ["python", "-m", "pytest", "tritonserver"])
    assert parent_flags() == ServerFlags(8001, False)


def test_this_very_process_has_no_tritonserver_above_it() -> None:
    assert psutil.Process().pid
    assert parent_flags() == ServerFlags(8001, False)
