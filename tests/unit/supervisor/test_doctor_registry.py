"""What `kelp doctor` says of the registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelp.supervisor import doctor
from kelp.supervisor.doctor import Finding


def found(tmp_path: Path, text: str) -> Finding:
    path = tmp_path / "kelp.yaml"
    path.write_text(text)
    (finding,) = [finding for finding in doctor.examine(path) if finding.subject == "registry"]
    return finding


def test_a_directory_is_fine(tmp_path: Path) -> None:
    assert found(tmp_path, f"registry: {{path: {tmp_path}}}") == Finding("registry", True, f"{tmp_path}, 0 workers")


@pytest.mark.parametrize(
    ("url", "reason"),
    [("etcd://127.0.0.1:1", "etcd 127.0.0.1:1: UNAVAILABLE"), ("etcd://u@a:1", "registry.password_file")],
    ids=["nobody there", "no password"],
)
def test_an_etcd_that_cannot_be_used_is_a_finding(tmp_path: Path, url: str, reason: str) -> None:
    finding = found(tmp_path, f"registry: {{url: '{url}'}}")
    assert not finding.is_fine
    assert finding.detail.startswith(reason)


class EmptyRegistry:
    """Answers, and has nobody."""

    @property
    def workers(self) -> EmptyRegistry:
        return self

    def snapshot(self) -> list[object]:
        return []


def test_an_etcd_in_which_this_host_names_itself_by_loopback_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "open_registry", lambda config, token: EmptyRegistry())
    groups = ("server", "handoff", "replicas", "events")
    own = "\n".join(f"{name}: {{host: 10.0.0.1}}" for name in groups)
    finding = found(tmp_path, f"registry: {{url: 'etcd://e:1'}}\n{own}")
    assert finding == Finding("registry", True, "etcd://e:1, 0 workers")
    finding = found(tmp_path, f"registry: {{url: 'etcd://e:1'}}\n{own.replace('events: {host: 10.0.0.1}', '')}")
    assert not finding.is_fine
    assert "other hosts need an address of this one in events.host" in finding.detail
