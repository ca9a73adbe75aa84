#!/usr/bin/env bash
# Makes what a guest boots from, in DIR/image: `vmlinuz`, `initramfs.gz` and `lib/modules/VERSION`.
#
#   tests/vm/image.sh DIR [KERNEL]
#
# KERNEL is `debian` (the default): the kernel that the system's Debian has today, by its meta package (`linux-image-amd64`,
# or COSTANDBY_VM_KERNEL). Or it is `6.12`: that of bookworm-backports, whatever the system is.
#
# The kernel is downloaded with lists and cache of our own below DIR, so that neither root nor the system's own lists are
# needed, and unpacked; nothing is installed. It stays until DIR is removed: without a network, what is there is used. The
# initramfs is made anew whenever this script, `init` or busybox changes, which takes a second.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
kernel=${2:-debian}
package=linux-image-amd64
if [ "$kernel" = debian ]; then package=${COSTANDBY_VM_KERNEL:-$package}; fi

# What the initramfs loads before it can see the host's files, and for the port that carries a guest's output.
modules="virtio_pci 9pnet_virtio 9p overlay virtio_console"

# Two runs at once share one download.
exec 9>"$dir/image.lock"
flock 9

fail() {
    echo "$*" >&2
    exit 1
}

# Where packages come from: the system's own sources, or backports alone, from the mirror that the system uses.
sources=()
mirror=
read_backports() {
    local found keyring=/usr/share/keyrings/debian-archive-keyring.gpg options=
    found=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
        sed -nE 's,^(deb( +\[[^]]*\])?|URIs:) +(https?://[^ ]*/debian)/?( .*)?$,\3,p' | head -n 1) || true
    mirror=${COSTANDBY_DEBIAN_MIRROR:-$found}
    [ -n "$mirror" ] || fail "apt's sources name no Debian mirror on this machine: name one in COSTANDBY_DEBIAN_MIRROR"
    if [ -f "$keyring" ]; then options="[signed-by=$keyring] "; fi
    mkdir -p "$dir/apt/sources"
    echo "deb $options$mirror bookworm-backports main" >"$dir/apt/sources/backports.list"
    # Installed packages play no part: an empty status, or the system's kernel might count as newer.
    : >"$dir/apt/status"
    sources=(-o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$dir/apt/sources" -o "Dir::State::status=$dir/apt/status")
}

private_apt() {
    local command=$1
    shift
    "$command" -q -o "Dir::State::Lists=$dir/apt/lists" -o "Dir::Cache=$dir/apt/cache" \
        -o Dir::State::status=/var/lib/dpkg/status -o APT::Update::Post-Invoke-Success= \
        -o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none -o Acquire::Retries=3 "${sources[@]}" "$@"
}

case $kernel in
debian | 6.12) ;;
*) fail "there is no kernel $kernel for guests: debian or 6.12" ;;
esac

fetch_kernel() {
    local new=$dir/kernel.new started=$SECONDS
    rm -rf "$new" "$dir/apt"
    mkdir -p "$new" "$dir/apt/lists/partial" "$dir/apt/cache/archives/partial"
    local from=$package advice="is there a network, and a Debian mirror in /etc/apt?"
    if [ "$kernel" = 6.12 ]; then
        read_backports
        from="$package of bookworm-backports"
        advice="the guest with Linux 6.12 needs bookworm-backports of $mirror: is there a network, and can this machine reach that mirror?"
    fi
    echo "fetching the guest's kernel ($from; some 70 to 100 MB, once)"
    private_apt apt-get update >"$dir/apt/log" 2>&1 || true
    # A meta package names the real one; a real one has its files itself.
    local real
    real=$(private_apt apt-cache depends --important "$package" 2>>"$dir/apt/log" |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1) || real=
    if [ "$kernel" = 6.12 ] && [ -n "$real" ] && [[ $real != linux-image-6.12.* ]]; then
        fail "bookworm-backports has $real today and no Linux 6.12: tests/vm/image.sh has to look for it elsewhere"
    fi
    (cd "$new" && private_apt apt-get download "${real:-$package}" >>"$dir/apt/log" 2>&1) || {
        tail -n 5 "$dir/apt/log" >&2
        fail "the package ${real:-$package} cannot be downloaded: $advice"
    }
    dpkg-deb -x "$new"/*.deb "$new/root"
    rm -f "$new"/*.deb
    # Debian 12 has /lib/modules, newer releases /usr/lib/modules.
    local tree
    tree=$(find "$new/root" -maxdepth 4 -type d -path '*lib/modules/*' -prune | head -n 1)
    [ -n "$tree" ] || fail "${real:-$package} has no modules"
    local version=${tree##*/}
    mkdir -p "$new/lib/modules"
    mv "$tree" "$new/lib/modules/$version"
    mv "$new/root/boot/vmlinuz-$version" "$new/vmlinuz"
    rm -rf "$new/root"
    # busybox loads no compressed modules.
    find "$new/lib/modules" -name '*.ko.xz' -exec busybox unxz {} +
    echo "$version" >"$new/version"
    rm -rf "$dir/kernel" "$dir/apt"
    mv "$new" "$dir/kernel"
    echo "fetched Linux $version in $((SECONDS - started)) s"
}

