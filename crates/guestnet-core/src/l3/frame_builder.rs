//! Theory of operation: [`FrameBuilder`] makes the frames that the network sends to guests, IPv4 or IPv6. The caller puts
//! the transport bytes at a fixed place of one scratch buffer ([`FrameBuilder::transport`]); the headers are written in
//! front of them. A packet over the port's MTU goes out in fragments. Several datagrams of one size go out as one large
//! frame where the port takes those.
//!
//! The identification counts for each port: a counter that all ports share would tell each guest how much traffic the
//! others get (RFC 7739 5).

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FrameMeta, Gso};
use crate::l2::frame_checks::FRAME_MAX;
use crate::l2::lan::Link;
use crate::tables::per_port::PerPort;
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::frame::{self, IpHeader};
use guestnet_wire::{checksum, ipv4, ipv6, proto, put, udp};
use std::net::{IpAddr, SocketAddr};

/// Where the transport header is: behind the longest headers.
const L4: usize = frame::HEADER_MAX;

/// TTL of packets that start here, and of relayed ones whose own is not known (RFC 1122 3.2.1.7).
pub(crate) const TTL: u8 = 64;

/// Makes frames to guests. See the module head.
pub(crate) struct FrameBuilder {
    gateway_mac: Mac,
    /// The frame that is being made; it begins where its headers leave no gap before [`L4`].
    scratch: Vec<u8>,
    /// A fragment of it.
    fragment: Vec<u8>,
    /// Identification of the last packet to each port.
    ids: PerPort<u32>,
}

impl FrameBuilder {
    /// Builds frames from this MAC.
    #[must_use]
    pub fn new(gateway_mac: Mac) -> FrameBuilder {
        FrameBuilder {
            gateway_mac,
            scratch: vec![0; L4 + usize::from(u16::MAX)],
            fragment: Vec::with_capacity(2048),
            ids: PerPort::default(),
        }
    }

    /// Swaps the buffer of the frame that is being made for another one, which may be empty while no frame is made.
    pub fn exchange_scratch(&mut self, other: &mut Vec<u8>) {
        std::mem::swap(&mut self.scratch, other);
    }

    /// A port was added; its identifications begin after `id`.
    pub fn add_port(&mut self, slot: u32, id: u32) {
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

    /// Sends the `len` bytes of [`FrameBuilder::transport`] to a port, in fragments where they exceed the MTU. The packet
    /// gets an identification of the port's. Offsets in `meta` count from the start of the frame.
    ///
    /// # Errors
    /// [`DropReason::Oversized`], [`DropReason::NoEndpoint`] without such a port, and
    /// [`DropReason::UnsupportedProtocol`] for addresses of two families.
    #[inline]
    pub fn send<E: Effects>(
        &mut self,
        link: &mut Link<'_, E>,
        slot: u32,
        mac: Mac,
        mut ip: IpHeader,
        len: usize,
        meta: FrameMeta,
    ) -> Result<(), DropReason> {
        let mtu = usize::from(link.lan.port(slot).ok_or(DropReason::NoEndpoint)?.config.mtu);
        let id = self.ids.get_mut(slot).map_or(0, |id| {
            *id = id.wrapping_add(1);
            *id
        });
        if ip.src.is_ipv4() != ip.dst.is_ipv4() {
            return Err(DropReason::UnsupportedProtocol);
        }
        ip.id = id as u16;
        let start = L4.saturating_sub(ether::HEADER_LEN).saturating_sub(ip.len());
        let frame = self.scratch.get_mut(start..L4.saturating_add(len)).ok_or(DropReason::Oversized)?;
        if frame.len() > FRAME_MAX {
            return Err(DropReason::Oversized);
        }
        Ether { dst: mac, src: self.gateway_mac, ethertype: ip.ethertype() }.emit(frame);
        ip.emit(frame.get_mut(ether::HEADER_LEN..).unwrap_or(&mut []), len);
        if meta.gso.is_some() || len <= mtu.saturating_sub(ip.len()) {
            link.lan.transmit(slot, frame, meta, link.fx);
            return Ok(());
        }
        let (ethernet, packet) = frame.split_at(ether::HEADER_LEN);
        let fits = frame::fragments(packet, mtu, id, |header, data| {
            self.fragment.clear();
            self.fragment.extend_from_slice(ethernet);
            self.fragment.extend_from_slice(header);
            self.fragment.extend_from_slice(data);
            link.lan.transmit(slot, &self.fragment, FrameMeta::default(), link.fx);
        });
        if fits { Ok(()) } else { Err(DropReason::Oversized) }
    }

    /// Sends a datagram to a guest, or several of `segment` bytes each when that is not 0.
    ///
    /// # Errors
    /// As [`FrameBuilder::send`].
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
        let large = room >= size * 2 && size <= mtu.saturating_sub(udp::LEN.saturating_add(ip_len(dst)));
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
        let port = link.lan.port(slot).ok_or(DropReason::NoEndpoint)?;
        let len = payload.len().saturating_add(udp::LEN);
        let l3_len = ip_len(dst);
        let fits = len <= usize::from(port.config.mtu).saturating_sub(l3_len);
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
            meta = FrameMeta {
                csum: Csum::Partial { start: ether::HEADER_LEN.saturating_add(l3_len) as u16, offset: 6 },
                gso,
            };
        } else {
            udp::emit(b, src.ip(), dst.ip(), src.port(), dst.port());
        }
        self.send(link, slot, mac, header(src.ip(), dst.ip(), proto::UDP), len, meta)
    }
}

/// The IP header of a packet that starts here and may be fragmented.
#[inline]
pub(crate) fn header(src: IpAddr, dst: IpAddr, proto: u8) -> IpHeader {
    IpHeader { src, dst, proto, ttl: TTL, tos: 0, id: 0, frag: 0 }
}

/// Length of the IP header of a packet to this address.
fn ip_len(dst: SocketAddr) -> usize {
    if dst.is_ipv4() { ipv4::MIN_LEN } else { ipv6::LEN }
}
