//! Theory of operation: the control side speaks to a worker through a bounded queue and an eventfd. Each
//! command has a number, and when it is done the number comes back in [`crate::control::event::Event::Done`]. What a
//! command brings along (descriptors) belongs to the worker from then on.

use crate::attachment::quota::Charge;
use crate::attachment::vhost_user::FrontEnds;
use crate::control::capture::SharedCapture;
use crate::os::sys;
use guestnet_core::DnsVerdict;
use guestnet_core::config::{FlowInfo, NameServers, PortInfo};
use guestnet_core::nat::{ConnTrackStats, ForwardError, NatConfigError, NatEngineConfig, NatStats};
use guestnet_core::policy::shaping::LimitSpec;
use guestnet_core::policy::table::RuleTable;
use guestnet_core::policy::{Entry, Isolated};
use guestnet_core::stats::Counters;
use guestnet_core::types::{ForwardId, NetMode, PortConfig, PortId, ServiceId};
use guestnet_wire::ether::Mac;
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What arrives on a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListenKind {
    /// Connections with QEMU's framing (SOCK_STREAM), or with one frame per packet (SOCK_SEQPACKET).
    Stream,
    /// Datagrams of one bare frame each; a guest is known by the path of its socket.
    Dgram,
    /// As `Dgram`, for vfkit: a guest may begin with the four bytes `VFKT`, and may send TSO frames.
    Unixgram,
    /// Connections of vhost-user front-ends.
    VhostUser,
}

/// What is spoken on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encapsulation {
    /// Frames with a length in front.
    Framed,
    /// A frame per packet.
    Packets,
    /// vhost-user.
    VhostUser,
}

/// A guest that came to a listener and has no port yet.
#[derive(Debug)]
pub struct AcceptedGuest {
    pub(crate) listener: u32,
    pub(crate) conn: OwnedFd,
    pub(crate) encapsulation: Encapsulation,
    pub(crate) template: PortConfig,
    pub(crate) peer: String,
    /// Its connection, as its listener is charged for it.
    pub(crate) held: Charge,
    /// All guests of the listener.
    pub(crate) front_ends: Arc<FrontEnds>,
}

