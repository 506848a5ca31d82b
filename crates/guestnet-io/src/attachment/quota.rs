//! Theory of operation: what peers can take of the process: descriptors of sockets and of attachments, address space for
//! guest memory, pages of guest memory that are allocated in this process's name, and the kernel's memory behind sockets.
//! Each of them is a pool of the whole process. A quota is what one party holds of every pool; quotas form a tree (a
//! front-end within its listener, that within its network), and a charge counts at every level up to the pool.
//!
//! The rule is that of flows (`Limits::descriptors` of the core): a party may hold at most four times what is
//! left of seven eighths of the pool. A party alone gets 70 %, one that comes when others hold much gets less,
//! and the last eighth is for parties that have next to nothing. A network that is the only one of its process may hold
//! all: its guests have shares of their own, in the core ([`Quota::budget`] tells it of how much).

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

/// How much of what is left a party may hold.
const SHARE: u64 = 4;
const GIB: u64 = 1 << 30;
/// The largest part of the address space that guest memory may fill: a quarter.
const ADDRESS_SPACE_PART: u64 = 4;
/// Guest memory that may be mapped, as a multiple of the memory of this machine.
const MAPPED_PER_MEMORY: u64 = 16;
/// The part of this process's memory that guest memory may be allocated from: a quarter.
const ALLOCATED_PART: u64 = 4;

/// What is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resource {
    /// Descriptors of attachments.
    Descriptors,
    /// Descriptors of sockets to the outside.
    Sockets,
    /// Bytes of address space that guest memory is mapped to.
    Mapped,
    /// Bytes of guest memory that were allocated by a write of this process, and are charged to it.
    Allocated,
    /// Bytes of the kernel's memory that connections hold, as measured.
    SocketMemory,
}

const RESOURCES: usize = 5;

impl Resource {
    /// What a party may hold whatever others hold, as long as there is any.
    fn least(self, all: u64) -> u64 {
        match self {
            // A front-end with one pair of queues and eight regions of memory.
            Resource::Descriptors | Resource::Sockets => 16,
            Resource::Mapped => all / 64,
            Resource::Allocated | Resource::SocketMemory => 1 << 20,
        }
    }
}

/// A party has its share, or the pool is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exceeded(Resource);

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Resource::Descriptors | Resource::Sockets => {
                "it would hold more than its share of the descriptors that guestnet may open; raise the limit \
                 (ulimit -n)"
            }
            Resource::Mapped => "it would map more than its share of the address space that guest memory may fill",
            Resource::Allocated => {
                "it would allocate more than its share of guestnet's memory for a guest whose memory is not \
                 allocated yet (prealloc=on)"
            }
            Resource::SocketMemory => "it would hold more than its share of the kernel's memory for sockets",
        })
    }
}

/// How much there is of everything, and how much of it is taken.
#[derive(Debug)]
pub(crate) struct Pool {
    all: [AtomicU64; RESOURCES],
    used: [AtomicU64; RESOURCES],
    /// Networks of the process.
    networks: AtomicU64,
}

impl Pool {
    pub(crate) fn new(descriptors: u64, mapped: u64, allocated: u64) -> Arc<Pool> {
        let pool = Pool {
            all: [const { AtomicU64::new(u64::MAX / 8) }; RESOURCES],
            used: [const { AtomicU64::new(0) }; RESOURCES],
            networks: AtomicU64::new(0),
        };
        pool.set(Resource::Descriptors, descriptors);
        pool.set(Resource::Mapped, mapped);
        pool.set(Resource::Allocated, allocated);
        Arc::new(pool)
    }

