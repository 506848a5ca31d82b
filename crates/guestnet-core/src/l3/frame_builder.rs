//! Theory of operation: [`FrameBuilder`] makes the frames that the network sends to guests. The caller puts the transport
//! bytes at a fixed place of one scratch buffer ([`FrameBuilder::transport`]); the headers are written in front of them.
//! A packet over the port's MTU goes out as IPv4 fragments. Several datagrams of one size go out as one large frame where
//! the port takes those.
//!
//! The IPv4 identification counts for each port: a counter that all ports share would tell each guest how much traffic
//! the others get (RFC 7739 5).

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FrameMeta, Gso};
use crate::l2::frame_checks::FRAME_MAX;
use crate::l2::lan::Link;
use crate::tables::per_port::PerPort;
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::ipv4::{self, Ipv4};
use guestnet_wire::{checksum, proto, put, udp};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Where the IPv4 header is.
const L3: usize = ether::HEADER_LEN;
/// Where the transport header is.
const L4: usize = L3 + ipv4::MIN_LEN;

/// TTL of packets that start here, and of relayed ones whose own is not known (RFC 1122 3.2.1.7).
pub(crate) const TTL: u8 = 64;

/// The addresses of a packet that is made here.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Envelope {
    /// Destination MAC.
    pub mac: Mac,
    /// Source address.
    pub src: Ipv4Addr,
    /// Destination address.
    pub dst: Ipv4Addr,
    /// IP protocol.
    pub proto: u8,
    /// Time to live.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
}

/// Makes frames to guests. See the module head.
pub(crate) struct FrameBuilder {
    gateway_mac: Mac,
    /// The frame that is being made.
    scratch: Vec<u8>,
    /// A fragment of it.
    fragment: Vec<u8>,
    /// Identification of the last packet to each port.
    ids: PerPort<u16>,
}

impl FrameBuilder {
    /// Builds frames from this MAC.
    #[must_use]
    pub fn new(gateway_mac: Mac) -> FrameBuilder {
        FrameBuilder {
            gateway_mac,
            scratch: vec![0; FRAME_MAX],
            fragment: Vec::with_capacity(2048),
            ids: PerPort::default(),
        }
    }

    /// Swaps the buffer of the frame that is being made for another one, which may be empty while no frame is made.
    pub fn exchange_scratch(&mut self, other: &mut Vec<u8>) {
        std::mem::swap(&mut self.scratch, other);
    }

    /// A port was added; its identifications begin after `id`.
    pub fn add_port(&mut self, slot: u32, id: u16) {
        self.ids.insert(slot, id);
    }

    /// A port was removed.
    pub fn remove_port(&mut self, slot: u32) {
        self.ids.remove(slot);
    }

    /// Room for `len` transport bytes of the next packet.
    ///
    /// # Errors
    /// [`DropReason::Oversized`] when that exceeds the largest packet.
    #[inline]
    pub fn transport(&mut self, len: usize) -> Result<&mut [u8], DropReason> {
        self.scratch.get_mut(L4..L4.saturating_add(len)).ok_or(DropReason::Oversized)
    }

    fn headers(&mut self, e: &Envelope, len: usize, id: u16, frag: u16) {
        let eth = Ether { dst: e.mac, src: self.gateway_mac, ethertype: ether::IPV4 };
        let ip = Ipv4 {
            src: e.src,
            dst: e.dst,
            proto: e.proto,
            ttl: e.ttl,
            tos: e.tos,
            id,
            frag,
            payload_len: len as u16,
        };
        eth.emit(&mut self.scratch);
        if let Some(b) = self.scratch.get_mut(L3..) {
            ip.emit(b);
        }
    }

