#!/usr/bin/env bash
# Makes sure that what a target of the Makefile needs is on this machine, and installs what is not.
#
#   tests/tools/need.sh rust|build|test|vm|fresh...
#
# Rust comes first and is never installed from here: how to get it is said. All else are Debian packages, from apt, as root
# or through sudo that asks no password. Each tool is asked to do something (its version, mostly) rather than its package
# looked up, before and after installing: what counts is that it runs. Where nothing can be installed, what is missing
# is listed, on a system without apt by the names of that system, and nothing is done. With everything in place this
# takes about a second.
#
# Exit status: 0 all is here, 1 something is missing, 2 called wrongly. COSTANDBY_APT_WAIT is how many seconds another
# apt's lock is waited for (300).
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
workspace=$(cd "$(dirname "$0")/../.." && pwd)
lock_wait_s=${COSTANDBY_APT_WAIT:-300}

# fail LINE...: one thing that went wrong and what to do, a line each.
fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

# ---- Rust -------------------------------------------------------------------------------------------------------------

get_rust="Get it from https://rustup.rs (or, where rustup is installed: rustup toolchain install stable && rustup default stable)"

# older A B: version A comes before B.
older() {
    [ "$1" != "$2" ] && [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]
}

# version_of PROGRAM: what it says of its version in numbers, such as 1.88.0.
version_of() {
    "$1" --version 2>/dev/null </dev/null | grep -oE '[0-9]+\.[0-9]+(\.[0-9]+)?' | head -n 1
}

# An old cargo does not get as far as `rust-version`, it stumbles over the manifest's first newer word: compare before.
need_rust() {
    local wanted program path said version
    wanted=$(sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' "$workspace/Cargo.toml")
    for program in cargo rustc; do
        path=$(command -v "$program") ||
            fail "There is no $program here; costandby needs Rust $wanted or newer." "$get_rust, open a new shell and run this again."
        if ! said=$("$program" --version 2>&1 </dev/null); then
            case $said in
            *rustup*)
                fail "rustup has no $program to run: ${said%%$'\n'*}" \
                    "Choose a toolchain and run this again:  rustup default stable" ;;
            *) fail "$path does not run: ${said%%$'\n'*}" "$get_rust and run this again." ;;
            esac
        fi
        version=$(version_of "$program") ||
            fail "$path does not tell its version, it says: ${said%%$'\n'*}" "$get_rust and run this again."
        if older "$version" "$wanted"; then
            local rustups=${CARGO_HOME:-$HOME/.cargo}/bin/$program better
            if [ "$path" != "$rustups" ] && better=$(version_of "$rustups") && ! older "$better" "$wanted"; then
                fail "$path is $program $version; costandby needs Rust $wanted or newer." \
                    "$rustups is $better: put it first, with  export PATH=\"${rustups%/*}:\$PATH\"  and run this again."
            fi
            fail "$path is $program $version; costandby needs Rust $wanted or newer." "$get_rust, open a new shell and run this again."
        fi
    done
}

# need_component COMPONENT COMMAND...: rustup's minimal profile comes without these.
need_component() {
    local component=$1
    shift
    "$@" </dev/null >/dev/null 2>&1 && return 0
    if ! command -v rustup >/dev/null; then
        fail "'$*' does not run: install the $component of this Rust toolchain and run this again."
    fi
    rustup component add "$component" ||
        fail "rustup could not add $component, for the reason above: with a network, run  rustup component add $component  and this again."
    "$@" </dev/null >/dev/null || fail "'$*' does not run although rustup has added $component: is $(command -v cargo) rustup's?"
}

# need_cargo_tool SUBCOMMAND CRATE [OPTION...]: built for a short wait rather than for speed, since a run of ours keeps
# either tool busy for seconds. On two cores that halves the minutes.
need_cargo_tool() {
    local subcommand=$1 crate=$2 start=$SECONDS
    shift
    cargo "$subcommand" --version </dev/null >/dev/null 2>&1 && return 0
    echo "installing ${crate} with cargo (some minutes, once)"
    CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_OPT_LEVEL=0 \
        CARGO_PROFILE_RELEASE_DEBUG=false env -u CARGO_TARGET_DIR cargo install --locked --quiet "$@" ||
        fail "cargo could not install $crate, for the reason above: with a network and a current Rust, run  cargo install --locked $crate  and this again."
    cargo "$subcommand" --version </dev/null >/dev/null ||
        fail "'cargo $subcommand' does not run although $crate is installed, for the reason above."
    echo "installed ${crate} in $((SECONDS - start)) s"
}

