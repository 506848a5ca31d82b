use super::*;
use crate::interface::stats::DropReason;
use crate::interface::types::PortId;
use guestnet_wire::ether::Mac;
use std::net::SocketAddr;

fn policy(mode: NetMode, host_loopback: Option<&str>) -> Policy {
    let mut c = NetworkConfig::new(
        Mac([2, 0, 0, 0, 0, 1]),
        Ipv4Addr::new(192, 168, 64, 1),
        (Ipv4Addr::new(192, 168, 64, 0), 24),
        [0; 32],
    );
    c.mode = mode;
    c.host_loopback = host_loopback.map(|a| a.parse().unwrap());
    Policy::new(&c)
}

fn request(direction: Direction, protocol: u8, to: SocketAddr) -> Request {
    let source = "192.168.64.2:1024".parse().unwrap();
    Request { direction, endpoint: PortId(1), protocol, source, destination: to }
}

/// The verdict on a flow as its target or the reason of the denial, and the label of the rule.
fn judge(p: &Policy, r: &Request) -> (Result<SocketAddr, DropReason>, String) {
    match p.judge(r) {
        Verdict::Allow { target, rule } => (Ok(target), p.label(r.endpoint, rule).to_string()),
        Verdict::Deny { reason, rule } => (Err(reason), p.label(r.endpoint, rule).to_string()),
        other => panic!("built-in rules allow or deny: {other:?}"),
    }
}

fn out(p: &Policy, to: &str) -> (Result<SocketAddr, DropReason>, String) {
    judge(p, &request(Direction::Outbound, 6, to.parse().unwrap()))
}

fn denied(reason: DropReason, rule: &str) -> (Result<SocketAddr, DropReason>, String) {
    (Err(reason), rule.to_string())
}

fn allowed(to: &str, rule: &str) -> (Result<SocketAddr, DropReason>, String) {
    (Ok(to.parse().unwrap()), rule.to_string())
}

#[test]
fn addresses_that_are_never_a_destination_are_denied() {
    let p = policy(NetMode::Nat, None);
    for to in [
        "0.0.0.0:80",
        "0.1.2.3:80",
        "127.0.0.1:80",
        "127.255.0.1:1",
        "224.0.0.1:5",
        "240.1.1.1:1",
        "255.255.255.255:67",
        "[::1]:80",
        "[::ffff:127.0.0.1]:80",
        "[fe80::1]:80",
    ] {
        assert_eq!(out(&p, to), denied(DropReason::BadDestination, "special_address"), "{to}");
    }
    assert_eq!(out(&p, "192.168.64.255:1"), denied(DropReason::BadDestination, "broadcast"));
    assert_eq!(out(&p, "192.168.64.254:80"), denied(DropReason::NoEndpoint, "subnet"));
    assert_eq!(out(&p, "10.1.1.1:80"), allowed("10.1.1.1:80", "outside"));
}

#[test]
fn metadata_of_clouds_is_never_a_destination() {
    for loopback in [None, Some("192.168.64.254")] {
        let p = policy(NetMode::Nat, loopback);
        for to in [
            "169.254.169.254:80",
            "169.254.170.2:80",
            "168.63.129.16:80",
            "168.63.129.16:32526",
            "100.100.100.200:80",
            "192.0.0.192:80",
            "[fd00:ec2::254]:80",
            "[fd00:ec2::23]:80",
            "[fd20:ce::254]:80",
            "[fd00:42::42]:80",
            // By way of a translator or a tunnel.
            "[64:ff9b::169.254.169.254]:80",
            "[64:ff9b::100.100.100.200]:80",
            "[2002:a9fe:a9fe::1]:80",
            "[::169.254.169.254]:80",
        ] {
            let to: SocketAddr = to.parse().unwrap();
            for protocol in [1, 6, 17, 47] {
                let got = judge(&p, &request(Direction::Outbound, protocol, to));
                assert_eq!(got, denied(DropReason::BadDestination, "metadata"), "{to}");
            }
            assert_eq!(p.name_of(to.ip()), None, "{to}");
        }
        for to in ["[fe80::a9fe:a9fe]:80", "[64:ff9b::127.0.0.1]:80"] {
            assert_eq!(out(&p, to), denied(DropReason::BadDestination, "special_address"), "{to}");
        }
        for to in ["168.63.129.17:80", "100.100.100.201:80", "192.0.0.193:80", "[fd00:ec3::254]:80"] {
            assert_eq!(out(&p, to), allowed(to, "outside"));
        }
        assert_eq!(out(&p, "[64:ff9b::8.8.8.8]:53"), allowed("[64:ff9b::8.8.8.8]:53", "outside"));
    }
}

