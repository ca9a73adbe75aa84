#!/usr/bin/env bash
# The RDMA link in virtual machines (tests/src/vm): what `make test-rdma` runs, and the last step of `make test`.
#
# COSTANDBY_SKIP_VM=1 leaves it out, and says so.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "${COSTANDBY_SKIP_VM:-}" = 1 ]; then
    echo "SKIPPED: RDMA in virtual machines, for COSTANDBY_SKIP_VM is set"
    exit 0
fi
if [ "$(uname -m)" != x86_64 ]; then
    echo "SKIPPED: RDMA in virtual machines, for their kernel is an x86-64 one and this is $(uname -m)"
    exit 0
fi
cargo build --quiet --locked --workspace --bins
exec "${CARGO_TARGET_DIR:-target}/debug/costandby-vm" test "$@"