# The modules named, each after what it needs, one path a line.
declare -A listed=()
in_order() {
    local name=$1 path need
    path=$(find_module "$name")
    [ -n "$path" ] || return 0
    [ -z "${listed[$path]:-}" ] || return 0
    listed[$path]=1
    for need in $(sed -n "s|^$path: *||p" "$tree/modules.dep"); do
        in_order "$(basename "$need" .ko)"
    done
    echo "$path"
}

# Its path; nothing for one that the kernel has built in.
find_module() {
    if grep -q "/$1\.ko" "$tree/modules.builtin"; then return; fi
    local path
    path=$(sed -n "s|^\(.*/$1\.ko\):.*|\1|p" "$tree/modules.dep")
    [ -n "$path" ] || fail "this kernel has no module $1"
    echo "$path"
}

make_initramfs() {
    local stage=$dir/initramfs.d module
    rm -rf "$stage"
    mkdir -p "$stage/bin" "$stage/modules"
    cp "$(command -v busybox)" "$stage/bin/busybox"
    cp "$here/init" "$stage/init"
    chmod 755 "$stage/init"
    for module in $modules; do in_order "$module"; done >"$stage/list"
    while read -r module; do cp "$tree/$module" "$stage/modules/"; done <"$stage/list"
    sed 's|.*/||' "$stage/list" >"$stage/modules/order"
    rm "$stage/list"
    (cd "$stage" && find . | cpio -o -H newc --quiet) | gzip -1 >"$dir/image/initramfs.new"
    rm -rf "$stage"
    mv "$dir/image/initramfs.new" "$dir/image/initramfs.gz"
}

# Each other kernel has a directory of its own, with the same things in it.
if [ "$kernel" != debian ]; then
    dir=$dir/$kernel
    mkdir -p "$dir"
fi
[ -s "$dir/kernel/version" ] || fetch_kernel
version=$(cat "$dir/kernel/version")
tree=$dir/kernel/lib/modules/$version
# kmod's modprobe reads the binary indexes, busybox's the lists of text: kmod's depmod makes both, busybox's only the
# latter. Here and not where the kernel is fetched, so that a tree without them is mended too. Some depmods look in
# usr/lib/modules.
if [ ! -s "$tree/modules.dep.bin" ]; then
    ln -sfn . "$dir/kernel/usr"
    depmod -b "$dir/kernel" "$version"
    [ -s "$tree/modules.dep.bin" ] || fail "depmod made no modules.dep.bin in $tree: is that kmod's depmod?"
fi
made_from=$(cat "$0" "$here/init" "$(command -v busybox)" "$dir/kernel/version" | cksum)
if [ "$made_from" != "$(cat "$dir/image/made-from" 2>/dev/null)" ]; then
    mkdir -p "$dir/image"
    make_initramfs
    ln -sfn ../kernel/vmlinuz "$dir/image/vmlinuz"
    ln -sfn ../kernel/lib "$dir/image/lib"
    echo "$made_from" >"$dir/image/made-from"
fi
