from __future__ import annotations

from pathlib import Path

import pytest

from kelp.core.config_kv import DiskTierConfig
from kelp.core.errors import ConfigError
from kelp.kv.tiers.keys import load_key, open_sealer
from kelp.kv.tiers.sealing import Sealer
from support.tier_rig import BLOCK_BYTES, SPACE, content, name

KEY = bytes(range(32))
SEALER = Sealer(KEY, b"s" * 16)


def opened(sealer: Sealer, sealed: bytes, number: int) -> bytes | None:
    into = bytearray(BLOCK_BYTES)
    return bytes(into) if sealer.open(memoryview(sealed), name(number), memoryview(into)) else None


def test_what_was_sealed_is_opened() -> None:
    sealed = SEALER.seal(memoryview(content(1)), name(1))
    assert opened(SEALER, sealed, 1) == content(1)
    assert content(1)[:64] not in sealed


def test_the_same_block_is_never_sealed_the_same_way() -> None:
    first, second = (SEALER.seal(memoryview(content(1)), name(1)) for _ in range(2))
    assert first[:12] != second[:12] and first[28:] != second[28:]


def test_damage_another_name_space_or_key_is_noticed() -> None:
    sealed = SEALER.seal(memoryview(content(1)), name(1))
    for position in (0, 11, 12, 27, 28, len(sealed) - 1):
        damaged = bytearray(sealed)
        damaged[position] ^= 1
        assert opened(SEALER, bytes(damaged), 1) is None
    assert opened(SEALER, sealed, 2) is None
    assert opened(SEALER, sealed[:-1], 1) is None
    assert opened(SEALER, b"", 1) is None
    assert opened(Sealer(KEY, b"t" * 16), sealed, 1) is None
    assert opened(Sealer(KEY[::-1], b"s" * 16), sealed, 1) is None


def test_a_key_does_not_show() -> None:
    assert KEY.hex() not in repr(SEALER)
    assert SEALER.key_id.hex() in repr(SEALER)
    assert SEALER.key_id != Sealer(KEY[::-1], b"s" * 16).key_id


@pytest.mark.parametrize("raw", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"])
def test_a_key_file_holds_bytes_or_digits(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(raw)
    assert load_key(DiskTierConfig(key_file=file)) == KEY


def test_a_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KELP_TEST_KEY", KEY.hex())
    sealer = open_sealer(DiskTierConfig(key_variable="KELP_TEST_KEY"), SPACE, BLOCK_BYTES)
    assert sealer is not None and sealer.key_id == SEALER.key_id


def test_without_a_key_nothing_is_encrypted() -> None:
    assert load_key(DiskTierConfig()) is None
    assert open_sealer(DiskTierConfig(), SPACE, BLOCK_BYTES) is None


@pytest.mark.parametrize("raw", [b"", b"short", b"z" * 64, KEY.hex().encode()[:-1], KEY + KEY, b"0" * 128])
def test_a_bad_key_is_refused_without_showing_it(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(raw)
    with pytest.raises(ConfigError, match="disk_tier.key_file.*needs 32 bytes") as caught:
        load_key(DiskTierConfig(key_file=file))
    assert not raw or raw.decode() not in str(caught.value)


def test_a_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="disk_tier.key_file: .*No such file"):
        load_key(DiskTierConfig(key_file=tmp_path / "none"))
    with pytest.raises(ConfigError, match="disk_tier.key_variable: .*KELP_NO_SUCH"):
        load_key(DiskTierConfig(key_variable="KELP_NO_SUCH"))
    with pytest.raises(ConfigError, match="only one"):
        load_key(DiskTierConfig(key_file=tmp_path / "none", key_variable="KELP_NO_SUCH"))
