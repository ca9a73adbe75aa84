# The guest's process 1, once it sees the host's files: brings up the network and the device, runs /share/command, writes
# its exit status to /share/status and powers off.
#
# /share/settings says NODE, ADDRESS, WIRE (1: the network is a virtio card with another guest behind it; 0: a veth pair,
# both ends of a connection in this guest), MTU (of that network), INNER_ADDRESS (on a second card, by which the host is let in; empty: there is
# none) and SHELL_ON_CONSOLE. rxe0 sits on that network; an MTU of 9000 gives it 4096.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp/home LC_ALL=C
. /share/settings

busybox=/bin/busybox
modprobe() { $busybox modprobe "$@"; }

# port NAME: the device file of a virtio port.
port() {
    local found
    for found in /sys/class/virtio-ports/*; do
        if [ "$(<"$found/name")" = "$1" ]; then
            echo "/dev/${found##*/}"
            return
        fi
    done
}

end() {
    [ "$1" = 0 ] || dmesg >/share/kernel.log
    sync
    echo "$1" >/share/status
    echo o >/proc/sysrq-trigger
    sleep 60
}

fail() {
    echo "rig: $*"
    end 125
}

exec </dev/null >"$(port output)" 2>&1
mkdir -p "$HOME"
mount -t tmpfs -o mode=1777 tmp /var/tmp
[ -d /var/lock/. ] || ln -sfn /run/lock /var/lock
# The kernel calls this one for what it finds missing: kmod's where the host has it, else busybox's.
[ -x /sbin/modprobe ] || ln -s $busybox /sbin/modprobe
echo 1 >/proc/sys/kernel/printk
$busybox hostname "guest$NODE"

# name_card START NAME: gives the network card whose hardware address begins so its name.
name_card() {
    local found
    for _ in {1..600}; do
        found=$(cd /sys/class/net && grep -l "^$1" */address)
        [ -n "$found" ] && break
        sleep 0.05
    done
    ip link set "${found%/address}" name "$2"
}

ip link set lo up
if [ "$WIRE" = 1 ]; then
    modprobe virtio_net || fail "no virtio_net"
    name_card 52:54:00:09: wire0
    if [ -n "$INNER_ADDRESS" ]; then
        name_card 52:54:00:0a: host0
        ip link set host0 up && ip address add "$INNER_ADDRESS/24" dev host0 || fail "no network to the host"
    fi
else
    modprobe veth && ip link add wire0 type veth peer name wire1 && ip link set wire1 mtu "$MTU" up || fail "no veth"
fi
ip link set wire0 mtu "$MTU" up && ip address add "$ADDRESS/24" dev wire0 || fail "no network"

# crc32_generic: rxe asks the kernel's crypto layer for it, which would look for it under an alias.
for module in crc32_generic ib_uverbs rdma_ucm rdma_rxe; do
    modprobe $module || fail "the module $module cannot be loaded"
done
rdma link add rxe0 type rxe netdev wire0 || fail "no rxe0"
for _ in {1..600}; do
    [ -e /dev/infiniband/rdma_cm ] && [ -e /dev/infiniband/uverbs0 ] && rdma link show rxe0/1 | grep -q 'state ACTIVE' && break
    sleep 0.05
done
rdma link show rxe0/1 | grep -q 'state ACTIVE' || fail "rxe0 does not become active"

# How many times slower than on a quiet machine, where it takes 5 s, all this took: limits are stretched by that.
read -r uptime _ </proc/uptime
uptime=$((10#${uptime/./}))
[ "$uptime" -gt 500 ] || uptime=500
COSTANDBY_TEST_SLOWNESS=$((uptime / 500)).$(printf %02d $((uptime % 500 / 5)))
export COSTANDBY_TEST_SLOWNESS
echo "$COSTANDBY_TEST_SLOWNESS" >/share/slowness

. /share/environment
export COSTANDBY_RDMA_DEVICE=rxe0 COSTANDBY_RDMA_ADDRESS=$ADDRESS
cd "$(</share/directory)" 2>/dev/null || cd /
if [ "$SHELL_ON_CONSOLE" = 1 ]; then
    # Held open, for a terminal that nobody has open forgets its size.
    exec 8<>/dev/hvc0
    stty rows "$HEIGHT" cols "$WIDTH" <&8
    HISTFILE= PS1="guest \w # " setsid -c bash --norc -i </dev/hvc0 >/dev/hvc0 2>&1
    end 0
fi
bash /share/command </dev/null
end $?