/// What a worker can be told to do.
#[derive(Debug)]
pub enum Command {
    /// Adds a port without attachment.
    AddPort {
        /// Its number, below 0x8000_0000.
        port: PortId,
        /// What it is.
        config: PortConfig,
    },
    /// Removes a port, its flows and its attachment.
    RemovePort {
        /// Which.
        port: PortId,
    },
    /// Attaches a TAP. Works best when it was made with IFF_VNET_HDR; the offloads are probed here.
    AttachTap {
        /// To which port.
        port: PortId,
        /// The TAP, IFF_TAP | IFF_NO_PI, IFF_VNET_HDR or not.
        fd: OwnedFd,
    },
    /// Attaches a connected stream socket with QEMU's framing.
    AttachStream {
        /// To which port.
        port: PortId,
        /// The socket.
        fd: OwnedFd,
    },
    /// Attaches a connected SOCK_DGRAM or SOCK_SEQPACKET socket that carries one bare frame per packet.
    AttachDgram {
        /// To which port.
        port: PortId,
        /// The socket.
        fd: OwnedFd,
    },
    /// Attaches a vhost-user front-end, which shares the guest's memory.
    AttachVhostUser {
        /// To which port.
        port: PortId,
        /// A connected unix stream socket, or a listening one: then a front-end may come, go and come again
        /// and is always this port.
        fd: OwnedFd,
    },
    /// Frames come by [`Command::Inject`] and go by [`crate::control::event::Event::Frame`].
    AttachMemory {
        /// To which port.
        port: PortId,
    },
    /// Takes guests that arrive on a bound (and, for `Stream`, listening) unix socket. Each becomes a port
    /// of its own, numbered from 0x8000_0000, and is told by [`crate::control::event::Event::PortUp`].
    Listen {
        /// Its number, given by the caller.
        listener: u32,
        /// What arrives there.
        kind: ListenKind,
        /// The socket.
        fd: OwnedFd,
        /// What every new port is like.
        template: PortConfig,
    },
    /// Takes no more guests. Those of a stream listener stay; those of a datagram listener go with its socket.
    StopListening {
        /// Which.
        listener: u32,
    },
    /// Gives an address to a port.
    BindAddress {
        /// The port.
        port: PortId,
        /// The address.
        ip: IpAddr,
        /// The guest's MAC where it is known.
        mac: Option<Mac>,
    },
    /// Takes an address back.
    UnbindAddress {
        /// The address.
        ip: IpAddr,
    },
    /// Adds a service of the gateway.
    AddService {
        /// Its number.
        service: ServiceId,
        /// IP protocol: UDP or TCP.
        proto: u8,
        /// The address that it has for guests.
        address: IpAddr,
        /// Its port.
        port: u16,
        /// TCP: the unix socket that guests' connections are relayed to; `None`: the core serves DNS there.
        unix_path: Option<PathBuf>,
    },
    /// Sends the answer of a UDP service.
    ServiceSend {
        /// To which port.
        port: PortId,
        /// To which MAC.
        dst_mac: Mac,
        /// From where.
        src: SocketAddr,
        /// To where.
        dst: SocketAddr,
        /// UDP payload.
        payload: Vec<u8>,
    },
    /// The names that the DNS service may know something of: see `Network::set_dns_zones`.
    SetDnsZones {
        /// The service.
        service: ServiceId,
        /// Counts the changes of its records.
        generation: u64,
        /// Names as labels, in lower case.
        own: Vec<Box<[u8]>>,
    },
    /// The guests that have names have changed: see `Network::forget_guest_names`.
    ForgetGuestNames {
        /// As above.
        generation: u64,
    },
    /// The name servers that names of others are asked of: see `Network::set_name_servers`.
    SetNameServers {
        /// Which, and how.
        servers: NameServers,
    },
    /// The answer to a question of a port's guest: see `Network::dns_verdict`.
    DnsVerdict {
        /// The port that the question came with.
        port: PortId,
        /// Names the question.
        ticket: u64,
        /// As above, before the records were looked at.
        generation: u64,
        /// What the DNS service says of the name.
        verdict: DnsVerdict,
    },
    /// Answers the question that a rule asked about a flow: see `Network::decide`. Nothing happens when it is not open any
    /// more.
    Decide {
        /// The port that the question came with.
        port: PortId,
        /// Names the question.
        ticket: u64,
        /// Whether the flow may be opened.
        allow: bool,
    },
    /// Publishes a guest's port.
    AddForward {
        /// Its number.
        forward: ForwardId,
        /// IP protocol: TCP or UDP.
        proto: u8,
        /// The guest's address and port.
        guest: SocketAddr,
        /// Who opened the port.
        entry: Entry,
        /// Listening TCP or bound UDP sockets.
        fds: Vec<OwnedFd>,
    },
    /// Makes a TUN device the uplink: what goes outside is translated, and leaves there.
    AttachTun {
        /// The device, IFF_TUN | IFF_NO_PI, IFF_VNET_HDR or not.
        fd: OwnedFd,
        /// How it is translated.
        config: Box<NatEngineConfig>,
    },
    /// Publishes a guest's port on an external address of the uplink of packets.
    AddUplinkForward {
        /// Its number, apart from those of [`Command::AddForward`].
        forward: ForwardId,
        /// IP protocol: TCP or UDP.
        proto: u8,
        /// The external address and port.
        external: SocketAddrV4,
        /// The guest's address and port; 0.0.0.0 while there is no guest.
        guest: SocketAddr,
        /// Who opened the port.
        entry: Entry,
    },
    /// What the engine of the uplink did and holds: [`Value::Nat`].
    NatStats,
    /// Leads a published port to another address and port; what runs stays where it is. An address that no
    /// port has (0.0.0.0) refuses every client until the guest is there.
    RetargetForward {
        /// Which.
        forward: ForwardId,
        /// The guest's address and port.
        guest: SocketAddr,
    },
    /// Takes a published port back. Connections that run live on.
    RemoveForward {
        /// Which.
        forward: ForwardId,
    },
    /// A frame from the guest of a memory attachment.
    Inject {
        /// Its port.
        port: PortId,
        /// The frame, Ethernet header first.
        frame: Vec<u8>,
    },
    /// Writes every frame of every port to `fd` as pcapng.
    StartCapture {
        /// A file or pipe; written to by a thread of its own.
        fd: OwnedFd,
        /// Bytes kept of a frame, 0 for all.
        snaplen: u32,
    },
    /// The same with a capture that several workers write to. Made by [`crate::runtime::worker_group`].
    ShareCapture(SharedCapture),
    /// Takes a guest that came to a listener of another worker.
    Adopt(Box<AcceptedGuest>),
    /// Ends the capture; done when everything is written.
    StopCapture,
    /// Changes the rules of the network. Done when every flow that the old rules admitted has been judged by the new
    /// ones, and those that are no longer allowed have been cut: [`Value::FlowsCut`].
    SetPolicy {
        /// Whether anything leaves the network. [`NetMode::Bridged`] is refused, and so is any change of a network
        /// with that mode.
        mode: NetMode,
        /// Which guests open no flows to other guests.
        isolated: Isolated,
    },
    /// Puts rules of the owner in force. Done as [`Command::SetPolicy`].
    SetRules {
        /// The guest that they are for; `None`: all guests that have none of their own.
        port: Option<PortId>,
        /// The rules. Whoever sends them keeps them until this is done, so that a worker frees no large table.
        table: Option<Arc<RuleTable>>,
    },
    /// Limits what a guest carries, or all together.
    SetLimit {
        /// The guest; `None`: the network.
        port: Option<PortId>,
        /// The limit; `None` takes it back.
        limit: Option<LimitSpec>,
    },
    /// Says which addresses this host has, for rules about them. Flows are judged again later.
    SetHostAddresses {
        /// The addresses.
        addresses: Arc<HashSet<IpAddr>>,
    },
    /// Chooses which events of flows are sent, to spare both sides those that nobody wants. A worker starts
    /// with all of them.
    EnableFlowEvents {
        /// Flows that open and close.
        flows: bool,
        /// Flows that are denied.
        denials: bool,
    },
    /// Lists the flows: [`Value::Flows`].
    ListFlows,
    /// Lists the ports and their counters: [`Value::Ports`].
    PortStats,
    /// Ends the network.
    Stop,
    /// Panics, for tests of what happens then.
    #[cfg(test)]
    Panic,
}