#[test]
fn host_loopback_is_reached_only_through_its_address() {
    let p = policy(NetMode::Nat, Some("192.168.64.254"));
    assert_eq!(out(&p, "192.168.64.254:80"), allowed("127.0.0.1:80", "host_loopback"));
    assert_eq!(p.name_of("127.0.0.1".parse().unwrap()), Some("192.168.64.254".parse().unwrap()));
    assert_eq!(policy(NetMode::Nat, None).name_of("127.0.0.1".parse().unwrap()), None);
    let p = policy(NetMode::HostOnly, Some("192.168.64.254"));
    assert_eq!(out(&p, "192.168.64.254:80"), denied(DropReason::Policy, "host_only"));
    assert_eq!(out(&p, "10.1.1.1:80"), denied(DropReason::Policy, "host_only"));
}

#[test]
fn host_only_keeps_published_ports_and_closes_those_of_guests() {
    let guest: SocketAddr = "192.168.64.2:80".parse().unwrap();
    let inbound = |p: &Policy, entry| judge(p, &request(Direction::Inbound(entry), 6, guest));
    let p = policy(NetMode::Nat, None);
    for (entry, rule) in
        [(Entry::Published, "published"), (Entry::GuestPort, "guest_port"), (Entry::Mapping, "mapping")]
    {
        assert_eq!(inbound(&p, entry), (Ok(guest), rule.into()));
    }
    let p = policy(NetMode::HostOnly, None);
    assert_eq!(inbound(&p, Entry::Published), (Ok(guest), "published".into()));
    for entry in [Entry::GuestPort, Entry::Mapping] {
        assert_eq!(inbound(&p, entry), denied(DropReason::Policy, "host_only"));
    }
}

#[test]
fn isolated_guests_open_no_flows_to_others() {
    let mut p = policy(NetMode::Nat, None);
    let to: SocketAddr = "192.168.64.3:80".parse().unwrap();
    let from = |endpoint| Request { endpoint: PortId(endpoint), ..request(Direction::BetweenGuests, 6, to) };
    let passes = |p: &Policy, endpoint| judge(p, &from(endpoint)) == (Ok(to), "guests".into());
    assert!(p.guests_pass() && passes(&p, 1));
    p.change(NetMode::Nat, Isolated::AllExcept(Arc::new([PortId(2)].into())));
    assert!(!p.guests_pass() && passes(&p, 2));
    assert_eq!(judge(&p, &from(1)), denied(DropReason::Policy, "isolated"));
    p.change(NetMode::Nat, Isolated::AllExcept(Arc::default()));
    assert_eq!(judge(&p, &from(2)), denied(DropReason::Policy, "isolated"));
    assert_eq!(out(&p, "10.1.1.1:80"), allowed("10.1.1.1:80", "outside"));
    assert_eq!(p.generation(), Generation(2));
}

#[test]
fn clients_keep_their_address_where_it_means_the_same_to_the_guest() {
    let p = policy(NetMode::Nat, None);
    let name = |a: &str| p.client_name(a.parse().unwrap(), [192, 168, 64, 2].into()).to_string();
    assert_eq!(name("203.0.113.9"), "203.0.113.9");
    assert_eq!(name("::ffff:203.0.113.9"), "203.0.113.9");
    assert_eq!(name("127.0.0.1"), "192.168.64.1");
    assert_eq!(name("192.168.64.7"), "192.168.64.1");
    assert_eq!(name("2001:db8::1"), "192.168.64.1");
}
