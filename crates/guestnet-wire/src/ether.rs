//! Theory of operation: Ethernet II header, 14 bytes, no FCS (attachments never carry one). 802.1Q tags
//! (0x8100, 0x88a8) are recognised so that a tagged frame is never misread as something else.

use crate::{WireError, be16};
use std::fmt;

/// Length of an Ethernet II header.
pub const HEADER_LEN: usize = 14;
/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;
/// EtherType of an 802.1Q tag.
pub const VLAN: u16 = 0x8100;
/// EtherType of an 802.1ad tag.
pub const QINQ: u16 = 0x88a8;

/// A 48-bit MAC address.
///
/// # Examples
/// ```
/// use guestnet_wire::ether::Mac;
///
/// let mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
/// assert_eq!(mac.to_string(), "52:54:00:12:34:56");
/// assert!(mac.is_unicast() && Mac::BROADCAST.is_multicast());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// ff:ff:ff:ff:ff:ff
    pub const BROADCAST: Mac = Mac([0xff; 6]);
    /// True for group addresses (multicast and broadcast): the I/G bit.
    #[inline]
    #[must_use]
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 == 1
    }
    /// True for an address that a NIC may have: not group, not all zero.
    #[inline]
    #[must_use]
    pub fn is_unicast(self) -> bool {
        !self.is_multicast() && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = self.0;
        write!(f, "{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", m[0], m[1], m[2], m[3], m[4], m[5])
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The fields of an Ethernet II header.
///
/// # Examples
/// ```
/// use guestnet_wire::WireError;
/// use guestnet_wire::ether::{self, Ether, Mac};
///
/// let header = Ether { dst: Mac::BROADCAST, src: Mac([2, 0, 0, 0, 0, 1]), ethertype: ether::IPV4 };
/// let mut frame = [0; ether::HEADER_LEN];
/// header.emit(&mut frame);
/// assert_eq!(Ether::parse(&frame), Ok(header));
/// assert_eq!(Ether::parse(&frame[..13]), Err(WireError::Truncated));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ether {
    /// Destination MAC.
    pub dst: Mac,
    /// Source MAC.
    pub src: Mac,
    /// EtherType, host order.
    pub ethertype: u16,
}

impl Ether {
    /// Reads the header of `frame`.
    ///
    /// # Errors
    /// [`WireError::Truncated`] under 14 bytes.
    #[inline]
    pub fn parse(frame: &[u8]) -> Result<Ether, WireError> {
        let h: &[u8; HEADER_LEN] =
            frame.get(..HEADER_LEN).and_then(|h| h.try_into().ok()).ok_or(WireError::Truncated)?;
        Ok(Ether {
            dst: Mac([h[0], h[1], h[2], h[3], h[4], h[5]]),
            src: Mac([h[6], h[7], h[8], h[9], h[10], h[11]]),
            ethertype: be16(h, 12),
        })
    }

    /// Writes the header at the front of `frame`, which must hold 14 bytes.
    #[inline]
    pub fn emit(&self, frame: &mut [u8]) {
        let Some(b) = frame.first_chunk_mut::<HEADER_LEN>() else { return };
        b[..6].copy_from_slice(&self.dst.0);
        b[6..12].copy_from_slice(&self.src.0);
        b[12..].copy_from_slice(&self.ethertype.to_be_bytes());
    }
}
