"""Every `kelp serve` has a token, its own or the user's, and `kelp doctor` says how things stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelp.cli import serving
from kelp.core.config import KelpConfig, load_config
from kelp.core.errors import ConfigError
from kelp.core.peer_auth import make_token_file, read_secret
from kelp.supervisor import doctor
from kelp.supervisor.plan import write_config

LISTENING = ("127.0.0.1", 8001)


def of_run(run_folder: Path, token_file: Path | None = None) -> KelpConfig:
    settings = {} if token_file is None else {"peers.token_file": str(token_file)}
    return serving._for_run(load_config(settings), serving.Mode.AGGREGATED, 1, run_folder, LISTENING)


def test_a_run_gets_a_token_that_others_cannot_read_and_its_configuration_only_says_where(tmp_path: Path) -> None:
    config = of_run(tmp_path)
    path = config.peers.token_file
    assert path is not None and path.parent == tmp_path.resolve()
    assert path.stat().st_mode & 0o777 == 0o600
    write_config(config, tmp_path / "kelp.yaml")
    assert read_secret(path).decode() not in (tmp_path / "kelp.yaml").read_text()
    assert load_config(path=tmp_path / "kelp.yaml").peers == config.peers


def test_a_users_token_is_taken_wherever_the_servers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_token_file(tmp_path / "mine")
    assert of_run(tmp_path / "run", Path("mine")).peers.token_file == (tmp_path / "mine").resolve()


def test_a_users_token_that_others_can_read_starts_nothing(tmp_path: Path) -> None:
    make_token_file(tmp_path / "mine")
    (tmp_path / "mine").chmod(0o644)
    with pytest.raises(ConfigError, match=r"peers\.token_file.*chmod 600"):
        of_run(tmp_path, tmp_path / "mine")


@pytest.mark.parametrize(
    ("settings", "is_fine", "what"),
    [
        ("", True, "none; `kelp serve` makes one per run"),
        ("handoff: {host: 10.0.0.1}", False, "none, and addresses beyond this host are used"),
        ("peers: {token_file: FOLDER/token}", True, "FOLDER/token"),
        ("peers: {token_file: FOLDER/none}", False, "No such file"),
    ],
    ids=["none here", "none elsewhere", "one", "lost"],
)
def test_the_doctor_says_whether_peers_know_each_other(tmp_path: Path, settings: str, is_fine: bool, what: str) -> None:
    make_token_file(tmp_path / "token")
    (tmp_path / "kelp.yaml").write_text(settings.replace("FOLDER", str(tmp_path)))
    found = doctor._try_token(tmp_path / "kelp.yaml")
    assert found.is_fine is is_fine
    assert what.replace("FOLDER", str(tmp_path)) in found.detail
