#!/usr/bin/env bash
# system-packages.sh demo|test|bench: makes sure that the programs are there that a target uses.
# As root on Debian it installs what is missing. Otherwise it says what is missing and what is then
# skipped; with CI=true a missing program is a failure, so that nothing is skipped unseen.
set -euo pipefail

# program or file : Debian package : what it is for
demo='
ip:iproute2:namespaces'
test="$demo"'
qemu-system-x86_64:qemu-system-x86:virtual machine tests
/boot/vmlinuz-*-cloud-amd64:linux-image-cloud-amd64:virtual machine tests
busybox:busybox-static:virtual machine tests
iperf3:iperf3:throughput and fairness tests
nft:nftables:kernel NAT in the harness
/usr/sbin/udhcpc:udhcpc:DHCP client tests
dhclient:isc-dhcp-client:DHCP client tests
dhcpcd:dhcpcd-base:DHCP client tests
dig:bind9-dnsutils:DNS tests
/usr/sbin/iodined:iodine:DNS tunnel tests
dns2tcpc:dns2tcp:DNS tunnel tests
/usr/sbin/ptunnel:ptunnel:ICMP tunnel tests
socat:socat:half-close tests
microsocks:microsocks:proxy tests
curl:curl:HTTP tests
ping:iputils-ping:ping tests
traceroute:traceroute:traceroute tests
tshark:tshark:capture tests
ethtool:ethtool:offload tests
strace:strace:idle tests
turnserver:coturn:NAT behaviour tests
natpmpc:natpmpc:tests of ports that guests open
valgrind:valgrind:the count of instructions
sysctl:procps:the namespaces of tests
setpriv:util-linux:tests as an ordinary user
dpdk-testpmd:dpdk-dev:vhost-user tests'
bench="$test"'
pasta:passt:the peers pasta and passt
slirp4netns:slirp4netns:the peer slirp4netns
dnsperf:dnsperf:bench/dns.py'

group=${1:-test}
case $group in
    demo|test|bench) list=${!group} ;;
    *) echo "usage: $0 demo|test|bench" >&2; exit 2 ;;
esac

PATH=$PATH:/usr/sbin:/sbin
present() {
    case $1 in
        /*) compgen -G "$1" >/dev/null ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

packages=() uses=()
scan() {
    packages=() uses=()
    while IFS=: read -r program package use; do
        [ -n "$program" ] || continue
        present "$program" || { packages+=("$package"); uses+=("$package (for $use)"); }
    done <<< "$list"
}

scan
[ ${#packages[@]} -eq 0 ] && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing: ${packages[*]}"
    # Tests want programs, not daemons: nothing that comes along may start a service.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' > $policy
        chmod 755 $policy
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    if ! { apt-get -q update && apt-get -q install -y --no-install-recommends "${packages[@]}"; } > "$log" 2>&1; then
        tail -n 40 "$log" >&2
        echo "apt-get could not install the packages above; the whole log is $log" >&2
    else
        rm -f "$log"
    fi
    scan
    [ ${#packages[@]} -eq 0 ] && exit 0
fi

printf 'Missing package: %s\n' "${uses[@]}" >&2
if [ "${CI:-}" = true ]; then
    echo "With CI=true all of these must be there: apt-get install ${packages[*]}" >&2
    exit 1
fi
echo "What needs them is skipped. To have it too, as root: apt-get install ${packages[*]}" >&2
