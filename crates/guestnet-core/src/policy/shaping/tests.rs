use super::*;

const NOW: Time = Time(5_000_000_000);
const A: Owner = Owner { slot: 0, rule: None };
const B: Owner = Owner { slot: 1, rule: None };

fn flow(index: u32) -> FlowId {
    FlowId { index, generation: 1 }
}

fn rate(up: u64, down: u64) -> LimitSpec {
    LimitSpec { up: Some(up), down: Some(down), ..LimitSpec::default() }
}

fn at(ms: u64) -> Time {
    Time(NOW.0 + ms * 1_000_000)
}

#[test]
fn without_limits_nothing_is_looked_at() {
    let mut s = Shaping::default();
    assert!(!s.is_active());
    assert_eq!(s.allowance(NOW, A, None), Allowance::ALL);
    assert!(s.police(NOW, A, Way::Up, 1 << 30, 1));
    assert_eq!(s.opens(NOW, 0, u32::MAX, u32::MAX), Ok(()));
    assert_eq!((s.next_timer(NOW), s.next_due(NOW)), (None, None));
}

#[test]
fn a_limit_is_of_one_guest_or_of_all_together() {
    let mut s = Shaping::default();
    s.set_guest(NOW, 0, Some(rate(1_000_000, 500_000)));
    let all = s.allowance(NOW, A, None);
    assert_eq!((all.up, all.down), (20_000, 10_000));
    assert_eq!(s.allowance(NOW, B, None), Allowance::ALL);
    s.set_network(NOW, Some(rate(750_000, 750_000)));
    assert_eq!(s.allowance(NOW, A, None).up, 15_000);
    s.charge(NOW, B, 14_000, 0);
    assert_eq!(s.allowance(NOW, A, None).up, 1_000);
    assert_eq!(s.allowance(at(100), A, None).up, 15_000);
    s.set_network(NOW, None);
    s.set_guest(NOW, 0, None);
    assert!(!s.is_active());
}

#[test]
fn flows_that_wait_share_a_limit_evenly() {
    let mut s = Shaping::default();
    s.set_guest(NOW, 0, Some(rate(1_000_000, 1_000_000)));
    s.charge(NOW, A, 20_000, 0);
    let mut carried = [0u64; 3];
    for n in 0..3 {
        s.wait(NOW, A, flow(n), Way::Up);
    }
    assert_eq!(s.allowance(NOW, A, None).up, 0, "flows that wait come first");
    let mut now = NOW;
    while now < at(2_000) {
        let Some((next, _)) = s.next_due(now) else {
            now = s.next_timer(now).unwrap();
            continue;
        };
        // The first wants as much as it gets, the others small pieces.
        let got = s.allowance(now, A, Some(Way::Up)).up.min(if next.index == 0 { u32::MAX } else { 3000 });
        s.charge(now, A, u64::from(got), 0);
        carried[next.index as usize] += u64::from(got);
        s.wait(now, A, next, Way::Up);
        s.turn_ended(now);
    }
    let sum: u64 = carried.iter().sum();
    assert!(sum.abs_diff(2_000_000) < 20_000, "{carried:?}");
    assert!(carried.iter().all(|n| n.abs_diff(sum / 3) < sum / 10), "{carried:?}");
}

#[test]
fn flows_are_called_when_their_limit_goes() {
    let mut s = Shaping::default();
    s.set_guest(NOW, 0, Some(LimitSpec { up: Some(0), ..LimitSpec::default() }));
    s.charge(NOW, A, 1 << 20, 0);
    s.wait(NOW, A, flow(7), Way::Up);
    assert_eq!(s.next_due(at(1_000_000)), None, "nothing comes back at this rate");
    s.set_guest(NOW, 0, None);
    assert!(s.is_active());
    assert_eq!(s.next_timer(NOW), Some(NOW));
    assert_eq!((s.next_due(NOW), s.next_due(NOW)), (Some((flow(7), Way::Up)), None));
    assert!(!s.is_active());
}

