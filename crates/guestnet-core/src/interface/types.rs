//! Theory of operation: types that the core and its callers share: identifiers, time, addresses, and what is known of a
//! frame besides its bytes.

use guestnet_wire::ether::Mac;
pub use guestnet_wire::gso::{Csum, Gso};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// A port of the switch: one Endpoint's attachment. Given by the caller, never reused within a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u32);

/// A flow: slot in the flow table and the generation of that slot, so that a stale event finds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowId {
    /// Slot in the table.
    pub index: u32,
    /// How often the slot was used before.
    pub generation: u32,
}

/// A host socket, as the I/O side numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SockId(pub u32);

/// A published port, as the control side numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ForwardId(pub u32);

/// A service of the gateway, as the control side numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ServiceId(pub u32);

/// Monotonic time in nanoseconds since an arbitrary start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Time(pub u64);

impl Time {
    /// This time plus milliseconds.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Time {
        Time(self.0.saturating_add(ms.saturating_mul(1_000_000)))
    }
    /// This time plus seconds.
    #[must_use]
    pub fn plus_s(self, s: u64) -> Time {
        self.plus_ms(s.saturating_mul(1000))
    }
    /// Milliseconds since the start.
    #[must_use]
    pub fn as_ms(self) -> u64 {
        self.0 / 1_000_000
    }
    /// Nanoseconds from `earlier` to this, 0 when it is later.
    #[must_use]
    pub fn since(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// What is known of a frame besides its bytes (virtio_net_hdr), both ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FrameMeta {
    /// State of the transport checksum.
    pub csum: Csum,
    /// Set when the frame is larger than the MTU and has to be segmented by its receiver.
    pub gso: Option<Gso>,
}

/// The fields of a guest's IP header that a host socket can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IpFields {
    /// TTL for the outside, already decremented.
    pub ttl: u8,
    /// Type of service: DSCP in the upper six bits, ECN in the lower two. TCP's ECN is the kernel's own.
    pub tos: u8,
}

impl IpFields {
    /// The fields of an ordinary packet with this TTL.
    #[must_use]
    pub fn ttl(ttl: u8) -> IpFields {
        IpFields { ttl, tos: 0 }
    }
}

/// The configuration of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// The guest's MAC where it is known; else the first source MAC seen becomes it.
    pub mac: Option<Mac>,
    /// Addresses assigned before the first frame.
    pub addresses: Vec<IpAddr>,
    /// IP MTU in bytes towards the guest, 68 (RFC 791) to 65520.
    pub mtu: u16,
    /// The largest frame payload that may be sent in one piece (64 KiB minus headers), 0 for no GSO. The
    /// I/O side segments where the attachment cannot, so this is a matter of speed alone.
    pub gso_max: u32,
    /// The port is dedicated to guests that send TSO frames without a virtio header (vfkit, libkrun): do not
    /// verify transport checksums and accept frames over the MTU.
    pub lax_offload: bool,
    /// The port leads to the segment that a `bridged` network joins, and not to a guest.
    pub uplink: bool,
}

/// Where a TCP relay connects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A host or anything behind it.
    Address(SocketAddr),
    /// A TCP service of the gateway (a unix socket on the I/O side), and the port whose guest connects.
    Service(ServiceId, PortId),
}

/// What a network does with packets for the outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetMode {
    /// Relayed or translated.
    #[default]
    Nat,
    /// Nothing leaves: guests, gateway and its services only.
    HostOnly,
    /// No gateway: guests are joined to the segment that the port with [`PortConfig::uplink`] leads to.
    Bridged,
}

/// Which guests open no flows to other guests. An isolated guest can still answer a guest that is not isolated.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Isolated {
    /// Guests open flows to each other.
    #[default]
    Nobody,
    /// Every guest is isolated but those on these ports. A guest that nothing is known of is isolated.
    AllExcept(Arc<BTreeSet<PortId>>),
}

impl Isolated {
    /// Returns true when the guest on the port is isolated.
    #[must_use]
    pub fn includes(&self, port: PortId) -> bool {
        match self {
            Isolated::Nobody => false,
            Isolated::AllExcept(ports) => !ports.contains(&port),
        }
    }
}
