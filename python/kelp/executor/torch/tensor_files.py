"""Named tensors of a folder's safetensors files, memory-mapped.

A tensor is a view of the page cache, so that workers of one host share what they need not convert. The mapped pages
of what was converted are given back on `release`; a view that is still in use merely faults its pages in again.
Knows the file format, not what the tensors mean.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kelp.core.errors import ConfigError

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor lies: bytes `[start, end)` of a mapped file."""

    memory: mmap.mmap
    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """All tensors of `model.safetensors`, or of the shards of `model.safetensors.index.json`."""

    def __init__(self, folder: Path) -> None:
        """Maps the files and reads their headers.

        Raises:
            ConfigError: A file is missing or damaged; names it, and the tensor that is cut off.
        """
        self._places: dict[str, _Place] = {}
        for name in _file_names(folder):
            self._places.update(_read_places(folder / name))
        self._used: dict[str, _Place] = {}

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(place.end - place.start for place in self._places.values())

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._places

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor as stored; a view, not to be written.

        Raises:
            ConfigError: It is missing, of another shape, or of a type that is not supported; names it.
        """
        place = self._places.get(name)
        if place is None:
            raise ConfigError(f"model.path: tensor {name} is missing")
        if place.shape != shape:
            raise ConfigError(f"model.path: tensor {name} is {list(place.shape)}, config.json says {list(shape)}")
        dtype = _DTYPES.get(place.dtype)
        if dtype is None:
            raise ConfigError(f"model.path: tensor {name} is {place.dtype}, only {', '.join(_DTYPES)} are supported")
        count = math.prod(shape)
        if place.end - place.start != count * dtype.itemsize:
            raise ConfigError(f"model.path: tensor {name} does not fill its {place.end - place.start} bytes")
        self._used[name] = place
        return torch.frombuffer(place.memory, dtype=dtype, count=count, offset=place.start).view(shape)

    def release(self) -> int:
        """Give back the mapped pages of all tensors got since the last call; returns their size in bytes."""
        for place in self._used.values():
            first = place.start - place.start % mmap.PAGESIZE
            place.memory.madvise(mmap.MADV_DONTNEED, first, place.end - first)
        num_bytes = sum(place.end - place.start for place in self._used.values())
        self._used.clear()
        return num_bytes


def _read_places(path: Path) -> dict[str, _Place]:
    """Source: https://huggingface.co/docs/safetensors, "Format"."""
    try:
        with path.open("rb") as file:
            # Private and writable because torch warns of read-only buffers; nobody writes.
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ConfigError(f"model.path: {path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"model.path: {path}: the file is empty") from None
    data = _LENGTH_BYTES + int.from_bytes(memory[:_LENGTH_BYTES], "little")
    try:
        header: dict[str, Any] = json.loads(memory[_LENGTH_BYTES:data])
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        places = {name: _place(memory, data, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"model.path: {path}: not a safetensors file") from None
    for name, place in places.items():
        if not data <= place.start < place.end <= len(memory):
            raise ConfigError(
                f"model.path: {path}: tensor {name} ends at byte {place.end}, the file at byte {len(memory)}"
            )
    return places


def _place(memory: mmap.mmap, data: int, entry: Mapping[str, Any]) -> _Place:
    start, end = entry["data_offsets"]
    return _Place(memory, data + int(start), data + int(end), str(entry["dtype"]), tuple(entry["shape"]))


def _file_names(folder: Path) -> list[str]:
    index = folder / _INDEX
    if not index.exists():
        return ["model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"model.path: {index}: no weight map: {error!r}") from None
    if any(Path(name).name != name for name in names):
        raise ConfigError(f"model.path: {index}: a shard lies outside the folder")
    return names