impl Command {
    /// What it changes is to hold for all frames that come after it was given.
    pub(crate) fn is_urgent(&self) -> bool {
        matches!(self, Command::SetDnsZones { .. } | Command::ForgetGuestNames { .. })
    }
}

/// What a command brought.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Nothing but that it is done.
    None,
    /// All flows.
    Flows(Vec<FlowInfo>),
    /// All ports with their counters.
    Ports(Vec<(PortInfo, Counters)>),
    /// How many flows a change of the rules has cut.
    FlowsCut(u64),
    /// Of the engine of the uplink of packets.
    Nat(Box<(NatStats, ConnTrackStats)>),
}

/// Why a command was not done; nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No such port.
    #[error("there is no port {}", .0.0)]
    NoSuchPort(PortId),
    /// The port exists.
    #[error("port {} exists already", .0.0)]
    PortExists(PortId),
    /// The port has an attachment.
    #[error("port {} has an attachment already", .0.0)]
    Attached(PortId),
    /// Another port or the gateway has the address.
    #[error("address {0} is in use")]
    AddressInUse(IpAddr),
    /// There is no uplink of packets.
    #[error("the network has no uplink of packets")]
    NoUplink,
    /// An uplink of packets cannot be shared.
    #[error("an uplink of packets needs a network with one worker")]
    OneWorker,
    /// There is one already.
    #[error("the network has an uplink of packets already")]
    HasUplink,
    /// A network in the mode `bridged` has no rules, and no other network gets that mode.
    #[error("the mode `bridged` cannot be changed while a network runs")]
    Bridged,
    /// What the engine says to its configuration.
    #[error("{0}")]
    Nat(#[from] NatConfigError),
    /// Why a port cannot be published on an external address.
    #[error("{0}")]
    Forward(#[from] ForwardError),
    /// No such listener.
    #[error("there is no listener {0}")]
    NoSuchListener(u32),
    /// No such forward.
    #[error("there is no forward {}", .0.0)]
    NoSuchForward(ForwardId),
    /// The number is taken.
    #[error("number {0} is in use")]
    NumberInUse(u32),
    /// The descriptor is not what the command needs.
    #[error("{0}")]
    BadDescriptor(String),
    /// A path that no unix socket can have.
    #[error("{0} is too long for the path of a unix socket")]
    BadPath(PathBuf),
    /// The system refused something.
    #[error("{what}: {}", crate::os::sys::errno_text(*.errno))]
    System {
        /// What was tried.
        what: &'static str,
        /// Its errno.
        errno: i32,
    },
}

/// The command queue is full, or the worker is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the worker's command queue is full")]
pub struct QueueFull;

/// A command was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full, or the worker is gone.
    #[error(transparent)]
    QueueFull(#[from] QueueFull),
    /// The network runs in the process that this one was forked from.
    #[error("the network belongs to the process that this one was forked from")]
    Forked,
}

/// Wakes a worker. A wake-up that is not yet taken is not repeated.
pub(crate) struct Waker {
    fd: OwnedFd,
    pending: AtomicBool,
    /// A command in the queue is to be done before frames that come from now on.
    urgent: AtomicBool,
}

impl Waker {
    pub(crate) fn new() -> Result<Waker, i32> {
        let (pending, urgent) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Waker { fd: sys::eventfd()?, pending, urgent })
    }

    /// To be said after the command was queued, before [`Waker::wake`].
    pub(crate) fn mark_urgent(&self) {
        self.urgent.store(true, Ordering::SeqCst);
    }

    /// Whether somebody hurries; to be asked before the queue is looked at.
    pub(crate) fn take_urgent(&self) -> bool {
        self.urgent.load(Ordering::Acquire) && self.urgent.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub(crate) fn wake(&self) {
        if !self.pending.swap(true, Ordering::SeqCst) {
            sys::eventfd_signal(&self.fd);
        }
    }

    /// Takes the wake-up; to be called before the queue is looked at. True when there was one.
    pub(crate) fn take(&self) -> bool {
        // Cleared first: a wake between the two writes again, and at worst the worker looks once too often.
        sys::eventfd_clear(&self.fd);
        self.pending.swap(false, Ordering::SeqCst)
    }
}

/// Places of the queue that only the control side may fill: it looks whether all workers have room before it gives them a
/// command, and what workers give to each other meanwhile is not to take that room.
const CONTROL_PLACES: usize = 8;
/// Commands of the control side for which there is room where it says that there is.
const ROOM: usize = 4;

/// The control side's half of the queue.
pub(crate) struct CommandSender {
    inner: Mutex<(rtrb::Producer<Queued>, u64)>,
}

impl CommandSender {
    /// True when there is room for a few commands.
    pub(crate) fn has_room(&self) -> bool {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.0.slots() >= ROOM && !inner.0.is_abandoned()
    }

    /// Queues a command of the control side; its number.
    pub(crate) fn send(&self, command: Command) -> Result<u64, QueueFull> {
        self.send_leaving(0, command)
    }

    /// Queues a command of another worker.
    pub(crate) fn send_from_worker(&self, command: Command) -> Result<u64, QueueFull> {
        self.send_leaving(CONTROL_PLACES, command)
    }

    fn send_leaving(&self, places: usize, command: Command) -> Result<u64, QueueFull> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let (ring, next) = &mut *inner;
        if ring.is_abandoned() || ring.slots() <= places {
            return Err(QueueFull);
        }
        ring.push((*next, Box::new(command))).map_err(|_| QueueFull)?;
        *next += 1;
        Ok(*next - 1)
    }
}

/// A command with its number. In the queue it is a pointer, because all places of the queue come in use over time.
pub(crate) type Queued = (u64, Box<Command>);

/// A queue for `capacity` commands.
pub(crate) fn channel(capacity: usize) -> (CommandSender, rtrb::Consumer<Queued>) {
    let (producer, consumer) = rtrb::RingBuffer::new(capacity.max(16));
    (CommandSender { inner: Mutex::new((producer, 1)) }, consumer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_leave_room_for_the_commands_of_the_control_side() {
        let (commands, mut queue) = channel(16);
        let given = (0..20).filter(|_| commands.send_from_worker(Command::ListFlows).is_ok()).count();
        assert_eq!(given, 16 - CONTROL_PLACES);
        // What was promised stays, whatever workers try meanwhile.
        while commands.has_room() {
            for _ in 0..ROOM {
                assert!(commands.send_from_worker(Command::ListFlows).is_err());
                assert!(commands.send(Command::PortStats).is_ok());
            }
        }
        assert_eq!(queue.slots(), 16);
        queue.pop().unwrap();
        drop(queue);
        assert!(commands.send(Command::ListFlows).is_err() && !commands.has_room());
    }
}
