#!/bin/sh
# slirp.sh MTU API COMMAND...: runs COMMAND in a new user and network namespace served by slirp4netns, whose
# API socket is API.
set -eu
mtu=$1
api=$2
shift 2
dir=$(mktemp -d)
mkfifo "$dir/ready"
# A command in the background would lose its input.
exec 4<&0
unshare --user --map-root-user --net sh -c 'read -r _ <"$1"; shift; exec "$@" <&4 4<&-' sh "$dir/ready" "$@" 3>&- &
guest=$!
exec 4<&- 0</dev/null
# unshare has entered its namespaces when they differ from ours.
own=$(readlink /proc/self/ns/net)
until [ "$(readlink "/proc/$guest/ns/net" 2>/dev/null || echo "$own")" != "$own" ]; do sleep 0.01; done
slirp4netns --configure --mtu="$mtu" --disable-host-loopback --api-socket="$api" --ready-fd=3 "$guest" tap0 \
    3>"$dir/up" >/dev/null 2>&1 &
slirp=$!
until [ -s "$dir/up" ]; do
    kill -0 "$slirp" || exit 1
    sleep 0.01
done
echo go >"$dir/ready"
status=0
trap 'kill "$guest" 2>/dev/null || true' TERM INT
wait "$guest" || status=$?
kill "$slirp" 2>/dev/null || true
wait "$slirp" 2>/dev/null || true
rm -rf "$dir"
exit "$status"
