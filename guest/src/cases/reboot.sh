# Uses the disk at $blk, and starts anew as the host says, amid writes.
say EARLY
listen
trace_on
load_unit
load virtio_blk
until_true disk_there $blk || fail "no disk at $blk"
disk=/dev/$(disk_of $blk)
inside load disk $disk 1 2 256 100 0 || fail "load"
sleep 0.2
echo quiet > $TRACING/trace_marker
say QUIET
listen
trace_out
cat /dev/$(disk_of $kernel) > /tmp/kernel
cat /dev/$(disk_of $initramfs) > /tmp/initramfs
inside load disk $disk 5 4 256 0 30 > /dev/null &
sleep 0.5
say WRITING
listen
case $heard in
reboot) reboot -f ;;
kexec) inside kexec /tmp/kernel /tmp/initramfs "$(cat /proc/cmdline)" || fail "kexec" ;;
*) kill %1 ;;
esac
