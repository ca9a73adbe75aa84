#!/usr/bin/env bash
# Everything a change must pass, cheapest first, each step with the time it took. Stops at the first failure.
#
# One profile (dev, with opt-level 1) and one set of features serve the build and the tests, so nothing is compiled twice:
# the integration tests find the `costandby` program where the build step has put it.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=$PATH:/usr/sbin:/sbin
if [ "${CI:-}" = true ]; then
    export CARGO_TERM_PROGRESS_WHEN=never CARGO_TERM_COLOR=never NEXTEST_SHOW_PROGRESS=none
fi
# Tests that were left out, a line each: nextest shows the output of those that fail only.
export COSTANDBY_SKIPPED_LOG
COSTANDBY_SKIPPED_LOG=$(mktemp)
trap 'rm -f "$COSTANDBY_SKIPPED_LOG"' EXIT
in_rig='make test-rdma` has it'
fuzz_seconds=${FUZZ_SECONDS:-10}
taken=()

step() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@"
    taken+=("$(printf '%6d s  %s' $((SECONDS - start)) "$name")")
}

# The database of known vulnerabilities lives on another host than the crates, and not every machine reaches it.
dependencies() {
    cargo deny --log-level error check licenses bans sources
    if timeout 60 cargo deny --log-level off fetch db >/dev/null 2>&1; then
        cargo deny --log-level error check advisories
    else
        echo "SKIPPED: advisories, for their database cannot be fetched from here"
        echo "advisories of dependencies: their database cannot be fetched from here" >>"$COSTANDBY_SKIPPED_LOG"
    fi
}

# Those that need what only the virtual machines have were run there, unless the machines were left out themselves.
show_skipped() {
    local here elsewhere=0
    here=$(sort "$COSTANDBY_SKIPPED_LOG")
    grep -q '^RDMA in virtual machines' <<<"$here" || elsewhere=$(grep -cF "$in_rig" <<<"$here" || true)
    if [ "$elsewhere" != 0 ]; then
        echo "$elsewhere tests need what this machine lacks, and were run in the virtual machines."
        here=$(grep -vF "$in_rig" <<<"$here" || true)
    fi
    if [ -n "$here" ]; then
        echo "$(wc -l <<<"$here") tests skipped:"
        sed 's/^/    /' <<<"$here"
    else
        echo "No test was skipped."
    fi
}

# The declarations of the RDMA libraries against their headers. The crate is no part of the workspace.
rdma_oracle() {
    local libclang features=()
    if libclang=$(tests/rdma-oracle/find-libclang.sh); then
        features=(--features rdma-sys)
        export LIBCLANG_PATH=$libclang
    else
        echo "SKIPPED: comparing RDMA declarations with rdma-sys, which needs a libclang of version 15 or older"
        echo "RDMA declarations against rdma-sys: no libclang of version 15 or older here" >>"$COSTANDBY_SKIPPED_LOG"
    fi
    CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/rdma-oracle cargo test --quiet --locked \
        --manifest-path tests/rdma-oracle/Cargo.toml "${features[@]}"
    unset LIBCLANG_PATH
}

documents() {
    RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --quiet --locked --workspace --no-deps
}

step "formatting" cargo fmt --all --check
step "formatting of the fuzz targets" cargo fmt --all --check --manifest-path tests/fuzz/Cargo.toml
step "formatting of the RDMA oracle" cargo fmt --all --check --manifest-path tests/rdma-oracle/Cargo.toml
step "licences, duplicates, sources, advisories" dependencies
step "clippy" cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
step "RDMA declarations against the headers" rdma_oracle
step "build, with all tests" cargo build --quiet --locked --workspace --bins --tests
step "fuzzing, ${fuzz_seconds} s a target" tests/fuzz/run.sh "$fuzz_seconds"
step "documentation" documents
step "tests" cargo nextest run --locked --workspace
step "the README's commands on fresh machines" tests/tools/test-fresh.sh
step "RDMA, in virtual machines" tests/tools/test-rdma.sh

echo
printf '%s\n' "${taken[@]}"
printf '%6d s  in all\n' "$SECONDS"
show_skipped
