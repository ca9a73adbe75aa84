#!/usr/bin/env bash
# What takes too long for each change: `make test-long`, on top of `make test`, before a release and after a change of
# what mirrors, recovers or connects. Takes some two hours on two cores. Goes on after a failure, and fails if a step did.
#
# Every seed is new, and printed where it finds something; COSTANDBY_TEST_SEED and COSTANDBY_LONG_SEED have one again.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=$PATH:/usr/sbin:/sbin
if [ "${CI:-}" = true ]; then
    export CARGO_TERM_PROGRESS_WHEN=never CARGO_TERM_COLOR=never NEXTEST_SHOW_PROGRESS=none
fi
target=${CARGO_TARGET_DIR:-target}
seed=${COSTANDBY_LONG_SEED:-$(date +%s)}
taken=()
failed=()

step() {
    local name=$1 start=$SECONDS outcome=ok
    shift
    echo "== $name"
    "$@" || { outcome=FAIL && failed+=("$name"); }
    taken+=("$(printf '%6d s  %-4s  %s' $((SECONDS - start)) "$outcome" "$name")")
}

# Each time with other seeds, for what chooses at random: kills, damage, property tests.
host_tests() {
    local round status=0
    for round in 1 2 3 4 5; do
        echo "round $round: COSTANDBY_TEST_SEED=$((seed + round))"
        COSTANDBY_TEST_SEED=$((seed + round)) COSTANDBY_SIM_SECONDS=1 cargo nextest run --locked --workspace || status=1
    done
    return "$status"
}

cargo build --quiet --locked --workspace --bins --tests
step "the simulator, new seeds for 20 minutes" "$target/debug/sim" --seeds "$seed..$((seed + 100000000))" --seconds 1200
step "planted bugs, each found by the simulator" tests/tools/planted-bugs.sh
step "fuzzing, 120 s a target" tests/fuzz/run.sh 120
step "tests, five times with other seeds" host_tests
step "RDMA, in virtual machines" env COSTANDBY_TEST_SEED="$seed" tests/tools/test-rdma.sh --long
step "the same over TCP" env COSTANDBY_TEST_SEED="$seed" tests/tools/test-rdma.sh --only clients,devices,demo,two-guests,power --link tcp

echo
printf '%s\n' "${taken[@]}"
printf '%6d s  in all, COSTANDBY_LONG_SEED=%s\n' "$SECONDS" "$seed"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
