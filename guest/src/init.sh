#!/bin/busybox sh
# The guest's first process. The kernel's command line gives case=NAME and further variables, which arrive in the
# environment. Lines that the host waits for begin with @@.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmp /tmp
mount -t tracefs trace /sys/kernel/tracing
TRACING=/sys/kernel/tracing
# The console is the kernel's: its lines would end up in the middle of ours.
exec < /dev/ttyS1 > /dev/ttyS1 2>&1
stty -echo

say() { echo "@@$*"; }

# Ends the guest; the host prints why.
fail() { say "FAIL $*"; dmesg | tail -40; off; }

off() { sync; poweroff -f; }

# Loads a module with all that it depends on.
load() {
    for module in $(cat /modules/$1.order); do
        [ -d /sys/module/$module ] || insmod /modules/$module.ko || fail "insmod $module"
    done
}

# Loads the driver of the IOMMU $unit, where that is a module.
load_unit() { [ "$unit" = vtd ] || load virtio_iommu; }

# Waits up to 10 s until a command succeeds.
until_true() {
    local tries=200
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
        sleep 0.05
    done
}

# Waits for the line that the host writes.
listen() { read heard; }

# The name of the device at a PCI address in sysfs.
pci() { echo /sys/bus/pci/devices/0000:$1; }

# The group of the device at a PCI address; nothing, if it has none.
group_of() { local link=$(readlink $(pci $1)/iommu_group); echo ${link##*/}; }

# The block device behind a PCI address.
disk_of() { ls $(pci $1)/virtio*/block 2>/dev/null | head -1; }

# Whether there is one: for until_true, which evaluates its words once.
disk_there() { [ -n "$(disk_of $1)" ]; }

# Records what the guest maps and unmaps from here on.
trace_on() {
    echo 0 > $TRACING/tracing_on
    echo ${1:-24576} > $TRACING/buffer_size_kb
    echo mono > $TRACING/trace_clock
    echo > $TRACING/trace
    echo 1 > $TRACING/events/iommu/enable
    for event in $TRACING/events/dma/*; do
        case $event in */enable | */filter | *sync*) ;; *) echo 1 > $event/enable ;; esac
    done
    echo 1 > $TRACING/tracing_on
}

# Hands what was recorded to the host; its last line says how many events were lost.
trace_out() {
    echo 0 > $TRACING/tracing_on
    load virtio_console
    until_true [ -e /dev/vport*p1 ] || fail "no port for the trace"
    local lost=0 count
    for cpu in $TRACING/per_cpu/cpu*; do
        count=$(sed -n 's/^overrun: //p' $cpu/stats)
        lost=$((lost + count))
    done
    { cat $TRACING/trace; echo "lost $lost"; } > $(ls /dev/vport*p1)
    say TRACED
}

say "UP $(cut -d' ' -f1 /proc/uptime)"
. /cases/$case
say "DONE $(cut -d' ' -f1 /proc/uptime)"
off
