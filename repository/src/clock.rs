//! The only place that reads the clock.
//!
//! Time is shown to people and decides when a writer is *suspected*; it never decides what is safe.

use jiff::Timestamp;

/// The current time, in milliseconds, as every record stores it.
pub fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}
