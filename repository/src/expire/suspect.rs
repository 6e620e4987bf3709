//! When a session is taken for dead. A guess, from hints: a wrong one costs a session its work and nobody data.

use std::collections::HashMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use crate::engine::Engine;
use crate::id::SessionId;
use crate::session::heartbeat;
use crate::store::StoreError;

/// Watches undecided sessions.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The newest heartbeat of each, and since when it is the newest by this process's own time.
    seen: HashMap<SessionId, (Option<String>, Instant)>,
}

impl Watch {
    /// Whether the session was silent for too long: by the times that it wrote, or by what was seen here.
    ///
    /// `since` is when it registered, in milliseconds.
    pub(super) async fn is_silent(
        &mut self,
        engine: &Engine,
        session: SessionId,
        since: i64,
        silence: Duration,
    ) -> Result<bool, StoreError> {
        let (beat, time) = heartbeat::newest(engine, session).await?.unzip();
        let sign = time.flatten().or_else(|| Timestamp::from_millisecond(since).ok()).unwrap_or(Timestamp::UNIX_EPOCH);
        let age = crate::clock::now().duration_since(sign);
        if age >= SignedDuration::try_from(silence).unwrap_or(SignedDuration::MAX) {
            return Ok(true);
        }
        let now = Instant::now();
        let (known, from) = self.seen.entry(session).or_insert_with(|| (beat.clone(), now));
        if *known != beat {
            (*known, *from) = (beat, now);
        }
        Ok(now.duration_since(*from) > silence)
    }
}
