//! Theory of operation: how a worker that sleeps hears of what another put in a ring. It says that it is about to
//! sleep and looks once more; who puts something in looks for that word afterwards and takes it. One of the two
//! sees the other, because both write before they read, in one order for all (SeqCst). While the worker is awake
//! nothing is written but the ring.

use crate::memory::sync::{AtomicU32, Ordering, fence};

const AWAKE: u32 = 0;
const ASLEEP: u32 = 1;

/// One worker's word that it sleeps.
#[derive(Debug)]
pub struct WakeFlag {
    state: AtomicU32,
}

impl Default for WakeFlag {
    fn default() -> Self {
        WakeFlag { state: AtomicU32::new(AWAKE) }
    }
}

impl WakeFlag {
    /// The worker is about to sleep: it has to look at its rings once more after this.
    pub fn fall_asleep(&self) {
        self.state.store(ASLEEP, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The worker does not sleep, or not any more.
    pub fn wake_up(&self) {
        self.state.store(AWAKE, Ordering::Relaxed);
    }

    /// To be asked after something was put in a ring of the worker. True: it sleeps, or is about to, and the
    /// caller is the one who has to wake it.
    #[must_use]
    pub fn needs_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        self.state.load(Ordering::SeqCst) == ASLEEP && self.state.swap(AWAKE, Ordering::SeqCst) == ASLEEP
    }
}
