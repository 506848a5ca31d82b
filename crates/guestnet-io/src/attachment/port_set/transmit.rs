//! Theory of operation: frames to guests. One is written at once (TAP) or queued (sockets) and sent at the end
//! of the batch. A large frame is cut and a partial checksum completed where the attachment cannot.

use super::{Attachment, Port, PortSet};
use crate::attachment::tap::{self, Deferred, WriteOutcome};
use crate::attachment::{Flushed, QUEUE_LOW, QUEUE_MAX, reason, vhost_user, vnet};
use crate::control::event::{Event, EventSender, Level};
use crate::os::epoll::{Kind, Poller, Token};
use crate::os::io_uring::{Batch, Submitter};
use crate::runtime::stats::IoCounters;
use guestnet_core::effects::TxError;
use guestnet_core::types::{Csum, FrameMeta, PortId, Time};
use guestnet_wire::gso;

/// How long a peer that is full without telling is left alone, in nanoseconds.
const RETRY: u64 = 1_000_000;

/// What sending needs besides the ports.
pub(crate) struct TxContext<'a> {
    pub poller: &'a Poller,
    pub events: &'a mut EventSender,
    pub counters: &'a mut IoCounters,
    pub submitter: &'a mut Submitter,
    pub now: Time,
}

impl PortSet {
    /// Sends a frame: its front, with all headers, and the rest.
    pub(crate) fn transmit(
        &mut self,
        out: &mut TxContext<'_>,
        id: PortId,
        front: &[u8],
        rest: &[u8],
        meta: FrameMeta,
    ) -> Result<(), TxError> {
        let slot = self.find(id).ok_or(TxError::Gone)?;
        let Some(port) = self.slab.get_mut(slot) else { return Err(TxError::Gone) };
        match &mut port.attachment {
            Attachment::None => {
                out.counters.unattached_frames += 1;
                return Ok(());
            }
            Attachment::Tap(tap) if tap.takes(&meta) => {
                // Behind a frame that it did not take, the TAP says itself how things are.
                if out.submitter.is_on() && !port.out_watched {
                    // What wakes the guest goes in one call at the end of the batch.
                    match tap.defer(&meta, front, rest) {
                        Deferred::Yes => return Ok(()),
                        Deferred::First => {
                            self.taps.push(slot);
                            return Ok(());
                        }
                        Deferred::No => {}
                    }
                }
                if tap.waits() {
                    self.flush_tap(out, slot);
                }
                let Some(Port { attachment: Attachment::Tap(tap), .. }) = self.slab.get_mut(slot) else {
                    return Err(TxError::Gone);
                };
                let sent = if meta.gso.is_some() && !matches!(meta.csum, Csum::Partial { .. }) {
                    // The kernel takes large frames only with a checksum that is begun.
                    let mut meta = meta;
                    linearize(&mut self.linear, front, rest);
                    if vnet::begin_checksum(&mut self.linear, &mut meta) {
                        tap.write(&meta, &self.linear, &[])
                    } else {
                        WriteOutcome::Refused
                    }
                } else {
                    tap.write(&meta, front, rest)
                };
                return self.wrote(out, slot, sent);
            }
            Attachment::VhostUser(v) => {
                let segmented = &mut out.counters.segmented_frames;
                match v.send(&mut self.linear, segmented, front, rest, meta) {
                    vhost_user::WriteOutcome::Yes => {}
                    vhost_user::WriteOutcome::Full => {
                        port.owed = true;
                        return Err(TxError::Full);
                    }
                    vhost_user::WriteOutcome::Refused => out.counters.refused_frames += 1,
                    vhost_user::WriteOutcome::NotAllocated => out.counters.unallocated_frames += 1,
                    vhost_user::WriteOutcome::Unplugged => out.counters.unattached_frames += 1,
                }
                if !port.dirty {
                    port.dirty = true;
                    self.dirty.push(slot);
                }
                return Ok(());
            }
            Attachment::Memory if !out.events.frame_room() => {
                port.owed = true;
                self.events_full = true;
                return Err(TxError::Full);
            }
            a if a.waiting() >= QUEUE_MAX => {
                port.owed = true;
                return Err(TxError::Full);
            }
            _ => {}
        }
        if matches!(&port.attachment, Attachment::Tap(tap) if tap.waits()) {
            self.flush_tap(out, slot);
        }
        let Some(port) = self.slab.get_mut(slot) else { return Err(TxError::Gone) };
        let mut last = WriteOutcome::Yes;
        if let Some(gso) = meta.gso {
            out.counters.segmented_frames += 1;
            let whole = if rest.is_empty() {
                front
            } else {
                linearize(&mut self.linear, front, rest);
                &self.linear
            };
            let done = gso::segment(whole, gso, |header, piece| {
                let sent = put(port, out.events, header, piece, Csum::Full);
                if sent != WriteOutcome::Yes {
                    last = sent;
                }
            });
            if done.is_err() {
                last = WriteOutcome::Refused;
            }
        } else if matches!(port.attachment, Attachment::Tap(_) | Attachment::Memory)
            && let Csum::Partial { start, offset } = meta.csum
        {
            linearize(&mut self.linear, front, rest);
            last = match gso::complete_checksum(&mut self.linear, start, offset) {
                Ok(()) => put(port, out.events, &self.linear, &[], Csum::Full),
                Err(_) => WriteOutcome::Refused,
            };
        } else {
            last = put(port, out.events, front, rest, meta.csum);
        }
        if !port.dirty && matches!(port.attachment, Attachment::Stream(_) | Attachment::Dgram(_)) {
            port.dirty = true;
            self.dirty.push(slot);
        }
        let heavy = match &port.attachment {
            Attachment::Stream(s) => s.is_heavy(),
            Attachment::Dgram(d) => d.is_heavy(),
            _ => false,
        };
        if heavy {
            self.flush_slot(out, slot);
        }
        self.wrote(out, slot, last)
    }