# ---- What is needed ---------------------------------------------------------------------------------------------------

# packages[i] is missing unless the command checks[i] succeeds.
packages=()
checks=()

# need PACKAGE COMMAND...: the command's words hold no blanks.
need() {
    packages+=("$1")
    shift
    checks+=("$*")
}

# gcc alone links nothing: Debian's package only recommends the C library's headers and start files.
links() {
    local into status=0
    into=$(mktemp) || return
    "$1" -x "$2" - -o "$into" <<<'int main(void) { return 0; }' || status=$?
    rm -f "$into"
    return "$status"
}
links_c() { links cc c; }
links_cxx() { links c++ c++; }

# runs COMMAND [ARGUMENT...]: it starts, with its libraries; what it says and how it ends is its own matter.
runs() {
    local status=0
    "$@" || status=$?
    [ "$status" -ne 126 ] && [ "$status" -ne 127 ]
}

# library NAME: prints the file that the dynamic linker takes for it in a program of this machine's kind.
library() {
    LD_TRACE_LOADED_OBJECTS=1 LD_PRELOAD=$1 /bin/sh 2>/dev/null </dev/null | sed -n "s|^[[:space:]]*${1//./\\.} => \(/[^ ]*\) .*|\1|p" | grep .
}
# loads FILE: a program of this machine's kind can load it, and all that it needs itself.
loads() {
    local said
    said=$(LD_PRELOAD=$1 LD_BIND_NOW=1 /bin/sh -c : 2>&1 </dev/null) && [ -z "$said" ]
}
has_library() { library "$1" && loads "$1"; }

# The part of libibverbs that serves soft-RoCE; it lies beside the library, not beside another architecture's.
has_rxe_provider() {
    local verbs provider
    verbs=$(library libibverbs.so.1) || return
    for provider in "${verbs%/*}"/libibverbs/librxe-rdmav*.so; do
        loads "$provider" && return 0
    done
    return 1
}

# A busybox that needs no library: it is all there is before a guest sees the host's files.
has_static_busybox() {
    local headers
    busybox true && headers=$(readelf -lW "$(command -v busybox)") && [[ $headers == *LOAD* && $headers != *INTERP* ]]
}

need_build() {
    need gcc links_c
    need libc6-dev links_c
    need make make --version
}

# The RDMA declarations are compared with the libraries' headers (tests/rdma-oracle): by the C compiler, and by bindings
# that libclang makes of them.
has_header() { cc -fsyntax-only -x c - <<<"#include <$1>"; }
has_libclang() { "$workspace/tests/rdma-oracle/find-libclang.sh" any; }

need_test() {
    need_build
    need libibverbs-dev has_header infiniband/verbs.h
    need librdmacm-dev has_header rdma/rdma_cma.h
    need pkg-config pkg-config --version
    need libibverbs-dev pkg-config --exists libibverbs
    need librdmacm-dev pkg-config --exists librdmacm
    need libclang-dev has_libclang
    need g++ links_cxx
    need git git --version
    need libnbd-bin nbdinfo --version
    need libnbd-bin nbdcopy --version
    need libnbd-bin nbdfuse --version
    need fio fio --version
    need qemu-utils qemu-img --version
    need qemu-utils qemu-io --version
    need qemu-utils qemu-nbd --version
    need qemu-system-common qemu-storage-daemon --version
    need e2fsprogs mkfs.ext4 -V
    need fuse3 fusermount3 --version
    need mount losetup --version
    need iproute2 ip -V
    need nftables nft --version
    need strace strace -V
    need util-linux setpriv --version
}

need_test_tools() {
    need_component rustfmt cargo fmt --version
    need_component clippy cargo clippy --version
    need_cargo_tool nextest cargo-nextest --no-default-features --features default-no-update
    need_cargo_tool deny cargo-deny
}

