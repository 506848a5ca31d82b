//! Theory of operation: TCP header (RFC 9293 3.1). [`Tcp::parse`] copies the fixed fields out of the
//! slice; [`Options::parse`] walks the options once and never trusts a length. [`Tcp::emit`] writes header
//! and options; the checksum is left to the caller, who knows whether it is offloaded.

use crate::{WireError, be16, be32, put};

/// Length of a header without options.
pub const MIN_LEN: usize = 20;

/// Flag bits.
pub mod flags {
    /// No more data from sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// Push.
    pub const PSH: u8 = 0x08;
    /// Acknowledgement field is significant.
    pub const ACK: u8 = 0x10;
    /// Urgent pointer is significant.
    pub const URG: u8 = 0x20;
    /// ECN echo (RFC 3168).
    pub const ECE: u8 = 0x40;
    /// Congestion window reduced (RFC 3168).
    pub const CWR: u8 = 0x80;
}

/// The fixed part of a TCP header.
///
/// # Examples
/// ```
/// use guestnet_wire::tcp::{Options, Tcp, flags};
///
/// let syn = Tcp { src_port: 50000, dst_port: 80, seq: 7, flags: flags::SYN, ..Tcp::default() };
/// let options = Options { mss: Some(1460), ..Options::default() };
/// let mut segment = [0; 60];
/// let len = syn.emit(&options, &mut segment);
/// let read = Tcp::parse(&segment[..len]).expect("a header that was just written");
/// assert_eq!((read.seq, read.flags, usize::from(read.header_len)), (7, flags::SYN, len));
/// assert_eq!(Options::parse(&segment[20..len]).mss, Some(1460));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tcp {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Header length in bytes, options included (20 to 60).
    pub header_len: u8,
    /// Flag bits, see [`flags`].
    pub flags: u8,
    /// Window, not scaled.
    pub window: u16,
    /// Urgent pointer.
    pub urgent: u16,
}

impl Tcp {
    /// Reads the header at the front of `b` (the TCP segment).
    ///
    /// # Errors
    /// [`WireError::Truncated`] or [`WireError::Malformed`] when the data offset is under 20 or past the end.
    #[inline]
    pub fn parse(b: &[u8]) -> Result<Tcp, WireError> {
        if b.len() < MIN_LEN {
            return Err(WireError::Truncated);
        }
        let header_len = (b[12] >> 4) * 4;
        if usize::from(header_len) < MIN_LEN || usize::from(header_len) > b.len() {
            return Err(WireError::Malformed);
        }
        Ok(Tcp {
            src_port: be16(b, 0),
            dst_port: be16(b, 2),
            seq: be32(b, 4),
            ack: be32(b, 8),
            header_len,
            flags: b[13],
            window: be16(b, 14),
            urgent: be16(b, 18),
        })
    }

    /// Writes the header and `options` (padded to 4 bytes with zeros) at the front of `b`, checksum zero.
    /// Returns the header length. `header_len` of `self` is ignored.
    #[inline]
    pub fn emit(&self, options: &Options, b: &mut [u8]) -> usize {
        let n = MIN_LEN + options.emit(b.get_mut(MIN_LEN..).unwrap_or(&mut []));
        put(b, 0, &self.src_port.to_be_bytes());
        put(b, 2, &self.dst_port.to_be_bytes());
        put(b, 4, &self.seq.to_be_bytes());
        put(b, 8, &self.ack.to_be_bytes());
        put(b, 12, &[((n / 4) as u8) << 4, self.flags]);
        put(b, 14, &self.window.to_be_bytes());
        put(b, 16, &[0, 0]);
        put(b, 18, &self.urgent.to_be_bytes());
        n
    }
}

/// Blocks of a SACK option at most: with timestamps beside it a sender has room for three.
const SACK_MAX: usize = 4;

