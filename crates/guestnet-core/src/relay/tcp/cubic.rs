//! Theory of operation: how the congestion window grows after loss (CUBIC, RFC 9438). Before the first loss there
//! is no such state: sending starts with the largest window. Windows are counted in segments here.

use crate::interface::types::Time;

/// How steeply the window grows (RFC 9438 4.1).
const C: f64 = 0.4;
/// What is left of the window after loss.
const BETA: f64 = 0.7;
/// Segments a round trip that Reno would gain with [`BETA`] on average (RFC 9438 4.3).
const ALPHA: f64 = 3.0 * (1.0 - BETA) / (1.0 + BETA);
/// The smallest slow-start threshold in segments (RFC 5681 3.1).
const LEAST: f64 = 2.0;

/// One period of growth, from loss to loss.
#[derive(Debug)]
struct Epoch {
    start: Time,
    /// Seconds from the start until the window is `origin` again.
    k: f64,
    origin: f64,
    /// What Reno's window would be.
    reno: f64,
}

#[derive(Debug, Default)]
pub(super) struct Cubic {
    /// The window before the last loss.
    max: f64,
    /// The same, without the yield to newcomers.
    prior: f64,
    epoch: Option<Epoch>,
    /// Of the window, less than one byte.
    rest: f64,
}

impl Cubic {
    /// Loss: the new slow-start threshold for a window of `window` bytes.
    pub fn reduce(&mut self, window: u32, mss: u32) -> u32 {
        let mss = f64::from(mss.max(1));
        let window = f64::from(window) / mss;
        // Who lost before the window was back leaves room to newcomers (RFC 9438 4.7).
        self.max = if window < self.max { window * (1.0 + BETA) / 2.0 } else { window };
        self.prior = window;
        self.epoch = None;
        ((window * BETA).max(LEAST) * mss) as u32
    }

    /// The window after `acked` bytes in congestion avoidance.
    pub fn grow(&mut self, window: u32, acked: u32, mss: u32, rtt_us: u32, now: Time) -> u32 {
        let mss = f64::from(mss.max(1));
        let cwnd = (f64::from(window) / mss).max(1.0);
        let acked = f64::from(acked) / mss;
        let max = self.max;
        let epoch = self.epoch.get_or_insert_with(|| Epoch {
            start: now,
            k: ((max - cwnd).max(0.0) / C).cbrt(),
            origin: max.max(cwnd),
            reno: cwnd,
        });
        let t = now.since(epoch.start) as f64 / 1e9;
        let at = |t: f64| epoch.origin + C * (t - epoch.k).powi(3);
        epoch.reno += acked / cwnd * if epoch.reno < self.prior { ALPHA } else { 1.0 };
        let next = if at(t) < epoch.reno {
            cwnd.max(epoch.reno)
        } else {
            let target = at(t + f64::from(rtt_us) / 1e6).clamp(cwnd, 1.5 * cwnd);
            cwnd + (target - cwnd) / cwnd * acked
        };
        let bytes = next * mss + self.rest;
        self.rest = bytes.fract();
        (bytes as u32).max(window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MSS: u32 = 1000;
    const RTT_MS: u64 = 50;

    /// The window, in segments, after each round trip.
    fn rounds(c: &mut Cubic, mut window: u32, count: u64) -> Vec<u32> {
        (1..=count)
            .map(|i| {
                let now = Time(1).plus_ms(i * RTT_MS);
                for _ in 0..window / MSS {
                    window = c.grow(window, MSS, MSS, 1000 * RTT_MS as u32, now);
                }
                window / MSS
            })
            .collect()
    }

    #[test]
    fn loss_leaves_seven_tenths_and_never_less_than_two_segments() {
        let mut c = Cubic::default();
        assert_eq!(c.reduce(100 * MSS, MSS), 70 * MSS);
        assert_eq!(c.reduce(2 * MSS, MSS), 2 * MSS);
        assert_eq!(c.reduce(0, 0), 2);
    }

    #[test]
    fn a_large_window_comes_back_by_the_cube_of_time() {
        let mut c = Cubic::default();
        let window = c.reduce(1000 * MSS, MSS);
        // K is the cube root of 300 / 0.4: 9.1 s.
        let seen = rounds(&mut c, window, 300);
        let (half, k, late) = (seen[90], seen[181], seen[299]);
        assert!((900..980).contains(&half), "{half}");
        assert!((985..1005).contains(&k), "{k}");
        assert!((1050..1150).contains(&late), "{late}");
        assert!(seen.is_sorted());
    }

    #[test]
    fn a_small_window_grows_as_fast_as_renos() {
        let mut c = Cubic::default();
        let window = c.reduce(10 * MSS, MSS);
        let seen = rounds(&mut c, window, 12);
        // 0.53 segments a round trip up to the window before, then one.
        assert!((9..=11).contains(&seen[5]), "{seen:?}");
        assert!((13..=18).contains(&seen[11]), "{seen:?}");
    }

    #[test]
    fn who_lost_early_leaves_room() {
        let mut c = Cubic::default();
        c.reduce(100 * MSS, MSS);
        c.reduce(80 * MSS, MSS);
        assert!((c.max - 68.0).abs() < 1e-9);
    }
}
