//! Theory of operation: the containers of the packet path. Frames that change threads are in buffers of a
//! [`pool`], whose numbers go through a [`ring`]; what one worker owns is in slabs.

pub mod pool;
pub mod ring;
pub(crate) mod slab;
pub(crate) mod sync;
