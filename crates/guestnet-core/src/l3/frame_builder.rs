//! Theory of operation: frames that are made here. The transport bytes are laid at a fixed place of one
//! scratch buffer, the headers in front of them; what exceeds the port's MTU goes out as IPv4 fragments, and
//! several datagrams of one size as one large frame where the port takes those.

use crate::interface::effects::Effects;
use crate::interface::stats::DropReason;
use crate::interface::types::{Csum, FrameMeta, Gso};
use crate::l2::switch::transmit;
use crate::network::{FRAME_MAX, Network};
use crate::tables::port::Port;
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::ipv4::{self, Ipv4};
use guestnet_wire::{checksum, proto, put, udp};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Where the IPv4 header is.
pub(crate) const L3: usize = ether::HEADER_LEN;
/// Where the transport header is.
pub(crate) const L4: usize = L3 + ipv4::MIN_LEN;

/// The addresses of a packet that is made here.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Envelope {
    pub mac: Mac,
    pub src: Ipv4Addr,
    pub dst: Ipv4Addr,
    pub proto: u8,
    pub ttl: u8,
    pub tos: u8,
}

/// TTL of packets that arise here, and of relayed ones whose own is not known (RFC 1122 3.2.1.7).
pub(crate) const TTL: u8 = 64;

impl Network {
    /// Room for `len` transport bytes in the scratch buffer.
    pub(crate) fn l4_buffer(&mut self, len: usize) -> Result<&mut [u8], DropReason> {
        self.scratch.get_mut(L4..L4 + len).ok_or(DropReason::Oversized)
    }

    fn headers(&mut self, e: &Envelope, len: usize, id: u16, frag: u16) {
        let eth = Ether { dst: e.mac, src: self.cfg.gateway_mac, ethertype: ether::IPV4 };
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

    /// Sends the `len` transport bytes in the scratch buffer, in fragments where they exceed the MTU.
    pub(crate) fn send_ipv4<E: Effects>(
        &mut self,
        slot: u32,
        e: &Envelope,
        len: usize,
        meta: FrameMeta,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        if L4 + len > FRAME_MAX {
            return Err(DropReason::Oversized);
        }
        let mtu = usize::from(self.ports.get(slot).ok_or(DropReason::NoEndpoint)?.config.mtu);
        let id = self.ports.get_mut(slot).map_or(0, Port::next_ip_id);
        if meta.gso.is_some() || ipv4::MIN_LEN + len <= mtu {
            self.headers(e, len, id, 0);
            let port = self.ports.get_mut(slot).ok_or(DropReason::NoEndpoint)?;
            transmit(port, self.scratch.get(..L4 + len).unwrap_or(&[]), meta, fx);
            return Ok(());
        }
        let step = mtu.saturating_sub(ipv4::MIN_LEN) & !7;
        if step == 0 {
            return Err(DropReason::Oversized);
        }
        let mut at = 0;
        while at < len {
            let n = step.min(len - at);
            let more = if at + n < len { ipv4::MF } else { 0 };
            self.headers(e, n, id, more | (at / 8) as u16);
            self.piece.clear();
            self.piece.extend_from_slice(self.scratch.get(..L4).unwrap_or(&[]));
            self.piece.extend_from_slice(self.scratch.get(L4 + at..L4 + at + n).unwrap_or(&[]));
            let port = self.ports.get_mut(slot).ok_or(DropReason::NoEndpoint)?;
            transmit(port, &self.piece, FrameMeta::default(), fx);
            at += n;
        }
        Ok(())
    }

    /// Sends a datagram, or several of `segment` bytes each when that is not 0, to a guest.
    #[allow(clippy::too_many_arguments)] // One datagram has that many fields.
    pub(crate) fn send_udp<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        src: SocketAddr,
        dst: SocketAddr,
        payload: &[u8],
        segment: u16,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let port = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?;
        let (gso_max, mtu) = (port.config.gso_max as usize, usize::from(port.config.mtu));
        let size = usize::from(segment);
        if size == 0 || payload.len() <= size {
            return self.send_datagrams(slot, mac, src, dst, payload, None, fx);
        }
        // Pieces over the MTU cannot be left to the port: it would not fragment them.
        let room = gso_max.min(65507);
        let large = room >= size * 2 && ipv4::MIN_LEN + udp::LEN + size <= mtu;
        // Linux takes at most 64 pieces everywhere (UDP_MAX_SEGMENTS before 6.9).
        let step = if large { size * (room / size).min(64) } else { size };
        for chunk in payload.chunks(step) {
            let gso = (chunk.len() > size).then_some(Gso::Udp(segment));
            self.send_datagrams(slot, mac, src, dst, chunk, gso, fx)?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // As above.
    fn send_datagrams<E: Effects>(
        &mut self,
        slot: u32,
        mac: Mac,
        src: SocketAddr,
        dst: SocketAddr,
        payload: &[u8],
        gso: Option<Gso>,
        fx: &mut E,
    ) -> Result<(), DropReason> {
        let (IpAddr::V4(src4), IpAddr::V4(dst4)) = (src.ip(), dst.ip()) else {
            return Err(DropReason::UnsupportedProtocol);
        };
        let port = self.ports.get(slot).ok_or(DropReason::NoEndpoint)?;
        let len = udp::LEN + payload.len();
        let fits = ipv4::MIN_LEN + len <= usize::from(port.config.mtu);
        let offload = gso.is_some() || port.config.gso_max > 0 && fits;
        let b = self.l4_buffer(len)?;
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
        self.send_ipv4(slot, &e, len, meta, fx)
    }
}
