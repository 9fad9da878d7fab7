#!/usr/bin/env bash
# Fuzzes every parser that faces a client or a peer for FUZZ_MINUTES (10; 0: not at all), then repeats the tests that
# run real servers until SOAK_MINUTES (60) have passed; stops at the first finding or failure, or when a round leaves
# shared-memory segments behind. Prints one line per family of parsers and per round.
set -euo pipefail
cd "$(dirname "$0")/.."

MINUTES=${SOAK_MINUTES:-60}
LOG=$PWD/perf/results/soak.log
mkdir -p "$(dirname "$LOG")"

[ "${FUZZ_MINUTES:-10}" = 0 ] || scripts/fuzz.sh

segments() { find /dev/shm -maxdepth 1 -name 'kelp*' | wc -l; }

before=$(segments)
end=$((SECONDS + MINUTES * 60))
round=0
while [ "$SECONDS" -lt "$end" ]; do
    round=$((round + 1))
    started=$SECONDS
    .venv/bin/python -m pytest -q -x tests/e2e tests/faults --kv-kills 100 --soak --timeout 3600 "$@" >"$LOG" 2>&1 || {
        tail -40 "$LOG"
        echo "soak: round $round failed after $((SECONDS - started)) s (all of it: $LOG)" >&2
        exit 1
    }
    after=$(segments)
    echo "soak: round $round: $(tail -1 "$LOG"); $after shared-memory segments of kelp ($before at the start)"
    [ "$after" -le "$before" ] || { echo "soak: error: shared memory leaked" >&2; exit 1; }
done
echo "soak: $round rounds in $MINUTES minutes without a failure"
