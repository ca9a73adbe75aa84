#!/usr/bin/env bash
# The README's two commands, taken from its text, on machines that have nothing but Rust, gcc and make.
#
#   tests/tools/test-fresh.sh [SUITE...]         bookworm (Debian 12) and trixie (Debian 13) if not said otherwise
#
# Each machine is a bare root made by mmdebstrap, entered by chroot in mount and process namespaces of its own. Into it go
# a clean clone of the committed HEAD, this machine's Rust toolchain (read-only), its cargo's and apt's settings, and the
# crates that are already here. There `make demo` runs from nothing, and `make test INSTALL_ONLY=1`: all that `make test`
# installs, each tool asked whether it answers, but none of its tests; cargo-nextest and cargo-deny come from here as
# well, for building them takes longer than all the rest.
#
# The bare roots stay in target/fresh as archives (`rm -r target/fresh` makes today's). The mirror is the Debian mirror of
# /etc/apt, or COSTANDBY_DEBIAN_MIRROR. Needs root, or a sudo that asks no password. COSTANDBY_SKIP_FRESH=1 leaves it out,
# and says so.
#
# Whatever ends this script, its processes end and its mounts are gone with their namespace; files that a SIGKILL left
# behind are removed by the next run.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=$PATH:/usr/sbin:/sbin
if [ "${COSTANDBY_SKIP_FRESH:-}" = 1 ]; then
    echo "SKIPPED: the README's commands on a fresh machine, for COSTANDBY_SKIP_FRESH is set"
    if [ -n "${COSTANDBY_SKIPPED_LOG:-}" ]; then
        echo "the README's commands on a fresh machine: COSTANDBY_SKIP_FRESH is set" >>"$COSTANDBY_SKIPPED_LOG"
    fi
    exit 0
fi
[ $# -gt 0 ] || set -- bookworm trixie
# What a first `make demo` may take on two processors before a warning, and before it counts as hanging.
cold_aim_s=180
cold_max_s=1800
store=${CARGO_TARGET_DIR:-$PWD/target}/fresh
mkdir -p "$store"
store=$(cd "$store" && pwd)

fail() {
    printf 'test-fresh: %s\n' "$@" >&2
    exit 1
}

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo -n)
    "${as_root[@]}" true 2>/dev/null || fail "this needs root, or a sudo that asks no password; COSTANDBY_SKIP_FRESH=1 leaves it out"
fi

# ---- Ending -----------------------------------------------------------------------------------------------------------

run=
child=