    /// The pool of this process.
    pub(crate) fn of_process() -> &'static Arc<Pool> {
        static POOL: LazyLock<Arc<Pool>> = LazyLock::new(|| {
            let (space, memory) = (address_space(), memory_of_machine());
            let mapped =
                (space / ADDRESS_SPACE_PART).min(memory.saturating_mul(MAPPED_PER_MEMORY).max(64 * GIB));
            Pool::new(for_attachments(1024), mapped, memory.min(memory_limit()) / ALLOCATED_PART)
        });
        &POOL
    }

    /// The process may have so many descriptors, and its sockets so much of the kernel's memory.
    pub(crate) fn set_limits(&self, descriptors: u64, socket_memory: u64) {
        self.set(Resource::Descriptors, for_attachments(descriptors));
        self.set(Resource::Sockets, descriptors - descriptors / 8);
        self.set(Resource::SocketMemory, socket_memory);
    }

    fn set(&self, resource: Resource, all: u64) {
        Pool::at(&self.all, resource).store(all, Ordering::Relaxed);
    }

    /// How much there is of a resource.
    pub(crate) fn all(&self, resource: Resource) -> u64 {
        Pool::at(&self.all, resource).load(Ordering::Relaxed)
    }

    fn used(&self, resource: Resource) -> u64 {
        Pool::at(&self.used, resource).load(Ordering::Relaxed)
    }

    fn at(cells: &[AtomicU64; RESOURCES], resource: Resource) -> &AtomicU64 {
        // The enum has as many values as the array places.
        let [descriptors, sockets, mapped, allocated, socket_memory] = cells;
        match resource {
            Resource::Descriptors => descriptors,
            Resource::Sockets => sockets,
            Resource::Mapped => mapped,
            Resource::Allocated => allocated,
            Resource::SocketMemory => socket_memory,
        }
    }
}

/// Of so many descriptors, those for attachments: sockets of flows have seven eighths, and the control side keeps
/// some of the rest.
fn for_attachments(limit: u64) -> u64 {
    let rest = limit / 8;
    (rest - (rest / 4).min(64)).max(16)
}

/// What one party holds of the pool.
#[derive(Debug)]
pub(crate) struct Quota {
    within: Option<Arc<Quota>>,
    pool: Arc<Pool>,
    used: [AtomicU64; RESOURCES],
    /// It is a network's, which may hold all while it is the only one.
    of_network: bool,
}

