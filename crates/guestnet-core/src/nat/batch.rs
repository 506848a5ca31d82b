//! Theory of operation: most packets are plain TCP or UDP of a known connection. They go in groups of 32 through
//! four short loops: read headers and hash; read the index; read the record; rewrite. Each loop's memory
//! accesses do not depend on each other, so the processor has many under way at once. Whatever is not plain
//! (options, fragments, ICMP, TTL, a new connection, a change of state) goes the long way in its turn, and
//! the result is the same as packet by packet.

use crate::interface::stats::DropReason;
use crate::interface::types::Time;
use crate::nat::config::unicast;
use crate::nat::engine::NatEngine;
use crate::nat::table::index::Index;
use crate::nat::table::prefetch::GROUP;
use crate::nat::table::records::Key;
use crate::nat::table::state::ConnState;
use crate::nat::{NatDirection, NatResult};
use guestnet_wire::checksum::adjust;
use guestnet_wire::proto;
use guestnet_wire::tcp::flags::{FIN, RST, SYN};

/// A number of IP packets that can be changed in place.
pub trait PacketBatch {
    /// How many.
    fn len(&self) -> usize;
    /// True for none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Packet `i`, `i < len()`; empty where there is none.
    fn packet(&mut self, i: usize) -> &mut [u8];
}

impl PacketBatch for [&mut [u8]] {
    fn len(&self) -> usize {
        <[_]>::len(self)
    }
    #[inline(always)]
    fn packet(&mut self, i: usize) -> &mut [u8] {
        self.get_mut(i).map_or(&mut [], |p| p)
    }
}

impl PacketBatch for [Vec<u8>] {
    fn len(&self) -> usize {
        <[_]>::len(self)
    }
    #[inline(always)]
    fn packet(&mut self, i: usize) -> &mut [u8] {
        self.get_mut(i).map_or(&mut [], Vec::as_mut_slice)
    }
}

/// Packets in one buffer, each as start and length in bytes. Spans outside the buffer are empty packets.
#[derive(Debug)]
pub struct Contiguous<'a> {
    /// The buffer.
    pub buffer: &'a mut [u8],
    /// Start and length of each packet.
    pub spans: &'a [(u32, u32)],
}

impl PacketBatch for Contiguous<'_> {
    fn len(&self) -> usize {
        self.spans.len()
    }
    #[inline(always)]
    fn packet(&mut self, i: usize) -> &mut [u8] {
        let Some((start, len)) = self.spans.get(i).copied() else { return &mut [] };
        let start = start as usize;
        self.buffer.get_mut(start..start + len as usize).unwrap_or(&mut [])
    }
}

/// What the first loop learns of a packet.
#[derive(Clone, Copy, Default)]
struct Plain {
    key: Key,
    hash: u64,
    slot: u32,
    /// Length by the IP header; 0 for a packet that goes the long way.
    total: u32,
    flags: u8,
}

/// Reads a packet if it is plain.
#[inline(always)]
fn plain(p: &[u8], outbound: bool, mtu: u32, min_ttl: u8) -> Option<Plain> {
    let h = p.first_chunk::<28>()?;
    let word = |i: usize| u32::from_be_bytes([h[i], h[i + 1], h[i + 2], h[i + 3]]);
    let total = word(0) & 0xffff;
    if h[0] != 0x45 || total as usize > p.len() || total > mtu || h[8] < min_ttl {
        return None;
    }
    // No fragment; "don't fragment" may be set.
    if word(4) & 0xbfff != 0 {
        return None;
    }
    let mut flags = 0;
    match h[9] {
        proto::UDP => {
            let len = word(24) >> 16;
            if total < 28 || len < 8 || len > total - 20 {
                return None;
            }
        }
        proto::TCP => {
            let h = p.first_chunk::<40>()?;
            let len = u32::from(h[32] >> 4) * 4;
            if len < 20 || len + 20 > total {
                return None;
            }
            flags = h[33] & (SYN | FIN | RST);
        }
        _ => return None,
    }
    let (src, dst, ports) = (word(12), word(16), word(20));
    let (sport, dport) = ((ports >> 16) as u16, ports as u16);
    let key = if outbound {
        Key { local: src, remote: dst, local_port: sport, remote_port: dport, proto: h[9] }
    } else {
        Key { local: dst, remote: src, local_port: dport, remote_port: sport, proto: h[9] }
    };
    Some(Plain { key, hash: 0, slot: 0, total, flags })
}

