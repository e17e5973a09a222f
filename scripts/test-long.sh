#!/usr/bin/env bash
# The long tier: hours. Real processes with the long counts, the simulator for an hour on new
# seeds, every fuzz target for ten minutes. Ends with a summary for docs/testing.md.
#
#   test-long.sh [STAGE...]     processes, simulator, fuzz (all)
#
# Environment: BALLAST_SIM_HOURS     how long to simulate (1)
#              BALLAST_FUZZ_SECONDS  how long to fuzz each target (600)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

logs=target/test-logs/long
sim_hours=${BALLAST_SIM_HOURS:-1}
fuzz_seconds=${BALLAST_FUZZ_SECONDS:-600}
stages=("$@")
((${#stages[@]})) || stages=(processes simulator fuzz)
summary=() failed=0
mkdir -p "$logs"
export CARGO_TERM_COLOR=never RUST_BACKTRACE=1

# stage NAME COMMAND...: a failed stage does not keep the others from running.
stage() {
    local name=$1 start=$SECONDS result=ok
    shift
    echo "== $name: $*"
    "$@" </dev/null >"$logs/$name.log" 2>&1 || { result=FAILED; failed=1; tail -n 60 "$logs/$name.log"; }
    echo "== $name: $((SECONDS - start)) s, $result"
    summary+=("$name: $result, $((SECONDS - start)) s, $logs/$name.log")
}

processes() {
    stage build cargo build --release --workspace --bins --locked
    stage processes env BALLAST_E2E_LONG=1 \
        cargo test --release -p ballast-e2e --locked -- --test-threads=1 --nocapture
    # What the tests measured: stalls and recovery times.
    grep -aE '(stall|ready after|resident).*[0-9]' "$logs/processes.log" || true
}

simulator() {
    stage sim-build cargo build --profile sim -p ballast-sim --bin simulate --locked
    # Other seeds than last time; a failed one prints the command that replays it.
    stage simulator target/sim/simulate --hours "$sim_hours" --jobs "$(nproc)" --first "$(date +%s)"
    stage million-steps target/sim/simulate --seed "$(date +%s)" --steps 1000000 --limit 7200
}

fuzz() {
    local target
    cargo fuzz --version >/dev/null 2>&1 || stage fuzz-tool cargo install --quiet --locked cargo-fuzz
    for target in $(cargo +nightly fuzz list); do
        stage "fuzz-$target" cargo +nightly fuzz run "$target" -- -max_total_time="$fuzz_seconds"
    done
}

scripts/install-test-tools.sh
for name in "${stages[@]}"; do "$name"; done
echo
echo "long tier of $(git rev-parse --short HEAD), $(date -u +%F), $(nproc) cores:"
printf '  %s\n' "${summary[@]}"
exit "$failed"
