"""How many examples a property gets: as many as it says, or more by the profile (`tests/conftest.py`)."""

from __future__ import annotations

from hypothesis import settings

_USUAL = 100


def examples(usual: int) -> int:
    """So many by default; with `--hypothesis-profile=soak`, as many times more as that profile has."""
    return usual * settings().max_examples // _USUAL
