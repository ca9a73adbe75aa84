#!/usr/bin/env bash
# Puts each deliberate bug of tests/src/sim/bugs, one after the other, into a copy of the sources, and asks whether the
# simulator notices within a minute. Fails when one is not noticed. With a name, tries only that one.
set -euo pipefail
cd "$(dirname "$0")/../.."
bugs=$PWD/tests/src/sim/bugs
seconds=${COSTANDBY_BUG_SECONDS:-60}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git ls-files -z | tar --null --files-from=- --create | tar --extract --directory="$scratch"
target=${CARGO_TARGET_DIR:-$PWD/target}/planted-bugs
missed=0
for patch in "$bugs"/${1:-*}.patch; do
    name=$(basename "$patch" .patch)
    (cd "$scratch" && git apply -C1 "$patch")
    if ! CARGO_TARGET_DIR=$target cargo build --quiet --locked --manifest-path "$scratch/Cargo.toml" \
        --package costandby-tests --bin sim 2>"$scratch/errors"; then
        cat "$scratch/errors"
        echo "$name does not compile any more: mend the patch"
        exit 1
    fi
    start=$SECONDS
    if found=$("$target/debug/sim" --seeds 1..1000000 --seconds "$seconds"); then
        printf 'MISSED  %-34s in %d s\n' "$name" $((SECONDS - start))
        missed=1
    else
        printf 'caught  %-34s in %2d s: %s\n' "$name" $((SECONDS - start)) \
            "$(sed -n 's/.*BROKEN RULE \([^:]*\):.*/\1/p' <<<"$found" | head -1)"
    fi
    (cd "$scratch" && git apply -C1 --reverse "$patch")
done
exit "$missed"
