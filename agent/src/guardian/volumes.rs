//! Keeps the volumes of a pod frozen by the kernel of the node.

use std::path::Path;
use std::time::Duration;

use lifeboat_crds::quiesce_lease::{LeaseEnd, Watchdog};
use lifeboat_crds::volume_task::MountedVolume;
use lifeboat_process::telemetry::chain;

use super::cri::Containers;
use super::fsfreeze::{FileSystem, FreezeError};
use super::intent::Thaw;
use super::keeper::{Guardian, Lease, Outcome, timed_out, until_let_go};
use crate::volume::{self, VolumeError};

/// Before a thaw that the kernel refused is tried again.
const AGAIN: Duration = Duration::from_millis(500);

fn open(kubelet: &Path, lease: &Lease<'_>, names: &[String]) -> Result<Vec<FileSystem>, Outcome> {
    let find = |name: &String| {
        let wanted = MountedVolume {
            namespace: lease.workload.namespace.clone(),
            claim: String::new(),
            claim_uid: String::new(),
            volume: name.clone(),
            pod: lease.workload.pod.clone(),
            pod_uid: lease.workload.pod_uid.clone(),
            block: false,
        };
        let mounted = volume::find(kubelet, &wanted).map_err(|error| {
            let gone = matches!(error, VolumeError::PodGone { .. } | VolumeError::NotMounted { .. });
            Outcome::new(if gone { LeaseEnd::Gone } else { LeaseEnd::Failed }, chain(&error))
        })?;
        FileSystem::open(&mounted.path, &kubelet.join("pods"))
            .map_err(|error| Outcome::new(LeaseEnd::Failed, format!("the volume {name}: {}", chain(&error))))
    };
    names.iter().map(find).collect()
}

/// Freezes in order; thaws what it froze when one fails.
fn freeze(volumes: &[FileSystem]) -> Result<(), FreezeError> {
    for (at, volume) in volumes.iter().enumerate() {
        if let Err(error) = volume.freeze() {
            return thaw(&volumes[..at]).and(Err(error));
        }
    }
    Ok(())
}

fn thaw(volumes: &[FileSystem]) -> Result<(), FreezeError> {
    volumes.iter().rev().map(FileSystem::thaw).fold(Ok(()), Result::and)
}

pub(super) async fn keep<C: Containers>(guardian: &Guardian<C>, lease: &Lease<'_>, names: &[String]) -> Outcome {
    let volumes = match open(&guardian.kubelet_dir, lease, names) {
        Ok(volumes) => volumes,
        Err(outcome) => return outcome,
    };
    let paths = volumes.iter().map(|volume| volume.path().to_owned()).collect();
    let intent = match guardian.announce(lease, Thaw::Volumes { paths }) {
        Ok(intent) => intent,
        Err(outcome) => return outcome,
    };
    lease.begins();
    // The kernel may take its time to write what is dirty, and cannot be interrupted.
    let freezing = tokio::task::spawn_blocking(move || (freeze(&volumes), volumes));
    let Ok((frozen, volumes)) = freezing.await else {
        return Outcome::new(LeaseEnd::Failed, "the freeze ended unexpectedly");
    };
    let outcome = match frozen {
        Err(error) => {
            intent.remove();
            return Outcome::new(LeaseEnd::Failed, chain(&error));
        }
        Ok(()) if tokio::time::Instant::now() >= lease.give_up => timed_out(lease),
        Ok(()) => {
            lease.is_frozen(Watchdog::Node);
            until_let_go(lease).await
        }
    };
    while let Err(error) = thaw(&volumes) {
        lease.says(format!("the volumes may still be frozen: {}", chain(&error)));
        tokio::time::sleep(AGAIN).await;
    }
    intent.remove();
    outcome
}
