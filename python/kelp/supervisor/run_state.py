"""What a running `kelp serve` leaves on disk so that `kelp scale` finds it: one file per public gRPC port."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TypeVar

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from kelp.core.errors import ConfigError

_WANTED = "wanted.json"
ModelT = TypeVar("ModelT", bound=BaseModel)


class RunState(BaseModel):
    """One running `kelp serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    run_folder: Path
    is_isolated: bool
    num_prefill: int
    num_decode: int

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote this still runs."""
        return psutil.pid_exists(self.pid)


class WantedWorkers(BaseModel):
    """How many workers `kelp scale` wants of an isolated run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_prefill: int
    num_decode: int


def user_folder() -> Path:
    """Folder of everything that this user's runs write.

    Raises:
        ConfigError: It is somebody else's, who could change what is read there: its name is known to all.
    """
    folder = Path(tempfile.gettempdir()) / f"kelp-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{folder}: others may write there; remove it, or set TMPDIR to a folder of your own")
    return folder


def _state_path(grpc_port: int) -> Path:
    return user_folder() / f"run-{grpc_port}.json"


def write_state(grpc_port: int, state: RunState) -> None:
    """Publish the run."""
    _replace(_state_path(grpc_port), state)


def read_state(grpc_port: int) -> RunState | None:
    """The live run behind a public gRPC port, or None: then the server was started without `kelp serve`."""
    state = _read(_state_path(grpc_port), RunState)
    return state if state is not None and state.is_alive else None


def remove_state(grpc_port: int) -> None:
    """Forget the run."""
    _state_path(grpc_port).unlink(missing_ok=True)


def write_wanted(run_folder: Path, wanted: WantedWorkers) -> None:
    """Ask the run for other numbers of workers."""
    _replace(run_folder / _WANTED, wanted)


def read_wanted(run_folder: Path) -> WantedWorkers | None:
    """What was asked last, if anything."""
    return _read(run_folder / _WANTED, WantedWorkers)


def clear_wanted(run_folder: Path) -> None:
    """The run has done what was asked, or has said why it can not."""
    (run_folder / _WANTED).unlink(missing_ok=True)


def _replace(path: Path, document: BaseModel) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(document.model_dump_json())
    os.replace(temporary, path)


def _read(path: Path, model: type[ModelT]) -> ModelT | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
