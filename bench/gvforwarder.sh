#!/bin/sh
# gvforwarder.sh FORWARDER SOCKET MTU COMMAND...: runs COMMAND in a new user and network namespace that
# gvproxy serves through its own forwarder; SOCKET is gvproxy's.
set -eu
if [ "${1:-}" != inside ]; then
    exec unshare --user --map-root-user --net "$0" inside "$@"
fi
forwarder=$2
socket=$3
mtu=$4
shift 4
ip link set lo up
ip tuntap add dev tap0 mode tap
ip link set tap0 address 5a:94:ef:e4:0c:ee mtu "$mtu" up
ip address add 192.168.127.2/24 dev tap0
ip route add default via 192.168.127.1
exec 4<&0
"$@" <&4 4<&- &
guest=$!
exec 4<&- 0</dev/null
trap 'kill "$guest" 2>/dev/null || true' TERM INT
"$forwarder" -url "unix://$socket" -iface tap0 -preexisting -mtu 4000 >/dev/null 2>&1 &
served=$!
status=0
wait "$guest" || status=$?
kill "$served" 2>/dev/null || true
exit "$status"