impl NatEngine {
    /// Translates a batch; `results` gets what became of each packet (as many as both have). The outcome is
    /// that of [`NatEngine::translate`] on each in turn, as long as no two packets share bytes. (Expired connections
    /// are collected at another pace, and one that is not collected yet still has its port: so a new connection
    /// may get another port than in turn.)
    pub fn translate_batch<B: PacketBatch + ?Sized>(
        &mut self,
        packets: &mut B,
        direction: NatDirection,
        now: Time,
        results: &mut [NatResult],
    ) {
        self.set_time(now);
        let n = packets.len().min(results.len());
        let mut from = 0;
        while from < n {
            let count = GROUP.min(n - from);
            if self.tick >= self.table.due {
                self.reap(2 * GROUP);
            }
            let Some(out) = results.get_mut(from..from + count) else { return };
            match direction {
                NatDirection::Outbound => self.group::<B, true>(packets, from, out),
                NatDirection::Inbound => self.group::<B, false>(packets, from, out),
            }
            from += count;
        }
    }

    fn group<B: PacketBatch + ?Sized, const OUT: bool>(
        &mut self,
        packets: &mut B,
        from: usize,
        results: &mut [NatResult],
    ) {
        let direction = if OUT { NatDirection::Outbound } else { NatDirection::Inbound };
        let mtu = u32::from(if OUT { self.config.mtu_outside } else { self.config.mtu_inside });
        let min_ttl = if self.config.decrement_ttl { 2 } else { 0 };
        let ttl_step = u8::from(self.config.decrement_ttl);
        let refresh = self.timers.plain[usize::from(!OUT)];
        let mut group = [Plain::default(); GROUP];
        let count = results.len().min(GROUP);
        let group = &mut group[..count];

        for (i, g) in group.iter_mut().enumerate() {
            if let Some(p) = plain(packets.packet(from + i), OUT, mtu, min_ttl) {
                *g = p;
                g.hash = p.key.hash(&self.table.keys);
            }
        }
        let index = if OUT { &self.table.out } else { &self.table.inn };
        for g in group.iter_mut() {
            g.slot = index.first(g.hash);
        }
        let mut touched = 0;
        let mut fresh = 0;
        for g in group.iter_mut() {
            g.slot = index.likely(g.hash, g.slot);
            match Index::record(g.slot) {
                Some(r) => touched ^= self.table.sessions.get(r).map_or(0, |s| s.expires),
                None => fresh += usize::from(g.total != 0),
            }
        }
        std::hint::black_box(touched);
        if OUT && fresh > 1 {
            let mut keys = [Key::default(); GROUP];
            let mut n = 0;
            for g in group.iter().filter(|g| g.slot == 0 && g.total != 0) {
                keys[n] = g.key;
                n += 1;
            }
            self.table.release_held(self.tick, 64);
            self.table.foresee(&keys[..n]);
        }

        let (mut hits, mut opened) = (0, 0);
        for (i, (g, result)) in group.iter_mut().zip(results.iter_mut()).enumerate() {
            let p = packets.packet(from + i);
            let new = OUT && g.slot == 0 && self.open(g).is_some();
            *result = match self.short_way::<OUT>(p, g, &refresh, ttl_step) {
                Some(()) => {
                    if new {
                        opened += 1;
                    } else {
                        hits += 1;
                    }
                    NatResult::Translated
                }
                None => self.translate_now(p, direction),
            };
        }
        self.stats.hits += hits;
        self.stats.misses += opened;
        if OUT {
            self.stats.outbound += hits + opened;
        } else {
            self.stats.inbound += hits;
        }
    }

