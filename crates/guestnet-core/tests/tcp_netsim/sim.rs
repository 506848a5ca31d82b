//! One run: guest, link, relay and host on one virtual clock.

use crate::common::Mock;
use crate::link::{Faults, Nic, Rng, Wire};
use crate::tcp_support::{FLOW, OUR_ISN, path, pattern, stream};
use guestnet_core::effects::Close;
use guestnet_core::policy::shaping::Allowance;
use guestnet_core::stats::Counters;
use guestnet_core::tcp::{Budget, Ctx, Fate, Path, Tcb, Timeouts};
use guestnet_core::types::{Csum, SockId, Time};
use guestnet_wire::arp::{self, Arp};
use guestnet_wire::ether::{self, Ether, Mac};
use guestnet_wire::gso::{complete_checksum, segment};
use guestnet_wire::tcp::{MIN_LEN, Options, Tcp, flags};
use guestnet_wire::{parse, proto};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Address};
use std::collections::VecDeque;

#[derive(Debug, Clone)]
pub struct Scenario {
    pub seed: u64,
    pub upload: usize,
    pub download: usize,
    /// From end to end.
    pub delay_us: u64,
    /// Per mille.
    pub loss: u32,
    pub reorder: u32,
    pub repeat: u32,
    pub mtu: u16,
    pub guest_rx: usize,
    pub guest_tx: usize,
    pub timestamps: bool,
    pub inbound: bool,
    pub gso_max: u32,
    /// Short sends, dribbling input, a port that is often full, a guest that reads in bits.
    pub rough_host: bool,
}

impl Scenario {
    pub fn faults(&self) -> Faults {
        let (loss, reorder, repeat) = (self.loss, self.reorder, self.repeat);
        Faults { delay_us: self.delay_us, loss, reorder, repeat }
    }
}

#[derive(Debug)]
pub struct Outcome {
    pub ms: u64,
    pub retransmits: u64,
}

fn tsval() -> u32 {
    // Any clock does; PAWS is tested by the scenarios.
    77
}

fn guest_address(path: &Path) -> std::net::Ipv4Addr {
    match path.guest.ip() {
        std::net::IpAddr::V4(a) => a,
        std::net::IpAddr::V6(_) => unreachable!("the simulated guest has IPv4"),
    }
}

struct World<'a> {
    s: &'a Scenario,
    rng: Rng,
    now_us: u64,
    mock: Mock,
    sock: SockId,
    tcb: Option<Tcb>,
    fate: Fate,
    path: Path,
    budget: Budget,
    counters: Counters,
    nic: Nic,
    iface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    up: Wire,
    down: Wire,
    connect_at: Option<u64>,
    written: usize,
    guest_sent: usize,
    guest_got: usize,
    guest_closed: bool,
    host_closed: bool,
}

/// Runs to the end; an error tells what went wrong.
pub fn run(s: &Scenario) -> Result<Outcome, String> {
    let mut w = World::new(s);
    while w.now_us < 3_000_000_000 {
        w.step()?;
        if w.done() {
            return w.verdict();
        }
    }
    let tcb = w.tcb.as_ref().map(Tcb::state_name);
    let guest = w.sockets.get::<tcp::Socket<'_>>(w.handle).state();
    Err(format!(
        "not done after 3000 s: relay {tcb:?} {:?}, guest {guest}, up {}/{}/{}, down {}/{}/{}",
        w.fate,
        w.mock.sock(w.sock).sent.len(),
        w.guest_sent,
        s.upload,
        w.guest_got,
        w.written,
        s.download
    ))
}