need_vm() {
    need_build
    need qemu-system-x86 qemu-system-x86_64 --version
    need qemu-utils qemu-img --version
    need qemu-utils qemu-io --version
    need busybox-static has_static_busybox
    need cpio cpio --version
    need kmod depmod --version
    need util-linux setpriv --version
    need iproute2 runs rdma -V
    need dmsetup runs dmsetup --version
    need mount losetup --version
    need libibverbs1 has_library libibverbs.so.1
    need librdmacm1 has_library librdmacm.so.1
    need ibverbs-providers has_rxe_provider
    need ibverbs-utils runs ibv_devinfo
    need perftest runs ib_write_lat --version
    need strace strace -V
    need libnbd-bin nbdinfo --version
    need libnbd-bin nbdcopy --version
    need fio fio --version
}

need_fresh() {
    need git git --version
    need mmdebstrap mmdebstrap --version
    need debian-archive-keyring test -s /usr/share/keyrings/debian-archive-keyring.gpg
    need tar tar --version
    need util-linux unshare --version
    need util-linux setpriv --version
}

# ---- Installing -------------------------------------------------------------------------------------------------------

# Packages built from one source go with their own version of each other only: a new one of one line can take away an
# installed one of the same line that came from elsewhere. Where one is missing, apt is asked for all that are needed.
families=(
    "gcc g++"
    "qemu-system-common qemu-system-x86 qemu-utils"
    "mount util-linux"
    "ibverbs-providers ibverbs-utils libibverbs-dev libibverbs1 librdmacm-dev librdmacm1"
)

answers() {
    local words
    read -ra words <<<"$1"
    "${words[@]}" </dev/null >/dev/null 2>&1
}

# Sets `missing` to the packages whose tools do not answer and `failed` to those checks; fails when there are none.
find_missing() {
    local at
    local -A seen=()
    missing=()
    failed=()
    for at in "${!checks[@]}"; do
        [ -z "${seen[${packages[at]} ${checks[at]}]:-}" ] || continue
        seen[${packages[at]} ${checks[at]}]=1
        answers "${checks[at]}" && continue
        [ -n "${seen[${packages[at]}]:-}" ] || missing+=("${packages[at]}")
        seen[${packages[at]}]=1
        failed+=("${checks[at]}")
    done
    [ ${#missing[@]} -gt 0 ]
}

# Prints the missing packages, each once, with those of their families that are needed.
with_families() {
    local package family relative
    for package in "${missing[@]}"; do
        echo "$package"
        for family in "${families[@]}"; do
            [[ " $family " == *" $package "* ]] || continue
            for relative in $family; do
                [[ " ${packages[*]} " != *" $relative "* ]] || echo "$relative"
            done
        done
    done | sort -u
}

# subject CHECK: what a person would call what it looks for.
subject() {
    local words
    read -ra words <<<"$1"
    case ${words[0]} in
    links_c) echo "a C compiler that links (cc)" ;;
    links_cxx) echo "a C++ compiler that links (c++)" ;;
    has_library) echo "the library ${words[1]}" ;;
    has_header) echo "the header ${words[1]}" ;;
    has_libclang) echo "libclang, with clang's own headers" ;;
    has_rxe_provider) echo "libibverbs's part for soft-RoCE (librxe-rdmav*.so)" ;;
    has_static_busybox) echo "a statically linked busybox" ;;
    test) echo "the file ${words[-1]}" ;;
    runs) echo "${words[1]}" ;;
    *) echo "${words[0]}" ;;
    esac
}

