#!/usr/bin/env bash
# Creates .venv and everything `kelp serve` needs in it. Called by make; safe to repeat: finished steps cost nothing.
#
#   scripts/setup.sh           runtime: torch, kelp, Triton, NIXL, then Triton's layout and the model
#   scripts/setup.sh test      the same, then the test and development tools, without the model; Debian's etcd and
#                              faketime for tests where there is apt
#   scripts/setup.sh missing   prints the Debian packages that the chosen interpreter lacks, and does nothing
#
# Variables: PYTHON (interpreter), TORCH_INDEX (package index for torch), VENV_FLAGS (for `python -m venv`),
# MODEL (folder or GGUF file; empty is the default model).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-}
TORCH_INDEX=${TORCH_INDEX:-}
VENV_FLAGS=${VENV_FLAGS:-}
MODEL=${MODEL:-}
TORCH=torch==2.13.0
PYTRITON=nvidia-pytriton==0.7.0
NIXL_VERSION=1.5.1

VENV=$PWD/.venv
STAMPS=$VENV/.kelp
PY=$VENV/bin/python

say() { printf '%s\n' "setup: $*"; }
die() { printf '%s\n' "setup: error: $*" >&2; exit 1; }

# pip's own last error line is the reason worth showing; the rest goes to a log.
pip_install() {
    local log=$STAMPS/pip.log
    "$PY" -m pip install --quiet --disable-pip-version-check --progress-bar off "$@" >"$log" 2>&1 ||
        die "pip install $* failed: $(grep -E '^ *ERROR' "$log" | tail -1) (all of it: $log)"
}

# step NAME KEY COMMAND...: runs COMMAND unless it was done with the same KEY.
step() {
    local stamp=$STAMPS/$1 key=$2 started=$SECONDS
    shift 2
    [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && return
    "$@"
    printf '%s\n' "$key" >"$stamp"
    [ $((SECONDS - started)) -lt 2 ] || say "  done in $((SECONDS - started)) s"
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

# Debian and Ubuntu keep ensurepip, and the libpython that Triton's Python stub links, apart from the interpreter.
missing_packages() {
    "$1" - <<'EOF'
import ctypes, importlib.util, os, sys, sysconfig
version = "%d.%d" % sys.version_info[:2]
missing = [] if importlib.util.find_spec("ensurepip") else ["python%s-venv" % version]
name = "libpython%s.so.1.0" % version
own = os.path.join(str(sysconfig.get_config_var("LIBDIR")), name)
try:
    ctypes.CDLL(own if os.path.isfile(own) else name)
except OSError:
    missing.append("libpython%s" % version)
print(*missing)
EOF
}

# Built with profile-guided optimisation, as distributions, conda and the official images do and pyenv does only if asked:
# kelp's own code then takes a fifth less time. Distributions do not tell in CONFIG_ARGS.
is_optimised() {
    "$1" - <<'EOF'
import sys, sysconfig
sys.exit(not (sys.base_prefix == "/usr" or "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS"))))
EOF
}

# The first supported interpreter that lacks nothing, an optimised one before others; else the first supported one.
choose_python() {
    local candidate first= complete=
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10 /usr/bin/python3}; do
        is_supported "$candidate" || continue
        first=${first:-$candidate}
        [ -z "$(missing_packages "$candidate")" ] || continue
        complete=${complete:-$candidate}
        if is_optimised "$candidate"; then
            complete=$candidate
            break
        fi
    done
    first=${complete:-$first}
    [ -n "$first" ] || die "no Python 3.10, 3.11 or 3.12 found${PYTHON:+ in PYTHON=$PYTHON}:" \
        "apt-get install python3 python3-venv, or set PYTHON=<path>"
    printf '%s\n' "$first"
}

create_venv() {
    local python missing
    python=$(choose_python) || exit 1
    missing=$(missing_packages "$python")
    [ -z "$missing" ] || die "$python lacks parts: apt-get install $missing (or set PYTHON=<another one>)"
    say "creating .venv with $("$python" --version) ($(command -v "$python"))"
    is_optimised "$python" || say "  it was built without optimisations; one of your distribution, if it has any of these" \
        "versions, makes kelp's own code a fifth faster: PYTHON=<path>"
    # shellcheck disable=SC2086
    "$python" -m venv $VENV_FLAGS "$VENV" || die "$python -m venv $VENV failed"
}

