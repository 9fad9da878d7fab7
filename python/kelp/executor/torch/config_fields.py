"""Typed access to the fields of a Hugging Face `config.json`; whatever is not as expected is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kelp.core.errors import ConfigError


class ConfigFields:
    """One JSON object of a config."""

    def __init__(self, document: Mapping[str, Any], prefix: str = "") -> None:
        """Args: `prefix` stands before the field in messages, such as `rope_scaling.`."""
        self._document = document
        self._prefix = prefix

    def __contains__(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self._document.get(field) is not None

    def get(self, field: str, default: Any = None) -> Any:
        """The value as it stands; null counts as missing."""
        value = self._document.get(field)
        return default if value is None else value

    def is_null(self, field: str) -> bool:
        """Whether the field is there as null, which some families tell from a missing one."""
        return field in self._document and self._document[field] is None

    def positive_int(self, field: str, default: int | None = None) -> int:
        """Raises: `ConfigError` if neither the field nor the default is a positive integer."""
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.refusal(field, "is not a positive integer")
        return value

    def non_negative_int(self, field: str, default: int) -> int:
        """Raises: `ConfigError` if the field is neither 0 nor a positive integer."""
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.refusal(field, "is neither 0 nor a positive integer")
        return value

    def positive_number(self, field: str, default: float | None = None) -> float:
        """Raises: `ConfigError` if neither the field nor the default is a positive number."""
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.refusal(field, "is not a positive number")
        return float(value)

    def flag(self, field: str, default: bool = False) -> bool:
        """Raises: `ConfigError` if the field is neither true nor false."""
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise self.refusal(field, "is neither true nor false")
        return value

    def nested(self, field: str) -> ConfigFields | None:
        """An object inside this one; None if missing or empty.

        Raises:
            ConfigError: The field is something else.
        """
        value = self.get(field)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(field, "is not an object")
        return ConfigFields(value, f"{self._prefix}{field}.") if value else None

    def refuse_when_set(self, *fields: str) -> None:
        """Raises: `ConfigError` for the first of `fields` that is neither missing nor null, false, 0 or empty."""
        for field in fields:
            if self._document.get(field):
                raise self.refusal(field, "is not supported")

    def refuse_unless(self, field: str, only: Any) -> None:
        """Raises: `ConfigError` if the field is set to anything but `only`."""
        if self.get(field, only) != only:
            raise self.refusal(field, f"is not supported, only {only!r}")

    def refuse_unknown(self, *known: str) -> None:
        """Raises: `ConfigError` for the first field that is not one of `known`."""
        for field in self._document:
            if field not in known:
                raise self.refusal(field, f"is not supported, only {', '.join(known)}")

    def refusal(self, field: str, reason: str) -> ConfigError:
        """The error that names field and value."""
        return ConfigError(f"{self._prefix}{field}: {self._document.get(field)!r} {reason}")