# What Debian's packages are called elsewhere; - where that is not known.
names="
Debian             dnf                   pacman           zypper            apk
gcc                gcc                   gcc              gcc               gcc
libc6-dev          glibc-devel           glibc            glibc-devel       musl-dev
g++                gcc-c++               gcc              gcc-c++           g++
make               make                  make             make              make
git                git                   git              git               git
fio                fio                   fio              fio               fio
qemu-utils         qemu-img              qemu-img         qemu-tools        qemu-img
qemu-system-x86    qemu-system-x86-core  qemu-system-x86  qemu-x86          qemu-system-x86_64
e2fsprogs          e2fsprogs             e2fsprogs        e2fsprogs         e2fsprogs
fuse3              fuse3                 fuse3            fuse3             fuse3
mount              util-linux            util-linux       util-linux        losetup
util-linux         util-linux            util-linux       util-linux        setpriv
iproute2           iproute               iproute2         iproute2          iproute2
nftables           nftables              nftables         nftables          nftables
strace             strace                strace           strace            strace
busybox-static     busybox               busybox          busybox-static    busybox-static
cpio               cpio                  cpio             cpio              cpio
kmod               kmod                  kmod             kmod              kmod
dmsetup            device-mapper         device-mapper    device-mapper     device-mapper
libibverbs1        libibverbs            rdma-core        libibverbs1       -
librdmacm1         librdmacm             rdma-core        librdmacm1        -
libibverbs-dev     rdma-core-devel       rdma-core        rdma-core-devel   -
librdmacm-dev      rdma-core-devel       rdma-core        rdma-core-devel   -
pkg-config         pkgconf               pkgconf          pkgconf           pkgconf
libclang-dev       clang-devel           clang            clang-devel       clang-dev
ibverbs-providers  libibverbs            rdma-core        libibverbs        -
ibverbs-utils      libibverbs-utils      rdma-core        libibverbs-utils  -
perftest           perftest              -                perftest          -
libnbd-bin         libnbd                -                -                 -
tar                tar                   tar              tar               tar
"

# name_here MANAGER PACKAGE: what Debian's package is called there; fails where that is not known.
name_here() {
    awk -v manager="$1" -v package="$2" '
        $1 == "Debian" { for (at = 2; at <= NF; at++) if ($at == manager) column = at }
        $1 == package && column && $column != "-" { print $column; found = 1 }
        END { exit !found }' <<<"$names"
}

