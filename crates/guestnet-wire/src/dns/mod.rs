//! Theory of operation: the one codec for DNS messages (RFC 1035 section 4, EDNS by RFC 6891).
//!
//! - [`Query`] reads every kind of query, and says how an unreadable one is refused.
//! - [`Answer`] reads the shape of a response: where its records and TTLs are. Records stay bytes, so any type passes,
//!   also those that nobody has thought of yet.
//! - [`build()`] makes responses of the network's own from records.
//!
//! Invariants: nothing is followed but in [`expand_name`], whose pointers must lead backwards, so nothing can loop. Each
//! byte is looked at a bounded number of times.

mod answer;
mod build;
mod format;
mod query;

pub use answer::Answer;
pub use build::{Record, Section, build, explain, join, records};
pub use format::{
    HEADER, IN, LABEL_MAX, NAME_MAX, PLAIN_MAX, TCP_MAX, UDP_MAX, ede, expand_name, flags, is_meta, kind,
    rcode,
};
pub use query::{Edns, Query, Unreadable, emit_query, refuse};
