//! Signs of life: `hb/<session>/<number>`. Hints only: they decide when a session is suspected, never what is safe.

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::debug;

use crate::engine::Engine;
use crate::id::SessionId;
use crate::store::StoreError;

/// Where heartbeats lie.
pub(crate) const HEARTBEAT_PREFIX: &str = "hb/";
/// How often a session shows that it lives.
const HEARTBEAT: Duration = Duration::from_mins(1);
/// The heartbeats that a session leaves lying; a mount may last for weeks.
const KEPT: u64 = 10;
/// No heartbeat is larger.
const MAX_BEAT_BYTES: u64 = 256;

/// The heart of a session of this process; it stops when this is dropped.
#[derive(Debug)]
pub(super) struct Heart {
    engine: Arc<Engine>,
    session: SessionId,
    began: Instant,
    beating: JoinHandle<()>,
}

impl Heart {
    pub(super) fn begin(engine: Arc<Engine>, session: SessionId) -> Self {
        let began = Instant::now();
        let beating = tokio::spawn(beat(Arc::clone(&engine), session));
        Self { engine, session, began, beating }
    }

    pub(super) fn stop(&self) {
        self.beating.abort();
    }

    /// Stops, and removes what it left.
    pub(super) async fn end(&self) {
        self.stop();
        // A short session has left nothing.
        if self.began.elapsed() >= HEARTBEAT {
            self.engine.remove_heartbeats(self.session).await;
        }
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Shows that the session lives, until it is stopped. Failures are harmless.
async fn beat(engine: Arc<Engine>, session: SessionId) {
    for number in 0u64.. {
        tokio::time::sleep(HEARTBEAT).await;
        let key = |number: u64| format!("{HEARTBEAT_PREFIX}{session}/{number:08}");
        let now = crate::clock::now().to_string();
        if let Err(error) = engine.store.put_if_absent(&key(number), now.into_bytes().into()).await {
            debug!(%session, %error, "no heartbeat");
        }
        if let Some(old) = number.checked_sub(KEPT)
            && let Err(error) = engine.store.delete(&key(old)).await
        {
            debug!(%session, %error, "an old heartbeat was not removed");
        }
    }
}

/// The session of a heartbeat's key.
pub(crate) fn session_of(key: &str) -> Option<SessionId> {
    key.strip_prefix(HEARTBEAT_PREFIX)?.split('/').next()?.parse().ok()
}

/// The newest heartbeat of a session: its key, and the time that it tells.
pub(crate) async fn newest(
    engine: &Engine,
    session: SessionId,
) -> Result<Option<(String, Option<Timestamp>)>, StoreError> {
    let listed: Vec<_> = engine.store.list(&format!("{HEARTBEAT_PREFIX}{session}/")).try_collect().await?;
    let Some(newest) = listed.into_iter().map(|object| object.key).max() else { return Ok(None) };
    let time = match engine.store.get(&newest, MAX_BEAT_BYTES).await {
        Ok(bytes) => std::str::from_utf8(&bytes).ok().and_then(|text| text.parse().ok()),
        Err(error) if error.is_not_found() => None,
        Err(error) => return Err(error),
    };
    Ok(Some((newest, time)))
}
