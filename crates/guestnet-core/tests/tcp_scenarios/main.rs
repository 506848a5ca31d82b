//! Scenarios of the TCP relay, one module for each part of a connection's life.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../tcp_support/mod.rs"]
mod tcp_support;

mod blind;
mod closing;
mod download;
mod hold;
mod hostile;
mod keepalive;
mod loss;
mod opening;
mod upload;
