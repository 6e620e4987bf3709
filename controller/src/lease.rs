//! Leader election by a Lease: one controller decides, the others stand by.

use std::time::Duration;

use anyhow::{Result, bail};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease as LeaseObject, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::Mutex;
use tracing::{debug, info, warn};

const NAME: &str = "lifeboat-controller";
/// A holder that did not renew for this long is taken for dead.
const DURATION: Duration = Duration::from_secs(15);
/// How often the holder renews, and the others look.
const INTERVAL: Duration = Duration::from_secs(3);
/// A holder that could not renew for this long stops working: before others may take over.
const GIVE_UP: Duration = Duration::from_secs(10);

/// The Lease, as one candidate sees it.
pub(crate) struct Lease {
    api: Api<LeaseObject>,
    holder: String,
    held: Mutex<Option<LeaseObject>>,
}

/// Whether a candidate may take the lease: it is free, its own, or its holder was silent for longer than promised.
fn may_take(spec: Option<&LeaseSpec>, holder: &str, now: Timestamp) -> bool {
    let Some(spec) = spec else { return true };
    let current = spec.holder_identity.as_deref().unwrap_or_default();
    if current.is_empty() || current == holder {
        return true;
    }
    let promised = i64::from(spec.lease_duration_seconds.unwrap_or(0));
    spec.renew_time.as_ref().is_none_or(|renewed| now.as_second() - renewed.0.as_second() > promised)
}

impl Lease {
    pub(crate) fn new(client: Client, namespace: &str, holder: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), holder: holder.to_owned(), held: Mutex::new(None) }
    }

    /// Waits until this candidate leads.
    pub(crate) async fn acquire(&self) {
        loop {
            match self.try_take().await {
                Ok(true) => return,
                Ok(false) => debug!("another controller leads"),
                Err(error) => warn!(%error, "the lease cannot be read or written"),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Renews until that fails for too long; then this process must stop deciding.
    pub(crate) async fn keep(&self) -> Result<()> {
        let mut renewed = tokio::time::Instant::now();
        loop {
            tokio::time::sleep(INTERVAL).await;
            let attempt = tokio::time::timeout(INTERVAL, self.try_take()).await;
            match attempt {
                Ok(Ok(true)) => renewed = tokio::time::Instant::now(),
                Ok(Ok(false)) => bail!("another controller took the lease"),
                Ok(Err(error)) => warn!(%error, "the lease was not renewed"),
                Err(_) => warn!("the lease was not renewed in time"),
            }
            if renewed.elapsed() > GIVE_UP {
                bail!("the lease could not be renewed for {GIVE_UP:?}");
            }
        }
    }

    /// Lets another take over at once.
    pub(crate) async fn release(&self) {
        let Some(mut lease) = self.held.lock().await.take() else { return };
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = None;
        }
        match self.api.replace(NAME, &PostParams::default(), &lease).await {
            Ok(_) => info!("the lease is released"),
            Err(error) => debug!(%error, "the lease was not released"),
        }
    }

    async fn try_take(&self) -> Result<bool, kube::Error> {
        let now = Timestamp::now();
        let found = self.api.get_opt(NAME).await?;
        if let Some(lease) = &found
            && !may_take(lease.spec.as_ref(), &self.holder, now)
        {
            return Ok(false);
        }
        let is_new = found.is_none();
        let mut lease = found.unwrap_or_else(|| LeaseObject {
            metadata: ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() != Some(&self.holder) {
            spec.acquire_time = Some(MicroTime(now));
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0) + 1);
        }
        spec.holder_identity = Some(self.holder.clone());
        spec.renew_time = Some(MicroTime(now));
        spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
        // The resource version in the object makes two candidates at once collide instead of both winning.
        let written = if is_new {
            self.api.create(&PostParams::default(), &lease).await
        } else {
            self.api.replace(NAME, &PostParams::default(), &lease).await
        };
        match written {
            Ok(lease) => {
                *self.held.lock().await = Some(lease);
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(holder: &str, renewed: i64) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(holder.into()),
            renew_time: Timestamp::from_second(renewed).ok().map(MicroTime),
            lease_duration_seconds: Some(15),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn a_lease_is_taken_when_free_own_or_expired() {
        let now = Timestamp::from_second(1000).unwrap();
        assert!(may_take(None, "a", now));
        assert!(may_take(Some(&spec("", 999)), "a", now));
        assert!(may_take(Some(&spec("a", 999)), "a", now));
        assert!(!may_take(Some(&spec("b", 990)), "a", now));
        assert!(!may_take(Some(&spec("b", 985)), "a", now));
        assert!(may_take(Some(&spec("b", 984)), "a", now));
    }
}
