from __future__ import annotations

import sys

import pytest

from kelp.core.errors import ConfigError
from kelp.transport import open_agent


def test_a_missing_wheel_is_a_configuration_error_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in ("nixl", "nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}._api", None)
    with pytest.raises(ConfigError, match=r"pip install 'kelp\[nixl\]'"):
        open_agent("nixl", "decode")
