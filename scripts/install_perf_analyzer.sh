#!/usr/bin/env bash
# Installs NVIDIA's perf_analyzer as .venv/bin/perf_analyzer. Its wheel needs glibc 2.38; on an older system the
# C library of Debian trixie is unpacked beside it (never installed), and the program is started with that.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=2.60.0
VENV=$PWD/.venv
HOME_DIR=${XDG_CACHE_HOME:-$HOME/.cache}/kelp/perf_analyzer/$VERSION
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

say() { printf '%s\n' "perf_analyzer: $*"; }
die() { printf '%s\n' "perf_analyzer: error: $*" >&2; exit 1; }

fetch_program() {
    say "fetching the wheel (about 10 MB)"
    "$VENV/bin/python" -m pip download --quiet --no-deps --only-binary=:all: --platform manylinux_2_38_x86_64 \
        --dest "$1" "perf-analyzer==$VERSION" >"$1/pip.log" 2>&1 ||
        die "pip download perf-analyzer==$VERSION failed: $(grep ERROR "$1/pip.log" | tail -1)"
    "$VENV/bin/python" -m zipfile -e "$1"/*.whl "$1/whl"
    chmod +x "$1/whl/perf_analyzer/bin/perf_analyzer"
}

# apt reads only the one source given here and keeps all its state below $1.
fetch_libc() {
    [ -f "$KEYRING" ] || die "$KEYRING is missing: apt-get install debian-archive-keyring"
    say "fetching Debian trixie's C library (about 4 MB, plus its package list)"
    mkdir -p "$1"/{state/lists/partial,cache/archives/partial,etc,debs}
    echo "deb [signed-by=$KEYRING] http://deb.debian.org/debian trixie main" >"$1/etc/sources.list"
    local options=(
        -o Dir::State="$1/state" -o Dir::Cache="$1/cache" -o Dir::Etc::sourcelist="$1/etc/sources.list"
        -o Dir::Etc::sourceparts=/dev/null -o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none
    )
    apt-get "${options[@]}" -qq update >"$1/apt.log" 2>&1 || die "apt-get update failed, see $1/apt.log"
    (cd "$1/debs" && apt-get "${options[@]}" -qq download libc6 libstdc++6 libgcc-s1 >>"$1/apt.log" 2>&1) ||
        die "apt-get download failed, see $1/apt.log"
    local package
    for package in "$1"/debs/*.deb; do dpkg -x "$package" "$1/root"; done
    rm -rf "${1:?}"/{state,cache,debs,etc}
}

has_new_glibc() {
    local version
    version=$(getconf GNU_LIBC_VERSION | cut -d' ' -f2)
    [ "$(printf '%s\n' 2.38 "$version" | sort -V | head -1)" = 2.38 ]
}

[ "$(uname -m)" = x86_64 ] || die "the wheel exists for x86_64 only, this is $(uname -m)"
if [ ! -d "$HOME_DIR" ]; then
    work=$HOME_DIR.tmp-$$
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work"
    fetch_program "$work"
    has_new_glibc || fetch_libc "$work"
    mv "$work" "$HOME_DIR"
fi

program=$HOME_DIR/whl/perf_analyzer/bin/perf_analyzer
libraries=$HOME_DIR/root/usr/lib/x86_64-linux-gnu
start=("$program")
if [ -d "$libraries" ]; then
    start=("$libraries/ld-linux-x86-64.so.2" --library-path "$libraries:/usr/lib/x86_64-linux-gnu" "$program")
fi
{
    echo '#!/bin/sh'
    echo "# Written by 'make perf-analyzer'."
    printf 'exec'
    printf ' "%s"' "${start[@]}"
    echo ' "$@"'
} >"$VENV/bin/perf_analyzer"
chmod +x "$VENV/bin/perf_analyzer"
"$VENV/bin/perf_analyzer" --version >/dev/null || die "the installed program does not start (see its message above)"
say "ready: $VENV/bin/perf_analyzer"
