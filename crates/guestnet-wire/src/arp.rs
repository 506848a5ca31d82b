//! Theory of operation: ARP for IPv4 over Ethernet (RFC 826), 28 bytes. Anything else is refused.

use crate::ether::Mac;
use crate::{WireError, be16, put};
use std::net::Ipv4Addr;

/// Length of an IPv4-over-Ethernet ARP message.
pub const LEN: usize = 28;
/// Operation: request.
pub const REQUEST: u16 = 1;
/// Operation: reply.
pub const REPLY: u16 = 2;

/// An ARP message.
///
/// # Examples
/// ```
/// use guestnet_wire::arp::{self, Arp};
/// use guestnet_wire::ether::Mac;
///
/// let question = Arp {
///     op: arp::REQUEST,
///     sha: Mac([2, 0, 0, 0, 0, 1]),
///     spa: "192.168.64.2".parse()?,
///     tha: Mac::default(),
///     tpa: "192.168.64.1".parse()?,
/// };
/// let mut message = [0; arp::LEN];
/// question.emit(&mut message);
/// assert_eq!(Arp::parse(&message), Ok(question));
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arp {
    /// 1 request, 2 reply.
    pub op: u16,
    /// Sender hardware address.
    pub sha: Mac,
    /// Sender protocol address.
    pub spa: Ipv4Addr,
    /// Target hardware address.
    pub tha: Mac,
    /// Target protocol address.
    pub tpa: Ipv4Addr,
}

impl Arp {
    /// Reads the message that follows the Ethernet header.
    ///
    /// # Errors
    /// [`WireError::Truncated`], or [`WireError::Unsupported`] when not IPv4 over Ethernet.
    pub fn parse(b: &[u8]) -> Result<Arp, WireError> {
        let b: &[u8; LEN] = b.get(..LEN).and_then(|b| b.try_into().ok()).ok_or(WireError::Truncated)?;
        if be16(b, 0) != 1 || be16(b, 2) != crate::ether::IPV4 || b[4] != 6 || b[5] != 4 {
            return Err(WireError::Unsupported);
        }
        Ok(Arp {
            op: be16(b, 6),
            sha: Mac([b[8], b[9], b[10], b[11], b[12], b[13]]),
            spa: Ipv4Addr::new(b[14], b[15], b[16], b[17]),
            tha: Mac([b[18], b[19], b[20], b[21], b[22], b[23]]),
            tpa: Ipv4Addr::new(b[24], b[25], b[26], b[27]),
        })
    }

    /// Writes the message at the front of `b`, which must hold 28 bytes.
    pub fn emit(&self, b: &mut [u8]) {
        put(b, 0, &[0, 1, 8, 0, 6, 4]);
        put(b, 6, &self.op.to_be_bytes());
        put(b, 8, &self.sha.0);
        put(b, 14, &self.spa.octets());
        put(b, 18, &self.tha.0);
        put(b, 24, &self.tpa.octets());
    }
}
