from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kelp.core.errors import ConfigError
from kelp.supervisor.triton import (
    STUB,
    TritonInstall,
    check_stub,
    find_system_triton,
    lay_out_wheel,
    link_python_backend,
    write_wrapper,
)

_MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"


def _write(path: Path, content: str = "x", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)
    return path


def _wheel(site_packages: Path, *stub_versions: str) -> Path:
    root = site_packages / "pytriton" / "tritonserver"
    _write(root / "bin" / "tritonserver", mode=0o755)
    _write(root / "backends" / "python" / "libtriton_python.so", "library")
    _write(root / "backends" / "python" / "triton_python_backend_utils.py", "utils")
    for version in stub_versions:
        _write(root / "python_backend_stubs" / version / STUB, f"stub {version}", mode=0o755)
    return root


def _system(root: Path) -> Path:
    _write(root / "backends" / "python" / STUB, mode=0o755)
    _write(root / "TRITON_VERSION", "2.60.0\n")
    return _write(root / "bin" / "tritonserver", mode=0o755)


def _install(tmp_path: Path, *libraries: Path) -> TritonInstall:
    return TritonInstall(tmp_path / "bin" / "tritonserver", tmp_path / "backend", libraries, "1")


def test_a_tritonserver_on_the_path_is_found_with_its_backend_and_version(tmp_path: Path) -> None:
    binary = _system(tmp_path / "triton")
    found = find_system_triton(str(binary.parent), known=tmp_path / "none")
    assert found is not None
    assert found.binary == binary
    assert found.python_backend == tmp_path / "triton" / "backends" / "python"
    assert found.version == "2.60.0"


def test_the_usual_place_is_used_when_the_path_has_none(tmp_path: Path) -> None:
    binary = _system(tmp_path / "opt")
    found = find_system_triton(str(tmp_path / "empty"), known=binary)
    assert found is not None and found.binary == binary


def test_a_tritonserver_without_a_python_backend_is_passed_over(tmp_path: Path) -> None:
    binary = _write(tmp_path / "bin" / "tritonserver", mode=0o755)
    assert find_system_triton(str(binary.parent), known=tmp_path / "none") is None


def test_our_own_wrapper_is_never_mistaken_for_a_system_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = _system(tmp_path / "venv")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    assert find_system_triton(str(binary.parent), known=tmp_path / "none") is None


def test_the_wheel_is_laid_out_with_the_stub_of_this_interpreter(tmp_path: Path) -> None:
    root = _wheel(tmp_path / "site", "3.9", _MINOR)
    install = lay_out_wheel(tmp_path / "site", "0.7.0", tmp_path / "cache")
    assert install.binary == root / "bin" / "tritonserver"
    assert install.python_backend == tmp_path / "cache" / f"0.7.0-py{_MINOR}" / "backends" / "python"
    assert {path.name: path.read_text() for path in install.python_backend.iterdir()} == {
        STUB: f"stub {_MINOR}",
        "libtriton_python.so": "library",
        "triton_python_backend_utils.py": "utils",
    }
    assert os.access(install.python_backend / STUB, os.X_OK)
    assert install.library_path[0] == tmp_path / "site" / "nvidia_pytriton.libs"


def test_laying_out_again_keeps_what_is_there(tmp_path: Path) -> None:
    _wheel(tmp_path / "site", _MINOR)
    first = lay_out_wheel(tmp_path / "site", "0.7.0", tmp_path / "cache")
    inode = (first.python_backend / STUB).stat().st_ino
    second = lay_out_wheel(tmp_path / "site", "0.7.0", tmp_path / "cache")
    assert second == first
    assert (second.python_backend / STUB).stat().st_ino == inode


def test_a_truncated_layout_is_replaced_and_leaves_nothing_behind(tmp_path: Path) -> None:
    _wheel(tmp_path / "site", _MINOR)
    install = lay_out_wheel(tmp_path / "site", "0.7.0", tmp_path / "cache")
    (install.python_backend / STUB).write_text("")
    lay_out_wheel(tmp_path / "site", "0.7.0", tmp_path / "cache")
    assert (install.python_backend / STUB).read_text() == f"stub {_MINOR}"
    assert [path.name for path in install.python_backend.parent.iterdir()] == ["python"]


def test_a_wheel_without_a_stub_for_this_interpreter_is_refused_by_version(tmp_path: Path) -> None:
    _wheel(tmp_path / "site", "3.8", "3.9")
    with pytest.raises(ConfigError, match=rf"python {_MINOR}: .* 3\.8, 3\.9 only"):
        lay_out_wheel(tmp_path / "site", "0.7.0", tmp_path / "cache")


def test_a_missing_libpython_names_the_debian_package() -> None:
    linked = "\tlibpython3.11.so.1.0 => not found\n\tlibc.so.6 => /lib/libc.so.6 (0x0)\n"
    with pytest.raises(ConfigError, match=r"apt-get install libpython3\.11 "):
        check_stub(linked, "3.11")


def test_a_stub_for_another_python_names_the_python_to_use() -> None:
    linked = "\tlibpython3.12.so.1.0 => /usr/lib/libpython3.12.so.1.0 (0x0)\n"
    with pytest.raises(ConfigError, match=r"PYTHON=python3\.12"):
        check_stub(linked, "3.11")


def test_any_other_missing_library_is_named() -> None:
    linked = "\tlibpython3.11.so.1.0 => /lib/libpython3.11.so.1.0 (0x0)\n\tlibcudart.so.12 => not found\n"
    with pytest.raises(ConfigError, match=r"libcudart\.so\.12"):
        check_stub(linked, "3.11")


def test_the_environment_puts_our_libraries_and_interpreter_first(tmp_path: Path) -> None:
    install = _install(tmp_path, tmp_path / "libs")
    environment = install.environment({"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/other", "LANG": "C"})
    assert environment == {
        "PATH": f"{sys.prefix}/bin:/usr/bin",
        "LD_LIBRARY_PATH": f"{tmp_path}/libs:/other",
        "LANG": "C",
    }


def test_the_environment_gets_no_empty_path_entries(tmp_path: Path) -> None:
    assert _install(tmp_path).environment({}) == {"PATH": f"{sys.prefix}/bin"}


def test_the_backend_link_is_made_and_follows_a_changed_install(tmp_path: Path) -> None:
    backends = tmp_path / "backends"
    backends.mkdir()
    link_python_backend(_install(tmp_path / "old"), backends)
    link_python_backend(_install(tmp_path / "new"), backends)
    assert (backends / "python").readlink() == tmp_path / "new" / "backend"


def test_a_real_folder_in_the_place_of_the_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "python").mkdir()
    with pytest.raises(ConfigError, match="is not a link"):
        link_python_backend(_install(tmp_path), tmp_path)
    assert (tmp_path / "python").is_dir()


def test_the_wrapper_passes_arguments_on_and_finds_our_libraries_first(tmp_path: Path) -> None:
    script = '#!/bin/sh\necho "$LD_LIBRARY_PATH" "$PATH" "$#" "$1"\n'
    binary = _write(tmp_path / "with space" / "tritonserver", script, mode=0o755)
    install = TritonInstall(binary, tmp_path, (tmp_path / "a", tmp_path / "b"), "1")
    wrapper = write_wrapper(install, tmp_path)
    environment = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": "/other"}
    shown = subprocess.check_output([wrapper, "--model repository=x"], env=environment, text=True)
    assert shown == f"{tmp_path}/a:{tmp_path}/b:/other {sys.prefix}/bin:/usr/bin:/bin 1 --model repository=x\n"
