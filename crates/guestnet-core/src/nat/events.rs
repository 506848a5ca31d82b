//! Theory of operation: what a network that owns an engine needs besides translation.
//!
//! - Events: one for each connection that begins or ends, recorded as it happens and taken after each call.
//! - Connections by number, for lists of flows.
//! - The end of all connections of a guest that has left.

use crate::nat::engine::NatEngine;
use crate::nat::stats::Connection;
use crate::nat::table::records::Session;
use crate::nat::table::state::TICK_BITS;
use crate::nat::types::NatEvent;
use std::net::{Ipv4Addr, SocketAddrV4};

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
    /// Records events from now on. The list grows until [`NatEngine::take_events`]: call that after every call that
    /// translates or expires.
    pub fn record_events(&mut self) {
        self.table.events.get_or_insert_with(|| Vec::with_capacity(64));
    }

    /// Swaps the list, oldest first, with `into`, which should be empty.
    #[inline]
    pub fn take_events(&mut self, into: &mut Vec<NatEvent>) {
        if let Some(events) = self.table.events.as_mut().filter(|n| !n.is_empty()) {
            std::mem::swap(events, into);
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
