#!/usr/bin/env bash
# Makes sure that what a target of the Makefile needs is on this machine, and installs what is not.
#
#   tests/tools/need.sh build|test|vm...
#
# Each tool is asked for its version rather than its package looked up: what counts is that it runs. Packages come
# from apt, as root or through sudo that asks no password; where neither works the missing ones are listed and
# nothing else is done. With everything in place this takes well under a second.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

missing=()

# need PACKAGE COMMAND...: PACKAGE is missing unless COMMAND succeeds.
need() {
    local package=$1
    shift
    "$@" </dev/null >/dev/null 2>&1 || missing+=("$package")
}

# gcc alone links nothing: Debian's package only recommends the C library's headers and start files.
links() {
    echo 'int main(void) { return 0; }' | "$1" -x "$2" - -o /dev/null
}
links_cc() { links cc c; }
links_cxx() { links c++ c++; }

install_packages() {
    [ ${#missing[@]} -gt 0 ] || return 0
    local become=()
    if [ "$(id -u)" -ne 0 ]; then become=(sudo -n); fi
    if ! command -v apt-get >/dev/null || ! "${become[@]}" true 2>/dev/null; then
        echo "These Debian packages are missing and cannot be installed from here (needs root or sudo):" >&2
        printf '    %s\n' "${missing[@]}" >&2
        echo "Install them and run this again:  apt-get install ${missing[*]}" >&2
        exit 1
    fi
    echo "installing: ${missing[*]}"
    # A stale list still works more often than not, so a failed update alone stops nothing.
    "${become[@]}" apt-get update -qq || echo "apt-get update failed; trying with the lists that are here" >&2
    "${become[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=300 "${missing[@]}" >/dev/null
    missing=()
}

need_rust() {
    if ! cargo --version >/dev/null 2>&1; then
        echo "cargo does not run: install Rust (https://rustup.rs), stable, and open a new shell" >&2
        exit 1
    fi
}

# need_component COMPONENT COMMAND...: rustup's minimal profile comes without these.
need_component() {
    local component=$1
    shift
    "$@" >/dev/null 2>&1 && return 0
    if ! command -v rustup >/dev/null; then
        echo "'$*' does not run: install the ${component} of this Rust toolchain" >&2
        exit 1
    fi
    rustup component add "$component"
}

# need_cargo_tool SUBCOMMAND CRATE [OPTION...]: built for a short wait rather than for speed, since a run of ours keeps
# either tool busy for seconds. On two cores that halves the minutes.
need_cargo_tool() {
    local subcommand=$1 crate=$2 start=$SECONDS
    shift
    cargo "$subcommand" --version >/dev/null 2>&1 && return 0
    echo "installing ${crate} with cargo (some minutes, once)"
    CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_OPT_LEVEL=0 \
        CARGO_PROFILE_RELEASE_DEBUG=false env -u CARGO_TARGET_DIR cargo install --locked --quiet "$@"
    echo "installed ${crate} in $((SECONDS - start)) s"
}

need_build() {
    need_rust
    need gcc links_cc
    need libc6-dev links_cc
    need make make --version
    install_packages
}

# The RDMA declarations are compared with the libraries' headers (tests/rdma-oracle): by the C compiler, and by bindings
# that libclang makes of them.
has_header() { echo "#include <$1>" | cc -fsyntax-only -x c -; }
has_libclang() { "$(dirname "$0")/../rdma-oracle/find-libclang.sh" any; }

need_test() {
    need_build
    need libibverbs-dev has_header infiniband/verbs.h
    need librdmacm-dev has_header rdma/rdma_cma.h
    need pkg-config pkg-config --exists libibverbs librdmacm
    need libclang-dev has_libclang
    need g++ links_cxx
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
    install_packages
    need_component rustfmt cargo fmt --version
    need_component clippy cargo clippy --version
    need_cargo_tool nextest cargo-nextest --no-default-features --features default-no-update
    need_cargo_tool deny cargo-deny
}

# runs COMMAND...: it can be started; what it says and how it ends is its own matter.
runs() {
    command -v "$1"
}
has_library() {
    ldconfig -p | grep -qF "$1"
}
has_rxe_provider() {
    compgen -G '/usr/lib/*/libibverbs/librxe-rdmav*.so'
}
# A busybox that needs no library: it is all there is before a guest sees the host's files.
has_static_busybox() {
    busybox true && ! ldd "$(command -v busybox)"
}

need_vm() {
    need_build
    need qemu-system-x86 qemu-system-x86_64 --version
    # Debian 12's emulator can take the place of newer tools from elsewhere: ask for both together.
    need qemu-utils qemu-img --version
    need busybox-static has_static_busybox
    need cpio cpio --version
    need kmod depmod --version
    need util-linux setpriv --version
    need iproute2 runs rdma
    need dmsetup runs dmsetup
    need mount losetup --version
    need libibverbs1 has_library libibverbs.so.1
    need librdmacm1 has_library librdmacm.so.1
    need ibverbs-providers has_rxe_provider
    need ibverbs-utils runs ibv_devinfo
    need perftest runs ib_write_lat
    need strace strace -V
    need libnbd-bin nbdinfo --version
    need libnbd-bin nbdcopy --version
    need fio fio --version
    need qemu-utils qemu-io --version
    install_packages
}

if [ $# = 0 ]; then set -- help; fi
for set in "$@"; do
    case $set in
    build) need_build ;;
    test) need_test ;;
    vm) need_vm ;;
    *)
        echo "usage: $0 build|test|vm..." >&2
        exit 2
        ;;
    esac
done
