# Load on the disks at $disks, with $threads threads each that write $writes times, or for $seconds.
load_unit
load virtio_blk
disks=$(echo $disks | tr , ' ')
for at in $disks; do
    until_true disk_there $at || fail "no disk at $at"
    say GROUP $at $(group_of $at)
done
if [ -n "$rng" ]; then
    load virtio_rng
    dd if=/dev/hwrng of=/dev/null bs=512 2> /dev/null &
    reader=$!
fi
say LOADING
number=0
for at in $disks; do
    {
        inside load $number /dev/$(disk_of $at) $((number * 100)) $threads $blocks $writes $seconds
        echo $? > /tmp/ended$number
    } &
    number=$((number + 1))
done
# A request that is never answered keeps its worker for good: the host hears of both ends.
limit=$(($(cut -d. -f1 /proc/uptime) + seconds + ${patience:-40}))
while [ $number -gt 0 ]; do
    number=$((number - 1))
    until [ -e /tmp/ended$number ] || [ $(cut -d. -f1 /proc/uptime) -ge $limit ]; do sleep 0.1; done
    if [ -e /tmp/ended$number ]; then
        [ "$(cat /tmp/ended$number)" = 0 ] || fail "load on disk $number"
    else
        say STUCK $number
    fi
done
if [ -n "$reader" ]; then
    kill $reader
    wait $reader
fi
sleep 0.3
say LOADED
listen
