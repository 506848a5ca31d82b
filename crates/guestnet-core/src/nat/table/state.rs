//! Theory of operation: the state of a connection, and what each packet does to it. TCP follows RFC 6146 3.5.2.2
//! (as RFC 7857 2.1 asks): opening, established, half closed either way, closing, and "reset seen", which a
//! later packet takes back to established so that a forged reset cuts nothing off. Everything else is one
//! state per timeout.

use crate::nat::config::NatEngineConfig;
use guestnet_wire::tcp::flags::{FIN, RST, SYN};

/// State of a connection; the number indexes the table of timeouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ConnState {
    /// UDP.
    Udp,
    /// UDP to port 53, no answer yet.
    Dns,
    /// UDP to port 53, answered.
    DnsAnswered,
    /// ICMP query.
    Icmp,
    /// GRE, ESP or SCTP.
    Other,
    /// The guest's SYN was seen.
    SynOut,
    /// The outside's SYN was seen.
    SynIn,
    /// Taken up in mid-stream, nothing heard from outside yet.
    PickedUp,
    /// Both SYNs were seen.
    Established,
    /// The guest's FIN was seen.
    FinOut,
    /// The outside's FIN was seen.
    FinIn,
    /// Both FINs were seen.
    Closing,
    /// A reset was seen.
    Reset,
}

/// How many states there are.
pub(crate) const COUNT: usize = 13;

impl ConnState {
    /// Stable name in snake case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ConnState::Udp => "udp",
            ConnState::Dns => "dns",
            ConnState::DnsAnswered => "dns_answered",
            ConnState::Icmp => "icmp",
            ConnState::Other => "other",
            ConnState::SynOut => "syn_out",
            ConnState::SynIn => "syn_in",
            ConnState::PickedUp => "picked_up",
            ConnState::Established => "established",
            ConnState::FinOut => "fin_out",
            ConnState::FinIn => "fin_in",
            ConnState::Closing => "closing",
            ConnState::Reset => "reset",
        }
    }
}

/// What a packet does to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    pub state: ConnState,
    pub refresh: bool,
}

/// The step for a TCP segment with these flags.
#[inline]
pub(crate) fn tcp(state: ConnState, flags: u8, outbound: bool) -> Step {
    use ConnState as S;
    let keep = Step { state, refresh: false };
    let go = |state| Step { state, refresh: true };
    let (syn, fin, rst) = (flags & SYN != 0, flags & FIN != 0, flags & RST != 0);
    match state {
        S::Established | S::FinOut | S::FinIn if rst => go(S::Reset),
        S::Established if fin => go(if outbound { S::FinOut } else { S::FinIn }),
        S::FinOut if fin && !outbound => go(S::Closing),
        S::FinIn if fin && outbound => go(S::Closing),
        S::Established | S::FinOut | S::FinIn => go(state),
        _ if rst => keep,
        S::SynOut if syn => go(if outbound { S::SynOut } else { S::Established }),
        S::SynIn if syn => go(if outbound { S::Established } else { S::SynIn }),
        S::PickedUp if !outbound => go(S::Established),
        S::PickedUp => go(S::PickedUp),
        S::Closing | S::Reset if syn => go(if outbound { S::SynOut } else { S::SynIn }),
        S::Reset => go(S::Established),
        _ => keep,
    }
}

/// Timeouts in ticks, by state and direction; 0 for "does not refresh".
#[derive(Debug, Clone)]
pub(crate) struct Timers {
    /// By state.
    pub ticks: [u32; COUNT],
    /// Whether a plain packet (UDP, or TCP without SYN, FIN, RST) refreshes: by direction (outbound 0) and state.
    pub plain: [[u32; COUNT]; 2],
}

/// Bits of nanoseconds in a tick: 2^26 ns is 67 ms.
pub(crate) const TICK_BITS: u32 = 26;

/// The engine's tick stays below this (four and a half years), so that deadlines fit 32 bits.
pub(crate) const TICKS_MOST: u64 = 1 << 31;

/// Seconds as ticks, rounded up, and one more since a tick has begun when it is counted.
pub(crate) fn ticks(seconds: u32) -> u32 {
    (u64::from(seconds) * 1_000_000_000).div_ceil(1 << TICK_BITS) as u32 + 1
}

impl Timers {
    pub fn new(c: &NatEngineConfig) -> Timers {
        let t = &c.timeouts;
        let by_state = [
            t.udp,
            t.udp,
            t.udp_dns,
            t.icmp,
            t.other,
            t.tcp_opening,
            t.tcp_opening,
            t.tcp_opening,
            t.tcp_established,
            t.tcp_established,
            t.tcp_established,
            t.tcp_closing,
            t.tcp_closing,
        ]
        .map(ticks);
        let mut plain = [by_state; 2];
        let inbound = &mut plain[1];
        for s in [ConnState::Udp, ConnState::Icmp, ConnState::Other] {
            if !c.inbound_refresh {
                inbound[s as usize] = 0;
            }
        }
        // States that a plain packet changes or does not refresh go through `tcp` or `engine`.
        for p in &mut plain {
            for s in [ConnState::Dns, ConnState::DnsAnswered, ConnState::SynOut, ConnState::SynIn] {
                p[s as usize] = 0;
            }
            for s in [ConnState::PickedUp, ConnState::Closing, ConnState::Reset] {
                p[s as usize] = 0;
            }
        }
        Timers { ticks: by_state, plain }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ConnState as S;
    use guestnet_wire::tcp::flags::ACK;

    fn run(start: S, packets: &[(u8, bool)]) -> S {
        packets.iter().fold(start, |s, (f, out)| tcp(s, *f, *out).state)
    }

    #[test]
    fn ordinary_life() {
        assert_eq!(run(S::SynOut, &[(SYN | ACK, false)]), S::Established);
        assert_eq!(run(S::SynIn, &[(SYN | ACK, true)]), S::Established);
        assert_eq!(run(S::Established, &[(FIN | ACK, true), (ACK, false)]), S::FinOut);
        assert_eq!(run(S::Established, &[(FIN | ACK, true), (FIN | ACK, false), (ACK, true)]), S::Closing);
        assert_eq!(run(S::Established, &[(FIN, false), (FIN, true)]), S::Closing);
        assert_eq!(run(S::Closing, &[(SYN, true)]), S::SynOut);
    }

    #[test]
    fn a_reset_is_taken_back_by_data() {
        assert_eq!(run(S::Established, &[(RST, false)]), S::Reset);
        assert_eq!(run(S::Reset, &[(ACK, true)]), S::Established);
        assert_eq!(tcp(S::Reset, RST, true), Step { state: S::Reset, refresh: false });
        assert_eq!(tcp(S::SynOut, RST | ACK, false), Step { state: S::SynOut, refresh: false });
    }

    #[test]
    fn closing_is_not_kept_alive() {
        assert!(!tcp(S::Closing, ACK, true).refresh);
        assert!(tcp(S::FinIn, ACK, true).refresh);
    }
}