/// The blocks of a SACK option (RFC 2018 3): left edge, and right edge one past the last byte. The first block
/// may report bytes that arrived twice instead (RFC 2883).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SackBlocks {
    len: u8,
    blocks: [(u32, u32); SACK_MAX],
}

impl SackBlocks {
    /// The blocks in the order of the option.
    #[must_use]
    pub fn as_slice(&self) -> &[(u32, u32)] {
        self.blocks.get(..usize::from(self.len)).unwrap_or(&[])
    }

    /// True without blocks.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    // Rare, and kept out of the way of segments without blocks.
    #[cold]
    fn parse(b: &[u8]) -> SackBlocks {
        let mut blocks = SackBlocks::default();
        for at in (0..b.len()).step_by(8) {
            blocks.push(be32(b, at), be32(b, at + 4));
        }
        blocks
    }

    /// Writes the option at `at`; returns where it ends.
    #[cold]
    fn emit(&self, b: &mut [u8], at: usize) -> usize {
        put(b, at, &[1, 1, 5, 2 + 8 * self.len]);
        let mut end = at + 4;
        for (left, right) in self.as_slice() {
            put(b, end, &left.to_be_bytes());
            put(b, end + 4, &right.to_be_bytes());
            end += 8;
        }
        end
    }

    /// Adds a block at the end. False when there are four already.
    pub fn push(&mut self, left: u32, right: u32) -> bool {
        let Some(block) = self.blocks.get_mut(usize::from(self.len)) else { return false };
        *block = (left, right);
        self.len += 1;
        true
    }
}

/// The options that guestnet reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Maximum segment size (RFC 9293 3.7.1).
    pub mss: Option<u16>,
    /// Window scale shift, at most 14 (RFC 7323 2).
    pub wscale: Option<u8>,
    /// SACK permitted (RFC 2018).
    pub sack_permitted: bool,
    /// Timestamps: value, echo reply (RFC 7323 3).
    pub timestamps: Option<(u32, u32)>,
    /// SACK blocks (RFC 2018).
    pub sack: SackBlocks,
}

impl Options {
    /// Reads the options of a segment: `b` is the bytes from 20 to the header length. Unknown options are
    /// passed over; a lying length ends the walk.
    #[must_use]
    pub fn parse(mut b: &[u8]) -> Options {
        let mut o = Options::default();
        while let Some(&kind) = b.first() {
            match kind {
                0 => break,
                1 => {
                    b = &b[1..];
                    continue;
                }
                _ => {}
            }
            let Some(&len) = b.get(1) else { break };
            let len = usize::from(len);
            if len < 2 || len > b.len() {
                break;
            }
            match (kind, len) {
                (2, 4) => o.mss = Some(be16(b, 2)),
                (3, 3) => o.wscale = Some(b[2].min(14)),
                (4, 2) => o.sack_permitted = true,
                (8, 10) => o.timestamps = Some((be32(b, 2), be32(b, 6))),
                (5, 10 | 18 | 26 | 34) => o.sack = SackBlocks::parse(&b[2..len]),
                _ => {}
            }
            b = &b[len..];
        }
        o
    }

    /// Writes the options at the front of `b`; returns their length, a multiple of 4.
    pub fn emit(&self, b: &mut [u8]) -> usize {
        let mut at = 0;
        let mut add = |b: &mut [u8], bytes: &[u8]| {
            put(b, at, bytes);
            at += bytes.len();
        };
        if let Some(mss) = self.mss {
            let m = mss.to_be_bytes();
            add(b, &[2, 4, m[0], m[1]]);
        }
        if let Some(ws) = self.wscale {
            add(b, &[1, 3, 3, ws]);
        }
        if self.sack_permitted {
            add(b, &[1, 1, 4, 2]);
        }
        if let Some((val, ecr)) = self.timestamps {
            add(b, &[1, 1, 8, 10]);
            add(b, &val.to_be_bytes());
            add(b, &ecr.to_be_bytes());
        }
        if !self.sack.is_empty() {
            at = self.sack.emit(b, at);
        }
        at
    }
}