impl Quota {
    /// Of a party of its own.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn new(pool: &Arc<Pool>) -> Arc<Quota> {
        Arc::new(Quota::make(None, pool, false))
    }

    /// Of a network.
    pub(crate) fn of_network(pool: &Arc<Pool>) -> Arc<Quota> {
        pool.networks.fetch_add(1, Ordering::Relaxed);
        Arc::new(Quota::make(None, pool, true))
    }

    /// Of a party within another: a listener, or a front-end that the owner attached, within its network.
    pub(crate) fn within(outer: &Arc<Quota>) -> Arc<Quota> {
        Arc::new(Quota::make(Some(Arc::clone(outer)), &outer.pool, false))
    }

    fn make(within: Option<Arc<Quota>>, pool: &Arc<Pool>, of_network: bool) -> Quota {
        let used = [const { AtomicU64::new(0) }; RESOURCES];
        Quota { within, pool: Arc::clone(pool), used, of_network }
    }

    /// True while no other network shares the pool.
    fn is_alone(&self) -> bool {
        self.of_network && self.pool.networks.load(Ordering::Relaxed) == 1
    }

    /// How much a network can come to hold while others hold what they hold now.
    pub(crate) fn budget(&self, resource: Resource) -> u64 {
        let all = self.pool.all(resource);
        if self.is_alone() {
            return all;
        }
        let others = self.pool.used(resource).saturating_sub(self.used(resource));
        // The amount at which it would hold SHARE times what is left.
        let left = (all - all / 8).saturating_sub(others);
        (left / (SHARE + 1) * SHARE).max(resource.least(all))
    }

    pub(crate) fn used(&self, resource: Resource) -> u64 {
        Pool::at(&self.used, resource).load(Ordering::Relaxed)
    }

    fn levels(&self) -> impl Iterator<Item = &Quota> {
        std::iter::successors(Some(self), |q| q.within.as_deref())
    }

    fn take(&self, resource: Resource, n: u64) -> Result<(), Exceeded> {
        let all = Pool::at(&self.pool.all, resource).load(Ordering::Relaxed);
        if n > all {
            return Err(Exceeded(resource));
        }
        let add =
            |cells: &[AtomicU64; RESOURCES]| Pool::at(cells, resource).fetch_add(n, Ordering::Relaxed) + n;
        let used = add(&self.pool.used);
        let left = (all - all / 8).saturating_sub(used);
        let most = left.saturating_mul(SHARE).max(resource.least(all));
        let mut fits = used <= all;
        for level in self.levels() {
            fits &= add(&level.used) <= most || level.is_alone();
        }
        if !fits {
            self.give(resource, n);
            return Err(Exceeded(resource));
        }
        Ok(())
    }

    fn note(&self, resource: Resource, n: u64) {
        Pool::at(&self.pool.used, resource).fetch_add(n, Ordering::Relaxed);
        for level in self.levels() {
            Pool::at(&level.used, resource).fetch_add(n, Ordering::Relaxed);
        }
    }

    fn give(&self, resource: Resource, n: u64) {
        Pool::at(&self.pool.used, resource).fetch_sub(n, Ordering::Relaxed);
        for level in self.levels() {
            Pool::at(&level.used, resource).fetch_sub(n, Ordering::Relaxed);
        }
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        if self.of_network {
            self.pool.networks.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// An amount that a party holds, given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Charge {
    quota: Arc<Quota>,
    resource: Resource,
    amount: u64,
}

impl Charge {
    /// Of nothing yet.
    pub(crate) fn new(quota: &Arc<Quota>, resource: Resource) -> Charge {
        Charge { quota: Arc::clone(quota), resource, amount: 0 }
    }

    pub(crate) fn amount(&self) -> u64 {
        self.amount
    }

    /// Takes note of an amount that was measured, whether the party may hold it or not.
    pub(crate) fn measured(&mut self, amount: u64) {
        if amount > self.amount {
            self.quota.note(self.resource, amount - self.amount);
        } else {
            self.quota.give(self.resource, self.amount - amount);
        }
        self.amount = amount;
    }

    /// Changes the amount. When it is refused it stays as it was; less is never refused.
    pub(crate) fn set(&mut self, amount: u64) -> Result<(), Exceeded> {
        if amount > self.amount {
            self.quota.take(self.resource, amount - self.amount)?;
        } else {
            self.quota.give(self.resource, self.amount - amount);
        }
        self.amount = amount;
        Ok(())
    }

    pub(crate) fn add(&mut self, n: u64) -> Result<(), Exceeded> {
        self.set(self.amount.saturating_add(n))
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.quota.give(self.resource, self.amount);
    }
}

/// Bytes of address space of a process: the stack is near its end.
fn address_space() -> u64 {
    let here = 0u8;
    let space = (&raw const here).addr().checked_next_power_of_two().unwrap_or(usize::MAX) as u64;
    crate::os::sys::address_space_limit().map_or(space, |limit| space.min(limit))
}

fn memory_of_machine() -> u64 {
    crate::os::sys::memory_of_machine().unwrap_or(4 * GIB)
}

/// The smallest limit of memory among the control groups of this process, of version 2 or 1.
fn memory_limit() -> u64 {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().flat_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next(), parts.next().unwrap_or(""), parts.next().unwrap_or("/"));
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            c if c.split(',').any(|c| c == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => return Vec::new(),
        };
        let path = std::path::Path::new(path.trim_start_matches('/'));
        let up = path.ancestors().map(|p| std::path::Path::new(root).join(p).join(file));
        up.filter_map(|f| std::fs::read_to_string(f).ok()?.trim().parse::<u64>().ok()).collect()
    });
    limits.min().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Resource::{Allocated, Descriptors, Mapped};

    fn descriptors(all: u64) -> Arc<Pool> {
        Pool::new(all, 0, 0)
    }

    #[test]
    fn one_party_alone_gets_seventy_percent() {
        let pool = descriptors(8000);
        let owner = Quota::new(&pool);
        let mut held = Charge::new(&owner, Descriptors);
        while held.add(1).is_ok() {}
        assert_eq!(held.amount(), 5600);
        let mut at_once = Charge::new(&Quota::new(&descriptors(8000)), Descriptors);
        assert_eq!(at_once.set(5601), Err(Exceeded(Descriptors)));
        assert_eq!(at_once.set(5600), Ok(()));
    }

    #[test]
    fn a_party_that_comes_late_gets_the_least_and_the_pool_is_never_exceeded() {
        let pool = descriptors(800);
        let greedy: Vec<Charge> = (0..60)
            .map(|_| {
                let mut c = Charge::new(&Quota::new(&pool), Descriptors);
                while c.add(1).is_ok() {}
                c
            })
            .collect();
        let used: u64 = greedy.iter().map(Charge::amount).sum();
        assert_eq!(used, 800);
        drop(greedy);
        let mut first = Charge::new(&Quota::new(&pool), Descriptors);
        while first.add(1).is_ok() {}
        let mut late = Charge::new(&Quota::new(&pool), Descriptors);
        assert_eq!(late.set(16), Ok(()), "the last eighth is for parties with next to nothing");
    }

    #[test]
    fn networks_share_what_one_alone_may_have() {
        let pool = Pool::new(16, 0, 0);
        pool.set_limits(8000, 0);
        let (all, sockets) = (7000, Resource::Sockets);
        let first = Quota::of_network(&pool);
        let mut held = Charge::new(&first, sockets);
        assert_eq!((first.budget(sockets), held.set(all + 1)), (all, Err(Exceeded(sockets))));
        assert_eq!(held.set(all), Ok(()), "alone it has all");
        held.set(1000).unwrap();
        let second = Quota::of_network(&pool);
        let mut late = Charge::new(&second, sockets);
        let budget = second.budget(sockets);
        assert_eq!(budget, (all - all / 8 - 1000) / 5 * 4);
        while late.add(1).is_ok() {}
        assert!(late.amount().abs_diff(budget) <= 5, "{} of {budget}", late.amount());
        // What one has beyond its share it keeps, and gets no more.
        assert_eq!(late.add(1), Err(Exceeded(sockets)));
        let third = Charge::new(&Quota::of_network(&pool), sockets);
        let mut third = third;
        assert_eq!(third.set(16), Ok(()));
        drop((late, second, third));
        assert_eq!((first.budget(sockets), pool.used(sockets)), (all, 1000));
        held.measured(all * 2);
        assert_eq!(first.used(sockets), all * 2);
    }

    #[test]
    fn all_parties_within_one_share_its_quota() {
        let pool = descriptors(8000);
        let owner = Quota::new(&pool);
        let mut inner: Vec<Charge> = Vec::new();
        for _ in 0..1000 {
            let mut c = Charge::new(&Quota::within(&owner), Descriptors);
            if c.set(48).is_err() {
                break;
            }
            inner.push(c);
        }
        let held = owner.used(Descriptors);
        assert!((5500..=5600).contains(&held), "{held}");
        let mut other = Charge::new(&Quota::new(&pool), Descriptors);
        assert_eq!(other.set(1000), Ok(()));
        drop(inner);
        assert_eq!(owner.used(Descriptors), 0);
    }

    #[test]
    fn what_is_refused_leaves_nothing_taken() {
        let pool = Pool::new(0, 1 << 40, 1 << 30);
        let owner = Quota::new(&pool);
        let mut c = Charge::new(&Quota::within(&owner), Mapped);
        assert_eq!(c.set(u64::MAX), Err(Exceeded(Mapped)));
        assert_eq!(owner.used(Mapped), 0);
        assert_eq!(c.set(1 << 39), Ok(()));
        assert_eq!(c.set(1 << 30), Ok(()));
        assert_eq!(owner.used(Mapped), 1 << 30);
        let mut pages = Charge::new(&owner, Allocated);
        assert_eq!(pages.add(1 << 40), Err(Exceeded(Allocated)));
        drop(c);
        assert_eq!((owner.used(Mapped), owner.used(Allocated)), (0, 0));
    }

    #[test]
    fn the_process_has_some_of_everything() {
        let pool = Pool::of_process();
        let all = |r| Pool::at(&pool.all, r).load(Ordering::Relaxed);
        assert!(all(Descriptors) >= 16 && all(Mapped) >= GIB && all(Allocated) >= 1 << 20);
        assert!(all(Mapped) <= address_space() / 4);
    }
}