# On a system without apt: says what is missing, by its own names as far as they are known.
tell_without_apt() {
    local manager='' candidate command check name at
    for candidate in dnf pacman zypper apk; do
        if command -v "$candidate" >/dev/null; then manager=$candidate && break; fi
    done
    local -A known=()
    local unknown=()
    for at in "${!checks[@]}"; do
        check=${checks[at]}
        [[ $'\n'$(printf '%s\n' "${failed[@]}")$'\n' == *$'\n'"$check"$'\n'* ]] || continue
        # What is asked by way of the compiler may be there all the same; the next run tells.
        if [[ $check == has_header* || $check == has_libclang* ]] && ! answers links_c; then continue; fi
        # nbdfuse is a package of its own there.
        if [ "$manager" = dnf ] && [[ $check == nbdfuse* ]]; then
            known[nbdfuse]=1
        elif [ -n "$manager" ] && name=$(name_here "$manager" "${packages[at]}"); then
            known[$name]=1
        else
            unknown+=("$(subject "$check")")
        fi
    done
    echo "This machine has no apt, which costandby's commands install with; nothing was done. It lacks:" >&2
    if [ ${#known[@]} -gt 0 ]; then
        case $manager in
        dnf) command="dnf install" ;;
        pacman) command="pacman -S --needed" ;;
        zypper) command="zypper install" ;;
        apk) command="apk add" ;;
        esac
        echo "    $command $(printf '%s\n' "${!known[@]}" | sort | paste -sd ' ')" >&2
    fi
    [ ${#unknown[@]} -eq 0 ] || printf '%s\n' "${unknown[@]}" | sort -u | sed 's/^/    /' >&2
    echo "Install that as root and run this again." >&2
    exit 1
}

become=()

# What installing needs besides apt; says what to type where it is not there.
need_rights() {
    command -v apt-get >/dev/null || tell_without_apt
    [ "$(id -u)" -ne 0 ] || return 0
    become=(sudo -n)
    if ! "${become[@]}" true 2>/dev/null; then
        fail "Debian packages are missing, and installing them needs root, or a sudo that asks no password. Nothing was done." \
            "As root, type this, and run this again:  apt-get update && apt-get install $(with_families | paste -sd ' ')"
    fi
}

apt_log=
trap '[ -z "$apt_log" ] || rm -f "$apt_log"' EXIT

# run_apt ARGUMENT...: what it says goes to the log. It waits for another one's lock: apt itself does so for dpkg's only,
# not for the one of the lists.
run_apt() {
    local start=$SECONDS told=
    until "${become[@]}" env DEBIAN_FRONTEND=noninteractive LC_ALL=C \
        apt-get -o DPkg::Lock::Timeout="$lock_wait_s" "$@" </dev/null >"$apt_log" 2>&1; do
        apt_said "$locked" && [ $((SECONDS - start)) -lt "$lock_wait_s" ] || return
        [ -n "$told" ] || echo "another program holds apt's lock; waiting up to $lock_wait_s s"
        told=1
        sleep 2
    done
}

apt_said() { grep -qE "$1" "$apt_log"; }

locked='Could not get lock|Unable to acquire the dpkg frontend lock|Unable to lock'
unmet='unmet dependencies|held broken packages|Unable to correct problems'
unreachable='Could not resolve|Temporary failure|Could not connect|Failed to fetch|Unable to fetch|Unable to connect|timed out'

# tell_apt_failure PACKAGE...: what kept apt from installing them, and what to do about it.
tell_apt_failure() {
    grep -E '^(E|W|Err):' "$apt_log" | tail -n 5 >&2 || tail -n 5 "$apt_log" >&2
    local what="apt could not install: $*." then="and run this again."
    if apt_said "$locked"; then
        fail "$what Another program has held apt's lock for $lock_wait_s s: wait until it is done $then"
    elif apt_said 'dpkg was interrupted'; then
        fail "$what An earlier installation was interrupted: as root, run  dpkg --configure -a  $then"
    elif apt_said "enough free space|No space left on device"; then
        fail "$what The disk is full: make room $then"
    elif apt_said "$unreachable"; then
        fail "$what The Debian mirror of /etc/apt does not answer: see to the network $then"
    elif apt_said 'Unable to locate package|has no installation candidate'; then
        fail "$what The lists of /etc/apt lack some of these: have Debian 12 or later there, run  apt-get update  $then"
    fi
    fail "$what Mend what the lines above say $then"
}

# install [OPTION...] PACKAGE...
install() {
    run_apt install -y --no-install-recommends "$@" || return
    local removed
    removed=$(awk '/will be REMOVED:/ { on = 1; next } !/^  / { on = 0 } on { $1 = $1; printf "%s ", $0 }' "$apt_log")
    [ -z "$removed" ] || echo "apt removed, for it does not go with what was asked for: $removed"
}

# why CHECK: the first line of what it complains of.
why() {
    local words
    read -ra words <<<"$1"
    { "${words[@]}" 2>&1 >/dev/null </dev/null || true; } | sed 's/^.*: line [0-9]*: //' | head -n 1
}

# Installs until every tool answers: what one package takes away is asked for in the next round.
provide() {
    find_missing || return 0
    need_rights
    apt_log=$(mktemp)
    if ! run_apt update -qq; then
        if apt_said "$locked"; then tell_apt_failure "${missing[@]}"; fi
        # A stale list still works more often than not.
        echo "apt-get update failed; trying with the lists that are here" >&2
    fi
    local before='' reinstall=() wanted check
    for _ in 1 2 3 4; do
        if [ "${missing[*]}" = "$before" ]; then
            # Installed, says apt, and yet it does not answer: its files may be gone.
            [ ${#reinstall[@]} -eq 0 ] || break
            reinstall=(--reinstall)
        fi
        before="${missing[*]}"
        mapfile -t wanted < <(with_families)
        echo "installing: ${wanted[*]}"
        # An installed version from elsewhere may go with none of apt's: then it has to make room, and apt's follows.
        install "${reinstall[@]}" "${wanted[@]}" ||
            { apt_said "$unmet" && install "${reinstall[@]}" "${missing[@]}"; } ||
            tell_apt_failure "${missing[@]}"
        find_missing || return 0
    done
    for check in "${failed[@]}"; do echo "no answer from $(subject "$check"): $(why "$check")" >&2; done
    fail "apt has installed ${missing[*]}, and still the above do not run." \
        "Either something else stands before them in PATH ($PATH), or the packages are broken: mend that and run this again."
}

# ---- The sets ---------------------------------------------------------------------------------------------------------

[ "$(uname -s)" = Linux ] || fail "costandby runs on Linux, and this is $(uname -s)."
tools=()
[ $# -gt 0 ] || set -- help
for set in "$@"; do
    case $set in
    rust) ;;
    build) need_build ;;
    test)
        need_test
        tools=(need_test_tools)
        ;;
    vm) need_vm ;;
    fresh) need_fresh ;;
    *)
        echo "usage: $0 rust|build|test|vm|fresh..." >&2
        exit 2
        ;;
    esac
done
need_rust
provide
"${tools[@]}"
