//! The contract between a network's logic and its callers: what is configured ([`config`]), what the control side can
//! tell it ([`command`]), what the logic asks of the outside ([`effects`]), what it counts ([`stats`]), and the plain types
//! of both sides ([`types`]).

pub mod command;
pub mod config;
pub mod effects;
pub mod stats;
pub mod types;
