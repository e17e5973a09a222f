#!/usr/bin/env bash
# All tests of the short tier, from a fresh clone: installs the tools, then runs the stages below
# one after another and stops at the first that fails. Ends with `N passed, N failed`.
#
#   test.sh [STAGE...]     only these stages (names as printed)
#
# Environment: BALLAST_TEST_LIMIT  seconds for everything together (4800)
#              BALLAST_SIM_SEEDS   how many fixed seeds to simulate (50)
#              BALLAST_SIM_SEED    an additional simulator seed (derived from the commit)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

limit=${BALLAST_TEST_LIMIT:-4800}
logs=target/test-logs
# Seeds of the simulator that are always the same: 0 and up.
fixed_seeds=${BALLAST_SIM_SEEDS:-50}
only=("$@")
passed=0 failed=0 current=
mkdir -p "$logs"
export CARGO_TERM_COLOR=never CARGO_TERM_PROGRESS_WHEN=never RUST_BACKTRACE=1

finish() {
    local rc=$?
    if ((rc)); then
        ((failed)) || failed=1
        echo "FAILED: ${current:-test.sh}, after ${SECONDS} s; its output is in $logs"
    fi
    echo "$passed passed, $failed failed"
}
trap finish EXIT

wanted() {
    local name
    ((${#only[@]})) || return 0
    for name in "${only[@]}"; do [[ $name != "$1" ]] || return 0; done
    return 1
}

# stage NAME COMMAND...
stage() {
    local name=$1 start=$SECONDS left=$((limit - SECONDS)) rc=0
    shift
    wanted "$name" || return 0
    current=$name
    echo "== $name: $*"
    ((left > 0)) || { echo "no time left of $limit s"; return 1; }
    timeout -k 10 "$left" "$@" </dev/null >"$logs/$name.log" 2>&1 || rc=$?
    show "$name" "$rc"
    ((rc != 124)) || echo "$name ran out of the $limit s for all stages"
    echo "== $name: $((SECONDS - start)) s, exit $rc"
    return "$rc"
}

# The end of a failed stage's output and then, last of all, because other programs may keep only the
# end of this one, which tests failed and why; of a good stage what cargo test counted.
show() {
    if (($2)); then
        tail -n 300 "$logs/$1.log"
        awk '/^ +(Running|Doc-tests)/ { name = $0 }
             /^test .* FAILED$/ { print name; print }
             /^thread .* panicked at/ { print; left = 4; next }
             left > 0 { print; left-- }' "$logs/$1.log" | tail -n 40
    else
        awk '/^ +(Running|Doc-tests)/ { name = $0 }
             /^test result:/ && ($4 || $6) { print name; print; name = "" }' "$logs/$1.log"
    fi
}

# A stage whose output holds `test result:` lines; one that ran no test has failed.
test_stage() {
    local rc=0 good bad
    wanted "$1" || return 0
    stage "$@" || rc=$?
    read -r good bad < <(awk '/^test result:/ { p += $4; f += $6 } END { print p + 0, f + 0 }' \
        "$logs/$1.log")
    passed=$((passed + good)) failed=$((failed + bad))
    ((rc == 0)) || return "$rc"
    ((good > 0)) || { echo "$1 executed no test"; return 1; }
}

# Whole simulated clusters: one line a seed; a failed one prints the command that replays it.
seeds_stage() {
    local name=$1 rc=0 good
    wanted "$name" || return 0
    shift
    stage "$name" target/debug/simulate "$@" || rc=$?
    good=$(grep -cE '^seed [0-9]+ (ok|passed)' "$logs/$name.log" || true)
    passed=$((passed + good))
    ((rc == 0)) || { grep -E 'FAILED|^replay' "$logs/$name.log" || true; return "$rc"; }
    ((good > 0)) || { echo "$name ran no seed"; return 1; }
}

# Builds programs and tests of the whole workspace and notes what tests there are: folder/target and
# executable. One command: any other selection would unify other features and build the dependencies
# again, and two would each wait for their slowest crates.
build_all() {
    cargo build --workspace --bins --tests --locked --message-format=json-render-diagnostics \
        >"$logs/built.json" || return
    jq -r 'select(.reason == "compiler-artifact" and .profile.test and .executable != null)
           | [(.manifest_path | split("/") | .[-2]) + "/" + .target.name, .executable] | @tsv' \
        "$logs/built.json" >"$logs/executables"
    [[ -s $logs/executables ]]
}
export -f build_all
export logs

# One test program, as cargo would run it: in its package's folder. Says all that it printed at once.
run_test() {
    local name=$1 executable=$2 said rc=0
    shift 2
    said=$(mktemp "$logs/said.XXXXXX")
    (cd "${name%/*}" && CARGO_MANIFEST_DIR=$PWD CARGO=$(command -v cargo) "$executable" "$@" </dev/null) \
        >"$said" 2>&1 || rc=1
    echo "     Running ${name%/*}: $(basename "$executable")"
    cat "$said"
    rm -f "$said"
    return "$rc"
}

# Runs the tests whose folder/target fits the pattern, so many programs at a time.
run_tests() {
    local at_once=$1 wanted=$2 name executable pid rc=0 pids=()
    shift 2
    while IFS=$'\t' read -r name executable; do
        # shellcheck disable=SC2053
        [[ $name == $wanted ]] || continue
        while (($(jobs -rp | wc -l) >= at_once)); do wait -n || true; done
        run_test "$name" "$executable" "$@" &
        pids+=("$!")
    done <"$logs/executables"
    for pid in "${pids[@]}"; do wait "$pid" || rc=1; done
    return "$rc"
}
export -f run_test run_tests

# run_stage NAME AT-ONCE PATTERN [ARGUMENTS OF THE TESTS...]
run_stage() {
    local name=$1
    shift
    # shellcheck disable=SC2016
    test_stage "$name" bash -c 'run_tests "$@"' run_tests "$@"
}

# A number below 2^32 that is the same for everybody who has this commit.
commit_seed() { printf '%d' "0x$(git rev-parse HEAD | cut -c 1-8)"; }

export BALLAST_SIM_SEED=${BALLAST_SIM_SEED:-$(commit_seed)}

stage tools scripts/install-test-tools.sh
stage format cargo fmt --all --check
test_stage tidy cargo test -p ballast-tidy
stage dependencies cargo deny check --hide-inclusion-graph bans licenses sources
stage clippy cargo clippy --workspace --all-targets --locked -- -D warnings
stage docs env RUSTDOCFLAGS='-D warnings' \
    cargo doc --workspace --no-deps --document-private-items --locked
stage built bash -c build_all
run_stage unit 1 '@(block|env|raft-store|volume|cluster|nbd|nvme-tcp|node|api|daemon|tools|csi-shim|benches)/*'
echo "simulator seed of this commit: BALLAST_SIM_SEED=$BALLAST_SIM_SEED"
run_stage simulator 1 'sim/*'
seeds_stage fixed-seeds --seeds "0..$fixed_seeds" --jobs 2
# Seeds that once failed; the commit that fixed each names it.
for seed in 50 77 238 450 1766000162; do
    seeds_stage "seed-$seed" --seed "$seed"
done
seeds_stage rot-seed --seed 5 --faults rot,kill-soon,cut-one-way,power-loss-of-all --every 300
seeds_stage commit-seed --seed "$BALLAST_SIM_SEED"
# These measure: each alone.
measuring='failover|memory|network|pause|postgres|shards|csi_life'
run_stage measured 1 "e2e/@($measuring)" --test-threads=1
# Much of their time these wait: two at a time.
run_stage processes 2 "e2e/!(vm|$measuring)" --test-threads=1
# With what it prints: the stalls that it measured.
run_stage kernel 1 e2e/vm --test-threads=1 --show-output
current=
