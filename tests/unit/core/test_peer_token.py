"""The token: only a file that others cannot read will do, it shows itself nowhere, and proofs mean one thing each."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from kelp.core.config import KelpConfig, load_config
from kelp.core.config_peers import PeersConfig
from kelp.core.errors import ConfigError, PeerRefused
from kelp.core.peer_auth import (
    MAX_TOKEN_BYTES,
    MIN_TOKEN_BYTES,
    SEAL,
    PeerToken,
    load_token,
    make_token_file,
    proof_in,
    read_secret,
    seal,
    token_of_server,
    unseal,
)

TOKEN, OTHER = PeerToken(b"t" * MIN_TOKEN_BYTES), PeerToken(b"o" * MIN_TOKEN_BYTES)
SCOPE = ("worker", "epoch")


def token_file(folder: Path, content: bytes = b"0123456789abcdef", mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_file_gives_the_same_token_wherever_it_was_copied_with_a_line_end(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    one = load_token(PeersConfig(token_file=token_file(tmp_path)))
    copy = load_token(PeersConfig(token_file=token_file(tmp_path / "copy", b"0123456789abcdef\n")))
    assert one is not None and copy is not None
    assert one.key("x") == copy.key("x") != one.key("y")


def test_a_token_that_was_made_is_its_owners_alone_and_new(tmp_path: Path) -> None:
    paths = (tmp_path / "a", tmp_path / "b")
    for path in paths:
        make_token_file(path)
        assert path.stat().st_mode & 0o777 == 0o600
    assert len({read_secret(path) for path in paths}) == 2
    with pytest.raises(FileExistsError):
        make_token_file(paths[0])


@pytest.mark.parametrize(
    ("content", "mode", "what"),
    [
        (b"0123456789abcdef", 0o640, ".*mode 0640.*chmod 600"),
        (b"0123456789abcdef", 0o604, ".*mode 0604.*chmod 600"),
        (b" 0123456789abcde\n", 0o600, "15 bytes, 16 to 4096.*openssl rand"),
        (b"x" * (MAX_TOKEN_BYTES + 10), 0o600, "4097 bytes, 16 to 4096"),
    ],
    ids=["group", "world", "short", "long"],
)
def test_a_file_that_will_not_do_is_refused_by_what_to_do(tmp_path: Path, content: bytes, mode: int, what: str) -> None:
    path = token_file(tmp_path, content, mode)
    with pytest.raises(ConfigError, match=f"peers.token_file: {path}: {what}") as caught:
        load_token(PeersConfig(token_file=path))
    assert content.decode().strip() not in caught.value.text


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="peers.token_file: .*/none: No such file"):
        load_token(PeersConfig(token_file=tmp_path / "none"))


def test_a_server_without_a_token_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert token_of_server(PeersConfig(), "worker") is None
    assert "peers.token_file is not set: whoever reaches a port of this worker" in caplog.text


def test_the_configuration_holds_a_path_and_a_token_shows_itself_nowhere(tmp_path: Path) -> None:
    path = token_file(tmp_path)
    config = load_config({"peers.token_file": str(path)})
    assert isinstance(config, KelpConfig) and "0123456789abcdef" not in config.model_dump_json()
    token = load_token(config.peers)
    assert f"{token}" == repr(token) == "PeerToken(hidden)"
    with pytest.raises(TypeError):
        pickle.dumps(token)


def test_a_tag_is_of_its_parts_in_their_order_and_for_its_purpose() -> None:
    tag = TOKEN.tag("a", b"12", b"3")
    assert TOKEN.is_tag(tag, "a", b"12", b"3")
    for purpose, parts in (("b", (b"12", b"3")), ("a", (b"1", b"23")), ("a", (b"3", b"12")), ("a", (b"123",))):
        assert not TOKEN.is_tag(tag, purpose, *parts)
    assert not OTHER.is_tag(tag, "a", b"12", b"3")


def test_a_sealed_document_is_opened_by_the_peer_that_it_is_for() -> None:
    sealed = seal(TOKEN, "p", SCOPE, b"body", b"beside")
    assert unseal(TOKEN, "p", SCOPE, sealed, b"beside") == b"body"
    assert proof_in(sealed) != proof_in(seal(TOKEN, "p", SCOPE, b"another", b"beside"))


@pytest.mark.parametrize(
    ("token", "purpose", "scope", "raw", "beside"),
    [
        (OTHER, "p", SCOPE, seal(TOKEN, "p", SCOPE, b"body"), b""),
        (TOKEN, "q", SCOPE, seal(TOKEN, "p", SCOPE, b"body"), b""),
        (TOKEN, "p", ("worker", "another"), seal(TOKEN, "p", SCOPE, b"body"), b""),
        (TOKEN, "p", SCOPE, seal(TOKEN, "p", SCOPE, b"body"), b"more"),
        (TOKEN, "p", SCOPE, seal(TOKEN, "p", SCOPE, b"body") + b"!", b""),
        (TOKEN, "p", SCOPE, b"body", b""),
        (TOKEN, "p", SCOPE, SEAL + b"short", b""),
        (None, "p", SCOPE, seal(TOKEN, "p", SCOPE, b"body"), b""),
    ],
    ids=["token", "purpose", "incarnation", "beside", "changed", "unsealed", "cut", "no token here"],
)
def test_a_document_that_proves_nothing_is_refused(
    token: PeerToken | None, purpose: str, scope: tuple[str, ...], raw: bytes, beside: bytes
) -> None:
    with pytest.raises(PeerRefused, match="peers.token_file"):
        unseal(token, purpose, scope, raw, beside)


def test_without_a_token_documents_travel_as_they_are() -> None:
    assert unseal(None, "p", SCOPE, seal(None, "p", SCOPE, b"body")) == b"body"
