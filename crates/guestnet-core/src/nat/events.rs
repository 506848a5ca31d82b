//! Theory of operation: what a network that owns an engine needs besides translating: to hear of each connection
//! that begins and ends (a list that is filled as it happens and taken after each call), to look one up by
//! its number, to end all of a guest that left, and to pass a packet that stands for several (GSO).

use crate::nat::engine::NatEngine;
use crate::nat::stats::Connection;
use crate::nat::table::records::Session;
use crate::nat::table::state::TICK_BITS;
use std::net::{Ipv4Addr, SocketAddrV4};

/// Something that happened to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NatEvent {
    /// It began.
    Began {
        /// Its number, which another may have after its end.
        id: u32,
        /// The outside opened it, through a published port or a mapping.
        inbound: bool,
    },
    /// It ended.
    Ended {
        /// Its number.
        id: u32,
        /// IP bytes outbound.
        bytes_out: u64,
        /// IP bytes inbound.
        bytes_in: u64,
    },
}

impl Connection {
    pub(super) fn of(s: &Session) -> Connection {
        let at = |ip: u32, port| SocketAddrV4::new(Ipv4Addr::from(ip), port);
        Connection {
            proto: s.proto,
            state: s.state,
            internal: at(s.int_ip, s.int_port),
            external: at(s.ext_ip, s.ext_port),
            remote: at(s.rem_ip, s.rem_port),
            bytes_out: s.bytes_out,
            bytes_in: s.bytes_in,
        }
    }
}

impl NatEngine {
    /// Keeps a list of what begins and ends from now on. It grows until [`NatEngine::take_peer_updates`]: call that
    /// after every call that translates or expires.
    pub fn keep_news(&mut self) {
        self.table.news.get_or_insert_with(|| Vec::with_capacity(64));
    }

    /// Swaps the list, oldest first, with `into`, which should be empty.
    #[inline]
    pub fn take_peer_updates(&mut self, into: &mut Vec<NatEvent>) {
        if let Some(news) = self.table.news.as_mut().filter(|n| !n.is_empty()) {
            std::mem::swap(news, into);
        }
    }

    /// The connection with this number, unless it is over.
    #[must_use]
    pub fn connection(&self, id: u32) -> Option<Connection> {
        self.table.sessions.get(id).filter(|s| s.proto != 0).map(Connection::of)
    }

    /// The live connections with their numbers, and for how many milliseconds each has been idle (in steps of
    /// 67).
    pub fn numbered_connections(&self) -> impl Iterator<Item = (u32, Connection, u64)> {
        let sessions = self.table.sessions.items.iter().enumerate();
        sessions.filter(|(_, s)| s.proto != 0 && s.expires > self.tick).map(|(id, s)| {
            let left = s.expires - self.tick;
            let idle =
                self.timers.ticks[s.state as usize % crate::nat::table::state::COUNT].saturating_sub(left);
            (id as u32, Connection::of(s), (u64::from(idle) << TICK_BITS) / 1_000_000)
        })
    }

    /// Ends all connections of an internal address, before another guest gets it. Published ports that lead to it
    /// stay.
    pub fn end_endpoint(&mut self, internal: Ipv4Addr) -> usize {
        let ip = u32::from(internal);
        let gone = self.end_where(|s| s.int_ip == ip);
        self.table.disown_held(ip);
        gone
    }

    pub(super) fn end_where(&mut self, fits: impl Fn(&Session) -> bool) -> usize {
        let of_it = |(id, s): (usize, &Session)| (s.proto != 0 && fits(s)).then_some(id as u32);
        let gone: Vec<u32> = self.table.sessions.items.iter().enumerate().filter_map(of_it).collect();
        for id in &gone {
            self.table.remove_session(*id, self.tick);
        }
        gone.len()
    }
}
