//! Theory of operation: loom runs every interleaving of these small programs over the ring and the pool that
//! ship. Run with `RUSTFLAGS="--cfg loom" cargo test -p guestnet-io --test loom --release`.
#![cfg(loom)]

use guestnet_io::memory::pool::{PacketPool, PoolError};
use guestnet_io::memory::ring::Ring;
use loom::sync::Arc;
use loom::thread;

#[test]
fn ring_keeps_order_when_it_wraps() {
    loom::model(|| {
        let (mut p, mut c) = Ring::<u32>::new(2).unwrap().split();
        let t = thread::spawn(move || {
            let mut next = 0u32;
            while next < 4 {
                let batch = [next, next + 1];
                next += p.enqueue_batch(&batch[..(4 - next as usize).min(2)]) as u32;
                thread::yield_now();
            }
        });
        let (mut want, mut out) = (0u32, [0u32; 2]);
        while want < 4 {
            let n = c.dequeue_batch(&mut out);
            for v in &out[..n] {
                assert_eq!(*v, want);
                want += 1;
            }
            thread::yield_now();
        }
        t.join().unwrap();
    });
}

#[test]
fn pool_hands_a_buffer_to_one_thread() {
    loom::model(|| {
        let pool = Arc::new(PacketPool::with_buffer_size(2, 64).unwrap());
        let run = |pool: Arc<PacketPool>| {
            let got = pool.alloc();
            if let Some(i) = got {
                drop(pool.borrow(i).unwrap());
                pool.free(i).unwrap();
            }
        };
        let other = Arc::clone(&pool);
        let t = thread::spawn(move || run(other));
        run(Arc::clone(&pool));
        t.join().unwrap();
        assert_eq!(pool.available(), 2);
    });
}

#[test]
fn pool_finds_a_double_free_and_a_second_borrower() {
    loom::model(|| {
        let pool = Arc::new(PacketPool::with_buffer_size(1, 64).unwrap());
        let i = pool.alloc().unwrap();
        let other = Arc::clone(&pool);
        let t = thread::spawn(move || match other.borrow(i) {
            Ok(mut b) => {
                b.whole()[0] = 1;
                0
            }
            Err(PoolError::AlreadyFree(_)) => 0,
            Err(e) => panic!("{e}"),
        });
        let freed = match pool.free(i) {
            Ok(()) => true,
            Err(PoolError::Borrowed(_)) => false,
            Err(e) => panic!("{e}"),
        };
        t.join().unwrap();
        assert_eq!(pool.free(i).is_ok(), !freed);
        assert_eq!(pool.available(), 1);
    });
}

/// A worker that goes to sleep with something in its ring has been rung for: no wake-up is lost.
#[test]
fn nobody_sleeps_over_what_is_in_the_ring() {
    use guestnet_io::runtime::links::wake_flag::WakeFlag;
    use loom::sync::atomic::{AtomicBool, Ordering};
    loom::model(|| {
        let (mut p, mut c) = Ring::<u32>::new(2).unwrap().split();
        let wake_flag = Arc::new(WakeFlag::default());
        let rung = Arc::new(AtomicBool::new(false));
        let (its, its_rung) = (Arc::clone(&wake_flag), Arc::clone(&rung));
        let t = thread::spawn(move || {
            p.enqueue(7).unwrap();
            if its.needs_wake() {
                its_rung.store(true, Ordering::SeqCst);
            }
        });
        wake_flag.fall_asleep();
        let slept = c.is_empty();
        t.join().unwrap();
        assert!(!slept || rung.load(Ordering::SeqCst));
        wake_flag.wake_up();
        assert_eq!(c.dequeue(), Some(7));
        assert!(!wake_flag.needs_wake());
    });
}
