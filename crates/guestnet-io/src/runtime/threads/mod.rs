//! Theory of operation: the packet threads of a process. [`placement`] starts them and places networks on them; [`worker`]
//! is the loop of one. [`adaptive`] says when it polls, [`turn`] when others are next; [`buffers`] is what its networks share,
//! `confinement` what it gives up.

pub(super) mod adaptive;
pub(crate) mod buffers;
pub(crate) mod confinement;
pub(crate) mod placement;
pub(crate) mod turn;
pub(crate) mod worker;
