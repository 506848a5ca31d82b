//! Theory of operation: a shard on the way to its worker. [`NewShard`] carries what the shard is made of, because a shard
//! is built on the thread that it runs on. The worker's half holds a [`Presence`], whose end is what the control side's half
//! ([`crate::runtime::shard_handle`]) waits for.

use crate::attachment::quota::Quota;
use crate::control::command::{Queued, Waker};
use crate::control::event::{EventSender, EventSignal};
use crate::os::epoll::Poller;
use crate::runtime::config::WorkerConfig;
use crate::runtime::io_context::IoContext;
use crate::runtime::links::ShardLinks;
use crate::runtime::shard::Shard;
use crate::runtime::stats::Published;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Whether a shard runs.
#[derive(Default)]
pub(super) struct Life {
    pub(super) failed_or_ended: AtomicBool,
    pub(super) ended: Mutex<bool>,
    pub(super) changed: Condvar,
}

/// A shard exists as long as this does.
pub(crate) struct Presence {
    pub(super) life: Arc<Life>,
    pub(super) events: EventSignal,
}

impl Presence {
    /// It does not work any more, or is about to end.
    pub(crate) fn unhealthy(&self) {
        self.life.failed_or_ended.store(true, Ordering::SeqCst);
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.unhealthy();
        *self.life.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.life.changed.notify_all();
        self.events.signal();
    }
}

/// What a shard is made of, on the way to its worker.
pub(crate) struct NewShard {
    pub(super) config: WorkerConfig,
    pub(super) quota: Arc<Quota>,
    pub(super) poller: Poller,
    pub(super) waker: Arc<Waker>,
    pub(super) events: EventSender,
    pub(super) queue: rtrb::Consumer<Queued>,
    pub(super) links: Option<Box<ShardLinks>>,
    pub(super) published: Arc<Published>,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) presence: Presence,
}

impl NewShard {
    /// The shard, on the thread that it is to be on.
    pub(crate) fn build(self) -> (Box<Shard>, Presence) {
        let NewShard { config, quota, poller, waker, events, queue, links, published, stop, presence } = self;
        let mut io = IoContext::new(poller, events, quota);
        io.links = links;
        io.port_names = config.port_names.clone();
        io.socks.source = config.source.clone();
        io.socks.proxy.clone_from(&config.proxy);
        (Box::new(Shard::new(config, io, queue, waker, published, stop)), presence)
    }
}