    fn wrote(&mut self, out: &mut TxContext<'_>, slot: u32, sent: WriteOutcome) -> Result<(), TxError> {
        self.told(out.poller, out.counters, slot, sent)
    }

    fn told(
        &mut self,
        poller: &Poller,
        counters: &mut IoCounters,
        slot: u32,
        sent: WriteOutcome,
    ) -> Result<(), TxError> {
        match sent {
            WriteOutcome::Yes => Ok(()),
            WriteOutcome::Refused => {
                counters.refused_frames += 1;
                Ok(())
            }
            WriteOutcome::Full => {
                self.watch_out(poller, slot, true);
                if let Some(p) = self.slab.get_mut(slot) {
                    p.owed = true;
                }
                Err(TxError::Full)
            }
            WriteOutcome::Down(why) => {
                self.lost(slot, why);
                Ok(())
            }
        }
    }

    /// True when frames wait for the end of the batch.
    pub(crate) fn has_frames(&self) -> bool {
        !self.taps.is_empty()
    }

    /// Adds frames that wait to a run, as many as it takes; `slots` says whose each is.
    pub(crate) fn add_frames<'fd>(&'fd self, batch: &mut Batch<'_, 'fd>, slots: &mut Vec<u32>) {
        for slot in &self.taps {
            let Some(Port { attachment: Attachment::Tap(tap), .. }) = self.slab.get(*slot) else { continue };
            for frame in tap.waiting() {
                if batch.is_full() {
                    return;
                }
                batch.write(&tap.fd, frame);
                slots.push(*slot);
            }
        }
    }

    /// What became of frames of a run.
    pub(crate) fn did_frames(
        &mut self,
        poller: &Poller,
        counters: &mut IoCounters,
        slots: &[u32],
        results: &[i32],
    ) {
        for (slot, result) in slots.iter().zip(results) {
            let Some(Port { attachment: Attachment::Tap(tap), .. }) = self.slab.get_mut(*slot) else {
                continue;
            };
            let result = tap.gone_one(*result);
            if result < 0 {
                let sent = tap::lost("the TAP is gone", -result);
                // It was promised that it goes.
                if self.told(poller, counters, *slot, sent).is_err() {
                    counters.refused_frames += 1;
                }
            }
        }
        let slab = &self.slab;
        self.taps.retain(|slot| {
            matches!(slab.get(*slot), Some(Port { attachment: Attachment::Tap(tap), .. }) if tap.waits())
        });
    }

    /// Sends the frames that wait for one TAP, before others that do not wait.
    fn flush_tap(&mut self, out: &mut TxContext<'_>, slot: u32) {
        let mut slots = Vec::new();
        let Some(Port { attachment: Attachment::Tap(tap), .. }) = self.slab.get(slot) else { return };
        let mut batch = out.submitter.batch();
        for frame in tap.waiting() {
            batch.write(&tap.fd, frame);
            slots.push(slot);
        }
        let results = batch.run();
        self.did_frames(out.poller, out.counters, &slots, results);
    }

    fn watch_out(&mut self, poller: &Poller, slot: u32, on: bool) {
        let generation = self.slab.generation(slot);
        let Some(p) = self.slab.get_mut(slot) else { return };
        if p.out_watched == on {
            return;
        }
        p.out_watched = on;
        let events = if on { libc::EPOLLIN | libc::EPOLLOUT } else { libc::EPOLLIN };
        if let Some(fd) = p.attachment.fd() {
            let token = Token { kind: Kind::Port, index: slot, generation };
            if let Err(e) = poller.modify(fd, token, events) {
                self.lost(slot, reason("the attachment cannot be watched", e));
            }
        }
    }

    /// The descriptor of a port takes data again.
    pub(crate) fn out_ready(&mut self, out: &mut TxContext<'_>, slot: u32) {
        let Some(p) = self.slab.get_mut(slot) else { return };
        if matches!(p.attachment, Attachment::Tap(_)) {
            if std::mem::take(&mut p.owed) {
                self.writable.push(p.id);
            }
            self.watch_out(out.poller, slot, false);
        } else {
            self.flush_slot(out, slot);
        }
    }

    fn flush_slot(&mut self, out: &mut TxContext<'_>, slot: u32) {
        let Some(p) = self.slab.get_mut(slot) else { return };
        p.dirty = false;
        if let Attachment::VhostUser(v) = &mut p.attachment {
            v.flush();
            match v.take_fault() {
                Some(Ok(message)) => drop(out.events.try_send(Event::Log { level: Level::Warning, message })),
                Some(Err(why)) => self.lost(slot, why),
                None => {}
            }
            return;
        }
        let (flushed, blocked) = match &mut p.attachment {
            Attachment::Stream(s) => (s.flush(), &mut s.blocked),
            Attachment::Dgram(d) => {
                let flushed = d.flush();
                out.counters.refused_frames += std::mem::take(&mut d.refused);
                if d.has_stalled() {
                    self.stalled.push(p.id);
                }
                (flushed, &mut d.blocked)
            }
            _ => return,
        };
        *blocked = matches!(flushed, Flushed::Blocked | Flushed::Retry);
        if p.owed && p.attachment.waiting() < QUEUE_LOW {
            p.owed = false;
            self.writable.push(p.id);
        }
        match flushed {
            Flushed::All => self.watch_out(out.poller, slot, false),
            Flushed::Blocked => self.watch_out(out.poller, slot, true),
            Flushed::Retry => {
                if !self.retry.contains(&slot) {
                    self.retry.push(slot);
                }
                self.retry_at.get_or_insert(Time(out.now.0 + RETRY));
            }
            Flushed::Down(why) => self.lost(slot, why),
        }
    }

    /// The end of a batch: sends what waits and is not known to be blocked.
    pub(crate) fn flush(&mut self, out: &mut TxContext<'_>) {
        if self.retry_at.is_some_and(|t| t <= out.now) {
            self.retry_at = None;
            for slot in std::mem::take(&mut self.retry) {
                self.flush_slot(out, slot);
            }
        }
        let mut dirty = std::mem::take(&mut self.dirty);
        for slot in dirty.drain(..) {
            let blocked = match self.slab.get_mut(slot) {
                Some(p) => {
                    p.dirty = false;
                    match &p.attachment {
                        Attachment::Stream(s) => s.blocked,
                        Attachment::Dgram(d) => d.blocked,
                        Attachment::VhostUser(_) => false,
                        _ => true,
                    }
                }
                None => true,
            };
            if !blocked {
                self.flush_slot(out, slot);
            }
        }
        self.dirty = dirty;
        if self.events_full && out.events.frame_room_or_wake() {
            self.events_full = false;
            let owed = self.slab.iter().filter(|(_, p)| p.owed && matches!(p.attachment, Attachment::Memory));
            let owed: Vec<u32> = owed.map(|(i, _)| i).collect();
            for slot in owed {
                if let Some(p) = self.slab.get_mut(slot) {
                    p.owed = false;
                    self.writable.push(p.id);
                }
            }
        }
    }
}