impl<'a> World<'a> {
    fn new(s: &'a Scenario) -> World<'a> {
        let mut path = path();
        path.mtu = s.mtu;
        path.gso_max = s.gso_max;
        let mut mock = Mock::new();
        let sock = mock.new_sock();
        let mut nic = Nic { rx: VecDeque::new(), tx: Vec::new(), mtu: usize::from(s.mtu) };
        let mut config = Config::new(EthernetAddress(path.guest_mac.0).into());
        config.random_seed = s.seed;
        let mut iface = Interface::new(config, &mut nic, Instant::from_micros(0));
        iface.update_ip_addrs(|a| a.push(IpCidr::new(IpAddress::v4(192, 168, 64, 2), 24)).unwrap());
        iface.routes_mut().add_default_ipv4_route(Ipv4Address::new(192, 168, 64, 1)).unwrap();
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; s.guest_rx]),
            tcp::SocketBuffer::new(vec![0; s.guest_tx]),
        );
        if s.timestamps {
            socket.set_tsval_generator(Some(tsval));
        }
        if s.inbound {
            socket.listen(40000).unwrap();
        } else {
            socket.connect(iface.context(), (IpAddress::v4(203, 0, 113, 7), 80), 40000).unwrap();
        }
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        let mut w = World {
            s,
            rng: Rng(s.seed),
            now_us: 1,
            mock,
            sock,
            tcb: None,
            fate: Fate::Live,
            path,
            budget: Budget { used: 0, limit: 300_000 },
            counters: Counters::default(),
            nic,
            iface,
            sockets,
            handle,
            up: Wire::default(),
            down: Wire::default(),
            connect_at: None,
            written: 0,
            guest_sent: 0,
            guest_got: 0,
            guest_closed: false,
            host_closed: false,
        };
        if s.inbound {
            w.tcb = Some(Tcb::inbound(FLOW, sock, OUR_ISN, Timeouts::default(), w.time()));
            w.call(|t, cx| t.start(cx));
        }
        w
    }

    fn time(&self) -> Time {
        Time(self.now_us * 1000)
    }

    fn call(&mut self, f: impl FnOnce(&mut Tcb, &mut Ctx<'_, Mock>) -> Fate) {
        let now = self.time();
        let Some(tcb) = self.tcb.as_mut().filter(|_| self.fate == Fate::Live) else { return };
        let mut cx = Ctx {
            turn: 32 << 10,
            allowance: Allowance::ALL,
            now,
            fx: &mut self.mock,
            counters: &mut self.counters,
            path: &self.path,
            budget: &mut self.budget,
        };
        self.fate = f(tcb, &mut cx);
    }

    fn end_batch(&mut self) {
        if self.tcb.as_ref().is_some_and(Tcb::wants_batch_end) {
            self.call(|t, cx| t.batch_end(cx));
        }
    }

    fn step(&mut self) -> Result<(), String> {
        self.host();
        self.relay_timers();
        self.frames_from_guest();
        self.flush_to_guest();
        self.guest()?;
        if self.done() {
            return Ok(());
        }
        // The next moment at which anything can happen.
        let guest_at = self
            .iface
            .poll_at(Instant::from_micros(self.now_us as i64), &self.sockets)
            .map(|t| u64::try_from(t.total_micros()).unwrap_or(0));
        let live = self.fate == Fate::Live;
        let relay_at = self.tcb.as_ref().filter(|_| live).and_then(Tcb::deadline).map(|t| t.0.div_ceil(1000));
        let host_at = self.host_busy().then_some(self.now_us + 300);
        let next = [guest_at, relay_at, host_at, self.up.next_at(), self.down.next_at(), self.connect_at];
        let next = next.into_iter().flatten().min().unwrap_or(0);
        self.now_us = next.max(self.now_us + 1);
        Ok(())
    }

    fn host_busy(&mut self) -> bool {
        let full = self.mock.port(self.path.port).owed_writable;
        let s = self.mock.sock(self.sock);
        s.closed.is_none() && (self.written < self.s.download || !self.host_closed || s.owed_writable || full)
    }

    fn host(&mut self) {
        if self.connect_at.is_some_and(|at| at <= self.now_us) {
            self.connect_at = None;
            self.call(|t, cx| t.connected(cx, Ok(())));
        }
        if self.mock.sock(self.sock).closed.is_some() || self.fate != Fate::Live || self.tcb.is_none() {
            return;
        }
        let rough = self.s.rough_host;
        let (mut readable, mut writable) = (false, false);
        let some = if rough { self.rng.below(5000) as usize } else { 60_000 };
        let n = some.min(self.s.download - self.written);
        if n > 0 && self.mock.sock(self.sock).inbox.len() < 200_000 {
            let bytes = stream(self.written, n);
            self.mock.sock(self.sock).inbox.extend(bytes);
            self.written += n;
            readable = true;
        }
        if self.written == self.s.download && !self.host_closed && (!rough || self.rng.permille(300)) {
            self.host_closed = true;
            self.mock.sock(self.sock).eof = true;
            self.mock.sock(self.sock).tells_last = self.rng.permille(500);
            // As epoll tells it: with whatever else there is.
            (readable, writable) = (true, true);
        }
        let rough_room = self.rng.below(4000) as usize;
        let s = self.mock.sock(self.sock);
        if rough && (s.send_room.is_none() || s.owed_writable) {
            s.send_room = Some(rough_room);
            writable |= std::mem::take(&mut s.owed_writable) && rough_room > 0;
            s.owed_writable |= rough_room == 0;
        }
        if readable || writable {
            self.call(|t, cx| t.ready(cx, readable, writable));
            self.end_batch();
        }
        let room = 3000 + self.rng.below(60_000) as usize;
        let port = self.mock.port(self.path.port);
        if rough && (port.room == usize::MAX || port.owed_writable) {
            port.room = room;
            if std::mem::take(&mut port.owed_writable) {
                self.call(|t, cx| t.port_writable(cx));
                self.end_batch();
            }
        }
    }

    fn relay_timers(&mut self) {
        while self.fate == Fate::Live
            && self.tcb.as_ref().and_then(Tcb::deadline).is_some_and(|d| d <= self.time())
        {
            self.call(|t, cx| t.timer(cx));
            self.end_batch();
        }
    }

    fn frames_from_guest(&mut self) {
        for frame in self.up.arrived(self.now_us) {
            let Ok(p) = parse::parse_ip(&frame, ether::HEADER_LEN) else { continue };
            assert_eq!(p.proto, proto::TCP);
            let tcp = Tcp::parse(&frame[p.l4..p.end]).unwrap();
            let options = Options::parse(&frame[p.l4 + MIN_LEN..p.payload]);
            if self.tcb.is_none() && tcp.flags & flags::SYN != 0 {
                let t = Timeouts::default();
                self.tcb = Some(Tcb::outbound(FLOW, self.sock, &tcp, &options, OUR_ISN, t, self.time()));
                self.connect_at = Some(self.now_us + self.rng.below(2_000_000));
                continue;
            }
            let payload = frame[p.payload..p.end].to_vec();
            self.call(|t, cx| t.segment(cx, &tcp, &options, &payload));
        }
        self.end_batch();
    }

    /// Cuts and completes what the relay sent, as an attachment would, and puts it on the wire.
    fn flush_to_guest(&mut self) {
        let faults = self.s.faults();
        for mut sent in self.mock.take() {
            let mut frames = Vec::new();
            if let Some(gso) = sent.meta.gso {
                segment(&sent.frame, gso, |h, p| frames.push([h, p].concat())).unwrap();
            } else {
                if let Csum::Partial { start, offset } = sent.meta.csum {
                    complete_checksum(&mut sent.frame, start, offset).unwrap();
                }
                frames.push(sent.frame);
            }
            for frame in frames {
                assert!(frame.len() <= usize::from(self.s.mtu) + ether::HEADER_LEN);
                self.down.send(self.now_us, frame, faults, &mut self.rng);
            }
        }
    }

    fn guest(&mut self) -> Result<(), String> {
        let now = Instant::from_micros(self.now_us as i64);
        // smoltcp forgets a neighbour after a minute, and with it the answer that needed it. Retransmissions
        // come further apart than that, so the simulated network reminds it; ARP is not what is tested here.
        let gateway = std::net::Ipv4Addr::new(192, 168, 64, 1);
        self.nic.rx.push_back(self.arp_reply(gateway, self.path.guest_mac, guest_address(&self.path)));
        self.nic.rx.extend(self.down.arrived(self.now_us));
        for _ in 0..3 {
            self.iface.poll(now, &mut self.nic, &mut self.sockets);
            self.guest_app()?;
            self.answer_arp();
        }
        let faults = self.s.faults();
        for frame in std::mem::take(&mut self.nic.tx) {
            self.up.send(self.now_us, frame, faults, &mut self.rng);
        }
        Ok(())
    }

    fn guest_app(&mut self) -> Result<(), String> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        if socket.can_recv() && (!self.s.rough_host || self.rng.permille(700)) {
            let mut at = self.guest_got;
            let bits = if self.s.rough_host { 1 + self.rng.below(8000) as usize } else { usize::MAX };
            let same = socket
                .recv(|data| {
                    let n = data.len().min(bits);
                    let same = data[..n].iter().enumerate().all(|(i, &b)| b == pattern(at + i));
                    at += n;
                    (n, same)
                })
                .map_err(|e| format!("recv: {e}"))?;
            self.guest_got = at;
            if !same {
                return Err(format!("bytes before {at} differ at the guest"));
            }
        }
        if socket.can_send() && self.guest_sent < self.s.upload {
            let n = (self.s.upload - self.guest_sent).min(20_000);
            self.guest_sent +=
                socket.send_slice(&stream(self.guest_sent, n)).map_err(|e| format!("send: {e}"))?;
        }
        if self.guest_sent == self.s.upload && !self.guest_closed && socket.may_send() {
            self.guest_closed = true;
            socket.close();
        }
        Ok(())
    }

    fn arp_reply(&self, spa: std::net::Ipv4Addr, tha: Mac, tpa: std::net::Ipv4Addr) -> Vec<u8> {
        let sha = self.path.gateway_mac;
        let mut reply = vec![0; ether::HEADER_LEN + arp::LEN];
        Ether { dst: tha, src: sha, ethertype: ether::ARP }.emit(&mut reply);
        Arp { op: arp::REPLY, sha, spa, tha, tpa }.emit(&mut reply[ether::HEADER_LEN..]);
        reply
    }

    fn answer_arp(&mut self) {
        let mut keep = Vec::new();
        for frame in std::mem::take(&mut self.nic.tx) {
            match Ether::parse(&frame) {
                Ok(e) if e.ethertype == ether::ARP => {
                    let ask = Arp::parse(&frame[ether::HEADER_LEN..]).unwrap();
                    let reply = self.arp_reply(ask.tpa, ask.sha, ask.spa);
                    self.nic.rx.push_back(reply);
                }
                _ => keep.push(frame),
            }
        }
        self.nic.tx = keep;
    }

    fn done(&self) -> bool {
        self.fate != Fate::Live
    }

    fn verdict(&mut self) -> Result<Outcome, String> {
        let ms = self.now_us / 1000;
        // What is still on the way to the guest arrives.
        for _ in 0..200 {
            self.flush_to_guest();
            self.guest()?;
            self.now_us += 1000;
        }
        let s = self.mock.sock(self.sock);
        let (got, sent) = (self.guest_got, s.sent.len());
        if self.fate != Fate::Closed || s.closed != Some(Close::Graceful) {
            return Err(format!("ended {:?}, {:?}; up {sent}, down {got}", self.fate, s.closed));
        }
        if s.sent != stream(0, self.s.upload) {
            return Err(format!("the host has {sent} of {} bytes, or others", self.s.upload));
        }
        if got != self.s.download {
            return Err(format!("the guest has {got} of {} bytes", self.s.download));
        }
        if self.budget.used != 0 {
            return Err(format!("{} bytes stay charged", self.budget.used));
        }
        Ok(Outcome { ms, retransmits: self.counters.retransmits })
    }
}