has_system_triton() {
    local path binary
    path=$(printf '%s' "$PATH" | tr : '\n' | grep -vxF "$VENV/bin" | paste -sd:)
    binary=$(PATH=$path command -v tritonserver || echo /opt/tritonserver/bin/tritonserver)
    [ -x "$binary" ] &&
        [ -f "$(dirname "$(dirname "$(readlink -f "$binary")")")/backends/python/triton_python_backend_stub" ]
}

install_torch() {
    if "$PY" -c 'import torch' 2>/dev/null; then
        return
    fi
    say "torch: asking the index which build it offers"
    "$PY" scripts/torch_source.py "$TORCH" "$TORCH_INDEX"
    # shellcheck disable=SC2086
    pip_install ${TORCH_INDEX:+--index-url $TORCH_INDEX} "$TORCH"
}

install_kelp() {
    say "installing kelp and its libraries ${1:+and $1 (it brings tritonserver) }(about 100 MB, one minute)"
    pip_install 'setuptools>=70.1'
    # shellcheck disable=SC2086
    pip_install --no-build-isolation --editable . ${1:-}
}

# The `nixl` package depends on the builds for every CUDA version; one of them is enough, and on a CPU any works.
install_nixl() {
    say "installing NIXL (about 70 MB)"
    pip_install --no-deps "nixl==$NIXL_VERSION"
    local cuda
    cuda=$("$PY" -c 'from nixl_meta_utils import detect_cuda_major; print(detect_cuda_major() or 12)')
    pip_install --no-deps "nixl-cu$cuda==$NIXL_VERSION"
}

install_test_tools() {
    say "installing test and development tools (about 60 MB, one minute)"
    # shellcheck disable=SC2086
    pip_install --no-build-isolation --editable '.[test,dev]' ${1:-}
}

# Debian's etcd and faketime, unpacked beside the environment: nothing is installed, and no daemon is started.
unpack_test_servers() {
    local folder=$STAMPS/debian packages="" package
    { command -v etcd || [ -x "$folder/usr/bin/etcd" ]; } >/dev/null || packages="etcd-server"
    compgen -G "/usr/lib/*/faketime/libfaketimeMT.so.1" >/dev/null ||
        compgen -G "$folder/usr/lib/*/faketime/libfaketimeMT.so.1" >/dev/null || packages="$packages libfaketime"
    [ -n "$packages" ] || return 0
    mkdir -p "$folder"
    # shellcheck disable=SC2086
    if ! { fetch_packages "$folder" $packages ||
        { [ "$(id -u)" = 0 ] && apt-get -qq update && fetch_packages "$folder" $packages; }; } 2>/dev/null; then
        say "no Debian packages to be had: tests that need${packages:+ $packages} will be skipped"
        return 0
    fi
    for package in "$folder"/*.deb; do
        dpkg -x "$package" "$folder"
        rm "$package"
    done
}

fetch_packages() {
    local folder=$1
    shift
    command -v apt-get dpkg >/dev/null && (cd "$folder" && apt-get -qq -o APT::Sandbox::User=root download "$@")
}

main() {
    local wheel="" project python
    if [ "${1:-}" = missing ]; then
        python=$(choose_python) || exit 1
        missing_packages "$python"
        return
    fi
    "$PY" -c '' 2>/dev/null || create_venv
    is_supported "$PY" || die ".venv has an unsupported Python; remove .venv and repeat"
    mkdir -p "$STAMPS"
    has_system_triton || wheel=$PYTRITON
    project=$(sha256sum pyproject.toml | cut -d' ' -f1)
    step torch "$TORCH $TORCH_INDEX" install_torch
    step kelp "$project $wheel" install_kelp "$wheel"
    step nixl "$NIXL_VERSION" install_nixl
    if [ "${1:-}" = test ]; then
        step tests "$project $wheel" install_test_tools "$wheel"
        unpack_test_servers
    fi
    "$PY" -m kelp.supervisor.triton . >"$STAMPS/triton.log" || exit 1
    [ "${1:-}" = test ] || "$PY" -m kelp.supervisor.model ${MODEL:+"$MODEL"}
}

main "$@"