fn linearize(linear: &mut Vec<u8>, front: &[u8], rest: &[u8]) {
    linear.clear();
    linear.extend_from_slice(front);
    linear.extend_from_slice(rest);
}

/// Hands one frame of MTU size to an attachment. `csum` is only ever partial for those that queue.
fn put(port: &mut Port, events: &mut EventSender, front: &[u8], rest: &[u8], csum: Csum) -> WriteOutcome {
    let queued = match &mut port.attachment {
        Attachment::Stream(s) => s.push(front, rest),
        Attachment::Dgram(d) => d.push(front, rest),
        Attachment::Tap(tap) => return tap.write(&FrameMeta::default(), front, rest),
        Attachment::Memory => {
            let frame = [front, rest].concat().into_boxed_slice();
            return if events.try_send(Event::Frame { port: port.id, frame }) {
                WriteOutcome::Yes
            } else {
                WriteOutcome::Refused
            };
        }
        // vhost-user cuts for itself.
        Attachment::None | Attachment::VhostUser(_) => return WriteOutcome::Refused,
    };
    // A field outside the frame is left alone: the receiver drops the frame for its checksum.
    if let Csum::Partial { start, offset } = csum
        && gso::complete_checksum(queued, start, offset).is_err()
    {
        return WriteOutcome::Refused;
    }
    WriteOutcome::Yes
}
