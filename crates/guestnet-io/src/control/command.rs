//! Theory of operation: the control side speaks to a worker through a bounded queue and an eventfd. Each
//! command has a number, and when it is done the number comes back in [`crate::control::event::Event::Done`]. What a
//! command brings along (descriptors) belongs to the worker from then on.

use crate::attachment::quota::Charge;
use crate::attachment::vhost_user::FrontEnds;
use crate::control::capture::SharedCapture;
use crate::os::sys;
pub use guestnet_core::command::Value;
use guestnet_core::command::{NetworkCommand, NetworkError, Scope};
use guestnet_core::nat::NatEngineConfig;
use guestnet_core::policy::Entry;
use guestnet_core::types::{ForwardId, PortConfig, PortId, ServiceId};
use std::net::{IpAddr, SocketAddr};
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

/// What every worker of a network does, besides what its logic has to know.
#[derive(Debug, Clone)]
pub enum WorkerCommand {
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
    /// Writes every frame to a capture that all workers share. Made by [`crate::runtime::group`].
    ShareCapture(SharedCapture),
    /// Ends the capture; done when everything is written.
    StopCapture,
    /// Chooses which events of flows are sent, to spare both sides those that nobody wants. A worker starts
    /// with all of them.
    EnableFlowEvents {
        /// Flows that open and close.
        flows: bool,
        /// Flows that are denied.
        denials: bool,
    },
    /// Ends the network.
    Stop,
}

/// What a worker can be told to do. [`Command::scope`] says which worker.
#[derive(Debug)]
pub enum Command {
    /// What only the logic of the network has to know.
    Network(NetworkCommand),
    /// What every worker does.
    Worker(WorkerCommand),
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
    /// Takes a guest that came to a listener of another worker.
    Adopt(Box<AcceptedGuest>),
    /// Panics, for tests of what happens then.
    #[cfg(test)]
    Panic,
}

impl Command {
    /// Which of several workers it is for.
    pub(crate) fn scope(&self) -> Scope {
        match self {
            Command::Network(command) => command.scope(),
            Command::Worker(_) => Scope::All,
            Command::RemovePort { port }
            | Command::AttachTap { port, .. }
            | Command::AttachStream { port, .. }
            | Command::AttachDgram { port, .. }
            | Command::AttachVhostUser { port, .. }
            | Command::AttachMemory { port }
            | Command::Inject { port, .. } => Scope::Port(*port),
            Command::Listen { listener, .. } | Command::StopListening { listener } => {
                Scope::Listener(*listener)
            }
            Command::AttachTun { .. } => Scope::First,
            Command::AddPort { .. }
            | Command::AddForward { .. }
            | Command::RemoveForward { .. }
            | Command::StartCapture { .. }
            | Command::Adopt(_) => Scope::Group,
            #[cfg(test)]
            Command::Panic => Scope::First,
        }
    }

    /// What it changes is to hold for all frames that come after it was given.
    pub(crate) fn is_urgent(&self) -> bool {
        matches!(self, Command::Network(command) if command.is_urgent())
    }
}

impl From<NetworkCommand> for Command {
    fn from(command: NetworkCommand) -> Command {
        Command::Network(command)
    }
}

impl From<WorkerCommand> for Command {
    fn from(command: WorkerCommand) -> Command {
        Command::Worker(command)
    }
}

/// Why a command was not done; nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The logic of the network refused it.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The port exists.
    #[error("port {} exists already", .0.0)]
    PortExists(PortId),
    /// The port has an attachment.
    #[error("port {} has an attachment already", .0.0)]
    Attached(PortId),
    /// An uplink of packets cannot be shared.
    #[error("an uplink of packets needs a network with one worker")]
    OneWorker,
    /// There is one already.
    #[error("the network has an uplink of packets already")]
    HasUplink,
    /// No such listener.
    #[error("there is no listener {0}")]
    NoSuchListener(u32),
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
        let given = (0..20).filter(|_| commands.send_from_worker(WorkerCommand::Stop.into()).is_ok()).count();
        assert_eq!(given, 16 - CONTROL_PLACES);
        // What was promised stays, whatever workers try meanwhile.
        while commands.has_room() {
            for _ in 0..ROOM {
                assert!(commands.send_from_worker(WorkerCommand::Stop.into()).is_err());
                assert!(commands.send(WorkerCommand::StopCapture.into()).is_ok());
            }
        }
        assert_eq!(queue.slots(), 16);
        queue.pop().unwrap();
        drop(queue);
        assert!(commands.send(WorkerCommand::Stop.into()).is_err() && !commands.has_room());
    }
}
