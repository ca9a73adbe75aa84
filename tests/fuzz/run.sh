#!/usr/bin/env bash
# Builds the fuzz targets with the stable toolchain and runs each for a while.
#
#   tests/fuzz/run.sh [SECONDS [TARGET...]]      10 seconds each and all targets if not said otherwise
#
# No nightly and no cargo-fuzz: rustc's own coverage pass feeds libFuzzer. A --target is given so that the
# counters go into our code and not into build scripts, which have no libFuzzer to link with.
# Found inputs stay in tests/fuzz/artifacts/TARGET; run the printed binary with such a file to see it again.
set -euo pipefail
cd "$(dirname "$0")"

seconds=${1:-10}
shift || true
# Set outside, the target directory is relative to where the caller stood; cargo hands us an absolute one.
target_dir=${CARGO_TARGET_DIR:-$PWD/../../target}/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')

export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module \
 -Cllvm-args=-sanitizer-coverage-level=4 \
 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
 -Cllvm-args=-sanitizer-coverage-pc-table \
 -Cllvm-args=-sanitizer-coverage-trace-compares"
cargo build --quiet --locked --release --bins --target "$host" --target-dir "$target_dir"

if [ $# -eq 0 ]; then
    for source in src/bin/*.rs; do set -- "$@" "$(basename "$source" .rs)"; done
fi
fuzz() {
    local name=$1 binary=$target_dir/$host/release/$1 log=artifacts/$1/last.log runs
    mkdir -p "corpus/$name" "artifacts/$name"
    if ! "$binary" -max_total_time="$seconds" -use_value_profile=1 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
        -artifact_prefix="artifacts/$name/" "corpus/$name" "seeds/$name" >"$log" 2>&1; then
        tail -n 40 "$log"
        echo "fuzz: $name FAILED; its input is in tests/fuzz/artifacts/$name, to see it again: $binary THAT_FILE" >&2
        return 1
    fi
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    echo "fuzz: $name ${seconds} s, ${runs:-?} inputs, nothing found"
}

# One target a processor.
running=0
failed=0
for name in "$@"; do
    if [ "$running" -ge "$(nproc)" ]; then
        wait -n || failed=1
        running=$((running - 1))
    fi
    fuzz "$name" &
    running=$((running + 1))
done
while [ "$running" -gt 0 ]; do
    wait -n || failed=1
    running=$((running - 1))
done
exit "$failed"