# Ends the machine that runs, which takes its processes and mounts along, and removes its files.
clean() {
    trap '' INT TERM HUP
    if [ -n "$run" ]; then
        [ ! -s "$run/pid" ] || "${as_root[@]}" kill -KILL "$(cat "$run/pid")" 2>/dev/null || true
        [ -z "$child" ] || wait "$child" 2>/dev/null || true
        "${as_root[@]}" rm -rf --one-file-system "$run"
        run=
    fi
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# What a run that was killed has left; one that goes on holds its lock.
for left in "$store"/run.*; do
    [ -d "$left" ] || continue
    if flock --nonblock "$left" true; then "${as_root[@]}" rm -rf --one-file-system "$left"; fi
done

# ---- The roots --------------------------------------------------------------------------------------------------------

mirror() {
    if [ -n "${COSTANDBY_DEBIAN_MIRROR:-}" ]; then
        echo "$COSTANDBY_DEBIAN_MIRROR"
        return
    fi
    # shellcheck disable=SC2016 # apt's own variables
    apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' "Created-By: Packages" |
        sed -n '/^Debian|Debian|/{s///p;q}' | grep .
}

# make_root SUITE: makes STORE/SUITE.tar unless it is there.
make_root() {
    local suite=$1 start=$SECONDS from
    [ ! -s "$store/$suite.tar" ] || return 0
    # Whose a mirror is stands in its lists, and a machine that has never updated has none.
    from=$(mirror) || { "${as_root[@]}" apt-get update -qq && from=$(mirror); } ||
        fail "apt knows no Debian mirror on this machine: name one in COSTANDBY_DEBIAN_MIRROR"
    # Proxies, credentials' places and the like, but none of what apt says of formats and lists.
    apt-config dump | grep -E '^Acquire::(http|https|ftp|Retries|Check-[A-Za-z-]*|ForceIPv[46])\b' >"$store/apt.conf" || true
    "${as_root[@]}" mmdebstrap --quiet --variant=minbase --include=ca-certificates,gcc,make --aptopt="$store/apt.conf" \
        "$suite" "$store/$suite.new.tar" "$from" >"$store/$suite.log" 2>&1 || {
        tail -n 20 "$store/$suite.log" >&2
        fail "mmdebstrap made no root of $suite, for the reason above: does the Debian mirror of /etc/apt answer, and does it have $suite?"
    }
    mv "$store/$suite.new.tar" "$store/$suite.tar"
    echo "made a bare root of $suite in $((SECONDS - start)) s"
}

# ---- What goes in -----------------------------------------------------------------------------------------------------

# copy FILE...: each that is there, to the same path in the root.
copy() {
    local file
    for file in "$@"; do
        [ -e "$file" ] || continue
        "${as_root[@]}" mkdir -p "$root$(dirname "$file")"
        "${as_root[@]}" cp -L "$file" "$root$file"
    done
}

# furnish SUITE: unpacks the root and puts in the clone, Rust's and cargo's parts, and what the network needs.
furnish() {
    "${as_root[@]}" mkdir "$root"
    "${as_root[@]}" tar -C "$root" -xf "$store/$1.tar" --numeric-owner
    "${as_root[@]}" chmod 755 "$root"
    git clone --quiet --no-hardlinks "$PWD" "$run/clone" || fail "there is no git repository here to clone"
    [ "$(git -C "$run/clone" rev-parse HEAD)" = "$(git rev-parse HEAD)" ] || fail "the clone has another HEAD than $PWD"
    "${as_root[@]}" cp -a --no-preserve=ownership "$run/clone" "$root/root/costandby"

    local cargo_home=${CARGO_HOME:-$HOME/.cargo} tool there name
    "${as_root[@]}" mkdir -p "$root/opt/rust" "$root/root/.cargo/bin" "$root/root/.cargo/registry"
    for tool in cargo rustc rustdoc rustfmt cargo-fmt cargo-clippy clippy-driver; do
        "${as_root[@]}" ln -s "/opt/rust/bin/$tool" "$root/root/.cargo/bin/$tool"
    done
    for tool in cargo-nextest cargo-deny; do
        if there=$(PATH=$cargo_home/bin:$PATH command -v "$tool"); then
            "${as_root[@]}" cp -L "$there" "$root/root/.cargo/bin/$tool"
        fi
    done
    for name in config.toml config registry/cache registry/index; do
        [ ! -e "$cargo_home/$name" ] || "${as_root[@]}" cp -rL "$cargo_home/$name" "$root/root/.cargo/$name"
    done

    copy /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt
    if [ -d /etc/apt/auth.conf.d ]; then copy /etc/apt/auth.conf /etc/apt/auth.conf.d/*; fi
    environment=(HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
    while IFS= read -r name; do
        environment+=("$name=${!name}")
        case $name in SSL_CERT_FILE | CURL_CA_BUNDLE | CARGO_HTTP_CAINFO) copy "${!name}" ;; esac
    done < <(compgen -e | grep -E '^((http|https|ftp|all|no)_proxy|(HTTP|HTTPS|FTP|ALL|NO)_PROXY|SSL_CERT_(FILE|DIR)|CURL_CA_BUNDLE|CARGO_(HTTP|NET|REGISTRIES|REGISTRY|SOURCE)_.*|CI)$' |
        grep -v TOKEN)
    # Nobody starts services in there.
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$root/usr/sbin/policy-rc.d" >/dev/null
    "${as_root[@]}" chmod 755 "$root/usr/sbin/policy-rc.d"
}

# ---- Inside -----------------------------------------------------------------------------------------------------------

# The first process in the namespaces: $1 is the root, $2 the toolchain, $3 the run's lock, the rest what runs in the root.
# shellcheck disable=SC2016 # for the shell in there
enter='
set -eu
root=$1 rust=$2
exec 9<"$3"
flock --shared 9
shift 3
mount --bind "$root" "$root"
mount --bind -o ro "$rust" "$root/opt/rust"
mount -o remount,bind,ro "$root/opt/rust"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sys "$root/sys"
mount -t tmpfs -o mode=755 dev "$root/dev"
for node in null zero full random urandom tty; do
    : >"$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=666 pts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for at in 0 1 2; do ln -s "fd/$at" "$root/dev/$(echo stdin stdout stderr | cut -d " " -f $((at + 1)))"; done
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
chroot "$root" "$@"
'

# Sets `processor_s`, the seconds of processor time that ended children of this shell have used. No subshell may ask.
ask_processor_s() {
    times >"$run/times"
    processor_s=$(awk 'NR == 2 { split($0, part, /[ms ]+/); print int(60 * (part[1] + part[3]) + part[2] + part[4]) }' "$run/times")
}

# inside COMMAND: runs it in the clone, in the machine; its status. `took_s` and `busy_s` are the time it took and the
# processor time in it.
inside() {
    local start=$SECONDS busy status=0 sysroot
    ask_processor_s
    busy=$processor_s
    sysroot=$(rustc --print sysroot)
    # shellcheck disable=SC2016
    "${as_root[@]}" sh -c 'echo $$ >"$1/pid"; shift; exec "$@"' sh "$run" \
        setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child \
        bash -c "$enter" enter "$root" "$sysroot" "$run" \
        env -i "${environment[@]}" timeout --kill-after=10 "$cold_max_s" sh -c "cd /root/costandby && $1" </dev/null &
    child=$!
    wait "$child" || status=$?
    child=
    rm -f "$run/pid"
    took_s=$((SECONDS - start))
    ask_processor_s
    busy_s=$((processor_s - busy))
    return "$status"
}

# ---- The README's commands --------------------------------------------------------------------------------------------

# readme_commands FILE: the commands of the first sh block below the heading "Try it".
readme_commands() {
    awk '
        /^## / { here = $0 == "## Try it" }
        here && /^```/ { if (inside) exit; inside = $0 == "```sh"; next }
        inside { sub(/ *#.*/, ""); if ($0 != "") print }' "$1"
}

