#!/usr/bin/env bash
# The RDMA link in virtual machines (tests/src/vm): what `make test-rdma` runs, and the last step of `make test`.
#
# COSTANDBY_SKIP_VM=1 leaves it out, and says so.
set -euo pipefail
cd "$(dirname "$0")/../.."
skip() {
    echo "SKIPPED: RDMA in virtual machines: $1"
    [ -z "${COSTANDBY_SKIPPED_LOG:-}" ] || echo "RDMA in virtual machines: $1" >>"$COSTANDBY_SKIPPED_LOG"
    exit 0
}
if [ "${COSTANDBY_SKIP_VM:-}" = 1 ]; then skip "COSTANDBY_SKIP_VM is set"; fi
if [ "$(uname -m)" != x86_64 ]; then skip "their kernel is an x86-64 one and this is $(uname -m)"; fi
# With the tests, which it runs: without them, what both depend on would be built with other features, and so twice.
cargo build --quiet --locked --workspace --bins --tests
exec "${CARGO_TARGET_DIR:-target}/debug/costandby-vm" test "$@"
