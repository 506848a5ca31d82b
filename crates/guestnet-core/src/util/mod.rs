//! Small parts that every layer uses: accounts, a keyed hash, token buckets and a timer wheel.

pub(crate) mod account;
pub(crate) mod rate_limiter;
pub(crate) mod siphash;
pub(crate) mod timer_wheel;
pub(crate) mod timers;
pub(crate) mod token_bucket;