    /// Makes the connection of a plain UDP packet for which there is none, where nothing speaks against it and
    /// nothing has to be given up for it: all else is decided on the long way. What is left to do with the packet
    /// is what is done with any other of the connection.
    #[inline]
    fn open(&mut self, g: &mut Plain) -> Option<()> {
        let (k, c) = (g.key, &self.config);
        let plain = g.total != 0
            && k.proto == proto::UDP
            && k.local_port != 0
            && !matches!(k.remote_port, 0 | 53)
            && c.internal.has(k.local)
            && !c.internal.has(k.remote)
            && c.no_nat.is_empty()
            && c.denied.is_empty()
            && unicast(k.remote)
            && !self.table.is_external(k.remote);
        // An earlier packet of the group may have made it.
        if !plain || self.table.find_hashed(&k, g.hash).is_some() {
            return None;
        }
        let expires = self.tick.saturating_add(self.timers.ticks[ConnState::Udp as usize]);
        let id = self.table.new_session(&k, None, ConnState::Udp, expires, 0, self.tick).ok()?;
        self.stats.created += 1;
        g.slot = Index::naming(id);
        Some(())
    }

    /// Rewrites a plain packet of a connection that only needs its deadline moved; `None` for all else.
    #[inline(always)]
    fn short_way<const OUT: bool>(
        &mut self,
        p: &mut [u8],
        g: &Plain,
        refresh: &[u32; crate::nat::table::state::COUNT],
        ttl_step: u8,
    ) -> Option<()> {
        if g.total == 0 || g.flags != 0 {
            return None;
        }
        let mut id = Index::record(g.slot)?;
        let same =
            |s: &crate::nat::table::records::Session| if OUT { s.is_out(&g.key) } else { s.is_in(&g.key) };
        if !self.table.sessions.get(id).is_some_and(same) {
            let index = if OUT { &self.table.out } else { &self.table.inn };
            id = index.find(g.hash, |r| self.table.sessions.get(r).is_some_and(same))?;
        }
        let tick = self.tick;
        let s = self.table.sessions.get_mut(id)?;
        let ticks = refresh[s.state as usize % crate::nat::table::state::COUNT];
        if ticks == 0 || s.expires <= tick || s.links.spare != 0 {
            return None;
        }
        let is_tcp = g.key.proto == proto::TCP;
        debug_assert!(!matches!(s.state, ConnState::Dns));
        s.expires = tick.saturating_add(ticks);
        let (ip, port, delta_ip, delta_l4);
        if OUT {
            s.bytes_out += u64::from(g.total);
            (ip, port, delta_ip, delta_l4) = (s.ext_ip, s.ext_port, s.delta_ip, s.delta_l4);
        } else {
            s.bytes_in += u64::from(g.total);
            (ip, port, delta_ip, delta_l4) = (s.int_ip, s.int_port, !s.delta_ip, !s.delta_l4);
        }
        let h = p.first_chunk_mut::<28>()?;
        // TTL and protocol are one word; taking one from the TTL takes 0x0100 from it.
        let ttl_delta = if ttl_step == 0 { 0 } else { !0x0100u16 };
        // Wrapping: two packets of a batch may be the same bytes.
        h[8] = h[8].wrapping_sub(ttl_step);
        let sum = adjust(adjust(u16::from_be_bytes([h[10], h[11]]), delta_ip), ttl_delta).to_be_bytes();
        (h[10], h[11]) = (sum[0], sum[1]);
        let (ip, port) = (ip.to_be_bytes(), port.to_be_bytes());
        if OUT {
            h[12..16].copy_from_slice(&ip);
            h[20..22].copy_from_slice(&port);
        } else {
            h[16..20].copy_from_slice(&ip);
            h[22..24].copy_from_slice(&port);
        }
        if is_tcp {
            let h = p.first_chunk_mut::<40>()?;
            let sum = adjust(u16::from_be_bytes([h[36], h[37]]), delta_l4).to_be_bytes();
            (h[36], h[37]) = (sum[0], sum[1]);
        } else {
            let old = u16::from_be_bytes([h[26], h[27]]);
            if old != 0 {
                let new = adjust(old, delta_l4);
                let new = if new == 0 { 0xffff } else { new }.to_be_bytes();
                (h[26], h[27]) = (new[0], new[1]);
            }
        }
        Some(())
    }
}

const _: () = assert!(size_of::<NatResult>() <= 4 && size_of::<DropReason>() == 1);
