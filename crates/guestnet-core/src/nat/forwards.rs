//! Theory of operation: published ports. A change either happens as a whole or changes nothing and says why:
//!
//! - whatever can be refused is checked before the first change;
//! - room is made from connections that are over, never from live ones;
//! - a port that is retargeted stays taken, so nobody else gets it in between.

use crate::nat::engine::NatEngine;
use crate::nat::table::Table;
use crate::nat::types::ForwardError;
use guestnet_wire::proto;
use std::net::SocketAddrV4;

impl NatEngine {
    /// Publishes `external` (DNAT) as `internal`, for TCP (6) or UDP (17). Everybody outside may use it.
    ///
    /// # Errors
    /// [`ForwardError`].
    pub fn add_forward(
        &mut self,
        protocol: u8,
        external: SocketAddrV4,
        internal: SocketAddrV4,
    ) -> Result<(), ForwardError> {
        if !matches!(protocol, proto::TCP | proto::UDP) {
            return Err(ForwardError::Protocol);
        }
        if external.port() == 0 {
            return Err(ForwardError::PortZero);
        }
        if !self.table.is_external(u32::from(*external.ip())) {
            return Err(ForwardError::NotExternal(*external.ip()));
        }
        self.check_internal(internal)?;
        self.with_room(|table| table.publish(protocol, end(external), end(internal)).map(|_| ()))
    }

    /// Makes a published port lead to another internal end. Its connections end: their guest has gone or moved.
    ///
    /// # Errors
    /// [`ForwardError`]; the port leads where it led before then, and its connections live on.
    pub fn retarget_forward(
        &mut self,
        protocol: u8,
        external: SocketAddrV4,
        internal: SocketAddrV4,
    ) -> Result<(), ForwardError> {
        self.check_internal(internal)?;
        let (ip, port) = end(external);
        let mapping = self.table.mapping_in(ip, port, protocol);
        let mapping = mapping.filter(|m| self.table.mappings.get(*m).is_some_and(|m| m.published));
        let mapping = mapping.ok_or(ForwardError::NotPublished(external))?;
        self.with_room(|table| table.check_retarget(mapping, *internal.ip()))?;
        self.end_where(|s| s.mapping == mapping);
        self.table.retarget(mapping, end(internal));
        Ok(())
    }

    fn check_internal(&self, internal: SocketAddrV4) -> Result<(), ForwardError> {
        if internal.port() == 0 {
            return Err(ForwardError::PortZero);
        }
        if !self.config.internal.contains(*internal.ip()) {
            return Err(ForwardError::NotInternal(*internal.ip()));
        }
        Ok(())
    }

    /// Does something to the table, and again without the connections whose time is over if it failed with them.
    fn with_room(
        &mut self,
        mut step: impl FnMut(&mut Table) -> Result<(), ForwardError>,
    ) -> Result<(), ForwardError> {
        let done = step(&mut self.table);
        if done.is_ok() || self.settled() {
            return done;
        }
        self.settle();
        step(&mut self.table)
    }

    /// Takes a published port back; connections through it live on. False when it was not published.
    pub fn remove_forward(&mut self, protocol: u8, external: SocketAddrV4) -> bool {
        let (ip, port) = end(external);
        self.table.unpublish(protocol, (ip, port), self.tick)
    }
}

/// An address and port as the table has them.
fn end(a: SocketAddrV4) -> (u32, u16) {
    (u32::from(*a.ip()), a.port())
}