try_suite() {
    local suite=$1 command processors demo='' tests=''
    run=$(mktemp -d "$store/run.XXXXXX")
    exec 8<"$run"
    flock --shared 8
    root=$run/root
    make_root "$suite"
    furnish "$suite"
    processors=$(nproc)
    while IFS= read -r command <&3; do
        case $command in
        "make demo")
            echo "-- $suite: $command"
            inside "$command" || fail "$suite: '$command' failed with status $? after $took_s s, in a clean clone on a bare root"
            echo "$suite: a first '$command' took $took_s s on $processors processors, with $busy_s s of processor time"
            if [ $((took_s * (processors < 2 ? processors : 2))) -gt $((cold_aim_s * 2)) ]; then
                echo "WARNING: $suite: that is more than the $cold_aim_s s that two processors with nothing else to do should need"
            fi
            demo=1
            ;;
        "make test")
            echo "-- $suite: $command INSTALL_ONLY=1"
            inside "$command INSTALL_ONLY=1" || fail "$suite: '$command INSTALL_ONLY=1' failed with status $? after $took_s s"
            # With all of it there, nothing is installed a second time.
            echo "$suite: what '$command' needs was installed in $took_s s"
            # With all of it there, nothing is installed a second time.
            inside "$command INSTALL_ONLY=1" >"$run/again" || fail "$suite: '$command INSTALL_ONLY=1' failed when all was installed"
            [ ! -s "$run/again" ] || fail "$suite: a second '$command INSTALL_ONLY=1' installs again: $(cat "$run/again")"
            tests=1
            ;;
        *) fail "the README's \"Try it\" has '$command', which this test does not know" ;;
        esac
    done 3< <(readme_commands "$run/clone/README.md")
    [ "$demo$tests" = 11 ] || fail "the README's \"Try it\" does not have both 'make demo' and 'make test'"
    exec 8<&-
    clean
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

git diff --quiet HEAD 2>/dev/null || echo "note: what is not committed is not in the clone"
for suite in "$@"; do try_suite "$suite"; done