#[test]
fn datagrams_leave_half_to_flows_that_wait() {
    let mut s = Shaping::default();
    s.set_guest(NOW, 0, Some(rate(1_000_000, 1_000_000)));
    s.charge(NOW, A, 20_000, 0);
    s.wait(NOW, A, flow(1), Way::Up);
    let (mut datagrams, mut of_flow) = (0, 0);
    for ms in 0..2_000 {
        for _ in 0..5 {
            datagrams += if s.police(at(ms), A, Way::Up, 1_000, 1) { 1_000 } else { 0 };
            while let Some((next, _)) = s.next_due(at(ms)) {
                let got = u64::from(s.allowance(at(ms), A, Some(Way::Up)).up);
                s.charge(at(ms), A, got, 0);
                of_flow += got;
                s.wait(at(ms), A, next, Way::Up);
                s.turn_ended(at(ms));
            }
        }
    }
    assert!(of_flow > 900_000, "{of_flow} {datagrams}");
    assert!(datagrams > 500_000, "{of_flow} {datagrams}");
    assert!((of_flow + datagrams).abs_diff(2_000_000) < 40_000, "{of_flow} {datagrams}");
}

#[test]
fn flows_have_a_rate_and_a_number() {
    let mut s = Shaping::default();
    let spec = LimitSpec { new_flows: Some(10), open_flows: Some(100), ..LimitSpec::default() };
    s.set_guest(NOW, 0, Some(spec));
    assert_eq!((0..20).filter(|_| s.opens(NOW, 0, 0, 0).is_ok()).count(), 10);
    assert_eq!(s.opens(NOW, 0, 0, 0), Err(FlowRefused::TooFast));
    assert_eq!(s.opens(at(1000), 0, 100, 0), Err(FlowRefused::TooMany));
    assert_eq!(s.opens(at(1000), 0, 99, 0), Ok(()));
}

#[test]
fn a_flow_waits_for_the_limit_that_has_no_credit() {
    let mut s = Shaping::default();
    s.set_guest(NOW, 0, Some(rate(1_000_000, 1_000_000)));
    s.set_network(NOW, Some(rate(10_000, 10_000)));
    s.charge(NOW, A, 3_000, 0);
    // Another flow waits for its guest's limit, which has credit: this one would be called at once, again and again.
    s.wait(NOW, A, flow(1), Way::Up);
    s.wait(NOW, A, flow(2), Way::Up);
    assert_eq!(s.next_due(NOW), None);
    assert_eq!(s.next_timer(NOW), Some(at(150)));
}

#[test]
fn after_the_total_nothing_passes() {
    let mut s = Shaping::default();
    s.set_guest(NOW, 0, Some(LimitSpec { total: Some(10_000), ..LimitSpec::default() }));
    assert!(s.police(NOW, A, Way::Down, 4_000, 3));
    assert_eq!(s.allowance(NOW, A, None).up, 6_000);
    s.charge(NOW, A, 4_600, 0);
    assert!(!s.police(at(1_000_000), A, Way::Down, 1, 1));
    assert_eq!(s.opens(NOW, 0, 0, 0), Err(FlowRefused::TooMany));
    s.wait(NOW, A, flow(1), Way::Up);
    assert_eq!(s.next_timer(NOW), None);
}

#[test]
fn rules_have_limits_of_their_own() {
    let mut s = Shaping::default();
    let by_rule = Owner { slot: 0, rule: Some((None, 3)) };
    s.set_rules(NOW, None, [(3, rate(100_000, 100_000))].into_iter());
    assert!(s.has_rule(None, 3) && !s.has_rule(Some(PortId(1)), 3));
    assert_eq!(s.allowance(NOW, by_rule, None).up, 3_000);
    assert_eq!(s.allowance(NOW, A, None), Allowance::ALL);
    s.charge(NOW, by_rule, 3_000, 0);
    s.wait(NOW, by_rule, flow(1), Way::Up);
    s.set_rules(NOW, None, std::iter::empty());
    assert_eq!(s.next_due(NOW), Some((flow(1), Way::Up)));
}

#[test]
fn a_limit_is_divided_among_workers() {
    let spec = LimitSpec { open_flows: Some(5), ..rate(1_000, 999) };
    let part = spec.part(2);
    assert_eq!((part.up, part.down, part.open_flows, part.queries), (Some(500), Some(500), Some(3), None));
    assert_eq!(spec.part(0), spec);
}
