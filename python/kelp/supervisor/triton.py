"""Finds a tritonserver and lays it out so that kelp's backends run in it with this interpreter.

A system installation wins (a container's, a package's); otherwise the one inside the `nvidia-pytriton` wheel is used:
its Python backend is copied into the cache beside the one stub that fits this interpreter, because Triton expects the
two in one folder. Knows nothing of models, ports or processes.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kelp.core.config import default_cache_folder
from kelp.core.errors import ConfigError, KelpError

WHEEL = "nvidia-pytriton"
STUB = "triton_python_backend_stub"
SYSTEM_BINARY = Path("/opt/tritonserver/bin/tritonserver")

_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")
_LIBPYTHON = re.compile(r"libpython(3\.\d+)\.so")
_NOT_FOUND = re.compile(r"^\s*(\S+) => not found", re.MULTILINE)


def _minor_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class TritonInstall:
    """One usable tritonserver.

    Attributes:
        binary: The executable itself, not a wrapper.
        python_backend: Folder with the Python backend's library, its stub and its Python module.
        library_path: Folders that must precede the others on LD_LIBRARY_PATH.
        version: For people: `2.51.0`, or `nvidia-pytriton 0.7.0`.
    """

    binary: Path
    python_backend: Path
    library_path: tuple[Path, ...]
    version: str

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Environment for the server: `base` with its libraries, and this interpreter's `python3`, found first."""
        libraries = [*map(str, self.library_path), *filter(None, [base.get("LD_LIBRARY_PATH")])]
        programs = [str(_scripts_folder()), *filter(None, [base.get("PATH")])]
        added = {"PATH": os.pathsep.join(programs)}
        if libraries:
            added["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
        return {**base, **added}


def _scripts_folder() -> Path:
    return Path(sys.prefix) / "bin"


def _interpreter_library_folder() -> Path | None:
    """Where this interpreter keeps its own libpython, if it was built with one."""
    folder = Path(str(sysconfig.get_config_var("LIBDIR")))
    return folder if (folder / f"libpython{_minor_version()}.so.1.0").is_file() else None


def _library_path(*folders: Path) -> tuple[Path, ...]:
    own = _interpreter_library_folder()
    return (*folders, own) if own else folders


def find_system_triton(search_path: str, known: Path = SYSTEM_BINARY) -> TritonInstall | None:
    """A tritonserver that the machine brings, with its Python backend; None without one.

    Args:
        search_path: The PATH to look in. This environment's own folder is skipped: it holds our wrapper.
        known: Looked at after `search_path`.
    """
    folders = [folder for folder in search_path.split(os.pathsep) if folder and Path(folder) != _scripts_folder()]
    on_path = shutil.which("tritonserver", path=os.pathsep.join(folders)) if folders else None
    for candidate in [Path(on_path)] if on_path else [known]:
        root = candidate.resolve().parent.parent
        backend = root / "backends" / "python"
        if os.access(candidate, os.X_OK) and (backend / STUB).is_file():
            version_file = root / "TRITON_VERSION"
            version = version_file.read_text().strip() if version_file.is_file() else "system"
            return TritonInstall(candidate.resolve(), backend, _library_path(), version)
    return None


def _is_same(source: Path, copy: Path) -> bool:
    return copy.is_file() and copy.stat().st_size == source.stat().st_size


def _lay_out(sources: list[Path], target: Path) -> None:
    """Copy files into a new folder that appears at once and complete."""
    if all(_is_same(source, target / source.name) for source in sources):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as work:
        fresh = Path(work) / "fresh"
        fresh.mkdir()
        for source in sources:
            shutil.copy2(source, fresh / source.name)
        if target.exists():
            target.rename(Path(work) / "outdated")
        fresh.rename(target)


def lay_out_wheel(site_packages: Path, wheel_version: str, cache: Path) -> TritonInstall:
    """Make the wheel's tritonserver usable by this interpreter.

    Args:
        site_packages: Folder that holds `pytriton` and `nvidia_pytriton.libs`.
        wheel_version: Keys the cache, which several environments may share.
        cache: Layouts are kept below it.

    Raises:
        ConfigError: The wheel has no stub for this interpreter, or the cache cannot be written.
    """
    root = site_packages / "pytriton" / "tritonserver"
    stub = root / "python_backend_stubs" / _minor_version() / STUB
    if not stub.is_file():
        found = sorted(folder.name for folder in stub.parent.parent.glob("*"))
        raise ConfigError(
            f"python {_minor_version()}: {WHEEL} {wheel_version} has stubs for {', '.join(found) or 'none'} only"
        )
    target = cache / f"{wheel_version}-py{_minor_version()}" / "backends" / "python"
    try:
        _lay_out([stub, *(root / "backends" / "python" / name for name in _BACKEND_FILES)], target)
    except OSError as error:
        raise ConfigError(f"cannot lay out Triton's Python backend in {target}: {error.strerror}") from None
    library_path = _library_path(site_packages / "nvidia_pytriton.libs")
    return TritonInstall(root / "bin" / "tritonserver", target, library_path, f"{WHEEL} {wheel_version}")


def check_stub(linked: str, minor_version: str) -> None:
    """Refuse a stub that cannot run.

    Args:
        linked: What `ldd` prints for the stub in the server's environment.
        minor_version: `3.X` of the interpreter that has kelp installed.

    Raises:
        ConfigError: The stub is for another Python, or a library is missing; says how to get it.
    """
    wanted = _LIBPYTHON.search(linked)
    if wanted and wanted.group(1) != minor_version:
        raise ConfigError(
            f"Triton's Python stub is built for Python {wanted.group(1)}, this environment has {minor_version}: "
            f"remove .venv and run `make setup PYTHON=python{wanted.group(1)}`"
        )
    missing = _NOT_FOUND.findall(linked)
    if wanted and any(name.startswith("libpython") for name in missing):
        raise ConfigError(
            f"libpython{minor_version}.so.1.0, which Triton's Python stub needs, is not installed: "
            f"apt-get install libpython{minor_version} (Debian, Ubuntu)"
        )
    if missing:
        raise ConfigError(f"Triton's Python stub lacks the libraries {', '.join(missing)}")


def find_triton() -> TritonInstall:
    """The tritonserver to use, laid out and checked. Idempotent.

    Raises:
        ConfigError: None is installed, or its Python stub cannot run with this interpreter; says what to do.
    """
    install = find_system_triton(os.environ.get("PATH", ""))
    if install is None:
        try:
            wheel = importlib.metadata.distribution(WHEEL)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(
                f"no tritonserver on PATH, in {SYSTEM_BINARY.parent} or in this environment: run `make setup`"
            ) from None
        install = lay_out_wheel(Path(str(wheel.locate_file(""))), wheel.version, default_cache_folder() / "triton")
    stub = install.python_backend / STUB
    environment = install.environment(os.environ)
    linked = subprocess.run(["ldd", str(stub)], env=environment, capture_output=True, text=True, check=False)
    check_stub(linked.stdout, _minor_version())
    return install


def link_python_backend(install: TritonInstall, backends: Path) -> None:
    """Point `backends/python` at the install's Python backend, so that `--backend-directory` finds it.

    Raises:
        ConfigError: Something that is not a link stands there.
    """
    link = backends / "python"
    if link.is_symlink():
        if link.readlink() == install.python_backend:
            return
        link.unlink()
    elif link.exists():
        raise ConfigError(f"{link}: is not a link to Triton's Python backend; move it away")
    link.symlink_to(install.python_backend)


def write_wrapper(install: TritonInstall, folder: Path) -> Path:
    """Write `tritonserver` into a folder: the binary with its libraries and this interpreter found first."""
    libraries = os.pathsep.join(map(str, install.library_path))
    lines = [
        "#!/bin/sh",
        "# Written by `make setup` (kelp.supervisor.triton).",
        f"export PATH={shlex.quote(str(_scripts_folder()))}${{PATH:+:$PATH}}",
        f'exec {shlex.quote(str(install.binary))} "$@"',
    ]
    if libraries:
        lines.insert(3, f"export LD_LIBRARY_PATH={shlex.quote(libraries)}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}")
    wrapper = folder / "tritonserver"
    wrapper.write_text("\n".join(lines) + "\n")
    wrapper.chmod(0o755)
    return wrapper


def main() -> int:
    """Entry point of `python -m kelp.supervisor.triton REPOSITORY_ROOT`; prints what was found."""
    try:
        install = find_triton()
        link_python_backend(install, Path(sys.argv[1]).resolve() / "backends")
        wrapper = write_wrapper(install, _scripts_folder())
    except KelpError as error:
        print(f"error: {error.text}", file=sys.stderr)
        return 1
    print(f"tritonserver: {install.version} ({install.binary}), wrapper {wrapper}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