    /// Sends the `len` bytes of [`FrameBuilder::transport`] to a port, in fragments where they exceed the MTU.
    ///
    /// # Errors
    /// [`DropReason::Oversized`], and [`DropReason::NoEndpoint`] without such a port.
    #[inline]
    pub fn send_ipv4<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        slot: u32,
        e: &Envelope,
        len: usize,
        meta: FrameMeta,
    ) -> Result<(), DropReason> {
        let end = L4.saturating_add(len);
        if end > FRAME_MAX {
            return Err(DropReason::Oversized);
        }
        let mtu = usize::from(link.lan.port(slot).ok_or(DropReason::NoEndpoint)?.config.mtu);
        let id = self.ids.get_mut(slot).map_or(0, |id| {
            *id = id.wrapping_add(1);
            *id
        });
        if meta.gso.is_some() || len <= mtu.saturating_sub(ipv4::MIN_LEN) {
            self.headers(e, len, id, 0);
            link.lan.transmit(slot, self.scratch.get(..end).unwrap_or(&[]), meta, link.fx);
            return Ok(());
        }
        let step = mtu.saturating_sub(ipv4::MIN_LEN) & !7;
        if step == 0 {
            return Err(DropReason::Oversized);
        }
        let mut at = 0_usize;
        while at < len {
            let next = at.saturating_add(step).min(len);
            let n = next.saturating_sub(at);
            let more = if next < len { ipv4::MF } else { 0 };
            self.headers(e, n, id, more | (at / 8) as u16);
            self.fragment.clear();
            self.fragment.extend_from_slice(self.scratch.get(..L4).unwrap_or(&[]));
            self.fragment
                .extend_from_slice(self.scratch.get(L4..end).and_then(|b| b.get(at..next)).unwrap_or(&[]));
            link.lan.transmit(slot, &self.fragment, FrameMeta::default(), link.fx);
            at = next;
        }
        Ok(())
    }

    /// Sends a datagram to a guest, or several of `segment` bytes each when that is not 0.
    ///
    /// # Errors
    /// As [`FrameBuilder::send_ipv4`]; [`DropReason::UnsupportedProtocol`] for IPv6.
    #[allow(clippy::too_many_arguments)] // One datagram has that many fields.
    #[inline]
    pub fn send_udp<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        slot: u32,
        mac: Mac,
        src: SocketAddr,
        dst: SocketAddr,
        payload: &[u8],
        segment: u16,
    ) -> Result<(), DropReason> {
        let port = link.lan.port(slot).ok_or(DropReason::NoEndpoint)?;
        let (gso_max, mtu) = (port.config.gso_max as usize, usize::from(port.config.mtu));
        let size = usize::from(segment);
        if size == 0 || payload.len() <= size {
            return self.send_datagrams(link, slot, mac, src, dst, payload, None);
        }
        // Segments over the MTU cannot be left to the port: it would not fragment them.
        let room = gso_max.min(65507);
        let large = room >= size * 2 && ipv4::MIN_LEN + udp::LEN + size <= mtu;
        // Linux takes at most 64 segments everywhere (UDP_MAX_SEGMENTS before 6.9).
        let step =
            if large { room.checked_div(size).unwrap_or(1).min(64).saturating_mul(size) } else { size };
        for chunk in payload.chunks(step) {
            let gso = (chunk.len() > size).then_some(Gso::Udp(segment));
            self.send_datagrams(link, slot, mac, src, dst, chunk, gso)?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // As above.
    fn send_datagrams<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        slot: u32,
        mac: Mac,
        src: SocketAddr,
        dst: SocketAddr,
        payload: &[u8],
        gso: Option<Gso>,
    ) -> Result<(), DropReason> {
        let (IpAddr::V4(src4), IpAddr::V4(dst4)) = (src.ip(), dst.ip()) else {
            return Err(DropReason::UnsupportedProtocol);
        };
        let port = link.lan.port(slot).ok_or(DropReason::NoEndpoint)?;
        let len = payload.len().saturating_add(udp::LEN);
        let fits = len <= usize::from(port.config.mtu).saturating_sub(ipv4::MIN_LEN);
        let offload = gso.is_some() || port.config.gso_max > 0 && fits;
        let b = self.transport(len)?;
        put(b, udp::LEN, payload);
        let mut meta = FrameMeta::default();
        if offload {
            put(b, 0, &src.port().to_be_bytes());
            put(b, 2, &dst.port().to_be_bytes());
            put(b, 4, &(len as u16).to_be_bytes());
            let sum = checksum::pseudo(src.ip(), dst.ip(), proto::UDP, len as u32);
            put(b, 6, &checksum::fold(sum).to_be_bytes());
            meta = FrameMeta { csum: Csum::Partial { start: L4 as u16, offset: 6 }, gso };
        } else {
            udp::emit(b, src.ip(), dst.ip(), src.port(), dst.port());
        }
        let e = Envelope { mac, src: src4, dst: dst4, proto: proto::UDP, ttl: TTL, tos: 0 };
        self.send_ipv4(link, slot, &e, len, meta)
    }
}
