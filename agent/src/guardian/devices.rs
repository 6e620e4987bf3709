//! Opens block devices for the agent of this node, whom the kernel lets open none.
//!
//! Where a pod's device is, kubelet says: its link below the pod's directory, where no pod can write. No path comes from a
//! pod's or a claim's spec, or from the agent.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use lifeboat_crds::volume_task::{MountedVolume, Operation, VolumeTaskSpec};
use lifeboat_process::telemetry::chain;
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::io::Errno;
use thiserror::Error;
use tracing::info;

use crate::volume::{self, VolumeError};
use crate::wire::{End, How};

/// A device that is there is open within this time.
const PATIENCE: Duration = Duration::from_secs(30);

/// The device that a task is about.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Order {
    pub(super) volume: MountedVolume,
    /// Whether it is to be filled; else it is only read.
    pub(super) writes: bool,
}

impl Order {
    /// `None`: the task is not about a block device.
    pub(super) fn of(spec: &VolumeTaskSpec) -> Option<Self> {
        let writes = match spec.operation {
            Operation::Backup(_) => false,
            Operation::Restore(_) => true,
            Operation::Dump(_) | Operation::Feed(_) | Operation::Maintain(_) => return None,
        };
        let volume = spec.volume.clone().filter(|volume| volume.block)?;
        Some(Self { volume, writes })
    }
}

/// A device that is not opened.
#[derive(Debug, Error)]
enum OpenError {
    #[error("this installation opens no block devices; set the chart's value guardian.blockDevices to true")]
    NotAllowed,
    #[error(transparent)]
    Find(#[from] VolumeError),
    #[error("cannot read the link that kubelet made for the volume {volume}")]
    Link { volume: String, source: io::Error },
    #[error(
        "the device of the volume {volume} is {}, which is neither below /dev nor among kubelet's devices, so it cannot be opened",
        .target.display()
    )]
    Elsewhere { volume: String, target: PathBuf },
    #[error("what kubelet has at {} for the volume {volume} is no block device", .target.display())]
    NoDevice { volume: String, target: PathBuf },
    #[error(
        "the kernel does not let the guardian open the device of the volume {volume}: the container guardian of the DaemonSet lifeboat-agent has to be privileged"
    )]
    Forbidden { volume: String },
    #[error("cannot open the device of the volume {volume}")]
    Open { volume: String, source: io::Error },
    #[error("the device of the volume {volume} did not open within {PATIENCE:?}")]
    TooSlow { volume: String },
    #[error("the opening ended unexpectedly")]
    Worker,
}

impl From<OpenError> for End {
    fn from(error: OpenError) -> Self {
        let how = match &error {
            OpenError::Find(VolumeError::PodGone { .. } | VolumeError::NotMounted { .. }) => How::Gone,
            OpenError::NotAllowed
            | OpenError::Find(VolumeError::Block { .. })
            | OpenError::Elsewhere { .. }
            | OpenError::NoDevice { .. }
            | OpenError::Forbidden { .. } => How::Failed,
            OpenError::Find(VolumeError::Look { .. })
            | OpenError::Link { .. }
            | OpenError::Open { .. }
            | OpenError::TooSlow { .. }
            | OpenError::Worker => How::Trouble,
        };
        Self::new(how, chain(&error))
    }
}

/// Opens devices.
#[derive(Debug, Clone)]
pub(super) struct Opener {
    /// Where the node's `/dev` is seen. `None`: no device is opened.
    pub(super) devices: Option<PathBuf>,
}

impl Opener {
    /// Opens the device of an order.
    pub(super) async fn open(&self, kubelet: &Path, order: Order) -> Result<OwnedFd, End> {
        let Some(devices) = self.devices.clone() else { return Err(OpenError::NotAllowed.into()) };
        let (kubelet, name) = (kubelet.to_owned(), order.volume.volume.clone());
        info!(pod = order.volume.pod, volume = name, writes = order.writes, "a block device is opened for the agent");
        // A device whose storage is gone may not open for long, and the call cannot be interrupted.
        let opening = tokio::task::spawn_blocking(move || open_device(&kubelet, &devices, &order));
        let opened = match tokio::time::timeout(PATIENCE, opening).await {
            Ok(opened) => opened.unwrap_or(Err(OpenError::Worker)),
            Err(_) => Err(OpenError::TooSlow { volume: name }),
        };
        Ok(opened?)
    }
}

fn open_device(kubelet: &Path, devices: &Path, order: &Order) -> Result<OwnedFd, OpenError> {
    let volume = || order.volume.volume.clone();
    let link = volume::find(kubelet, &order.volume)?.path;
    let target = std::fs::read_link(&link).map_err(|source| OpenError::Link { volume: volume(), source })?;
    let Some(path) = as_seen_here(&target, kubelet, devices) else {
        return Err(OpenError::Elsewhere { volume: volume(), target });
    };
    let failed = |error: Errno| match error {
        Errno::PERM | Errno::ACCESS => OpenError::Forbidden { volume: volume() },
        _ => OpenError::Open { volume: volume(), source: error.into() },
    };
    // Looked at before it is opened: to open something else may have effects, or wait for ever.
    let found = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let kind = FileType::from_raw_mode(fstat(&found).map_err(failed)?.st_mode);
    if kind != FileType::BlockDevice {
        return Err(OpenError::NoDevice { volume: volume(), target });
    }
    let access = if order.writes { OFlags::RDWR } else { OFlags::RDONLY };
    let found = format!("/proc/self/fd/{}", found.as_raw_fd());
    open(found, access | OFlags::CLOEXEC, Mode::empty()).map_err(failed)
}

/// Where this process sees what is at `target` on the node, if it does.
fn as_seen_here(target: &Path, kubelet: &Path, devices: &Path) -> Option<PathBuf> {
    let is_plain = target.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !is_plain {
        return None;
    }
    if let Ok(rest) = target.strip_prefix("/dev") {
        return Some(devices.join(rest));
    }
    target.starts_with(kubelet).then(|| target.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Node {
        kubelet: tempfile::TempDir,
        devices: tempfile::TempDir,
    }

    impl Node {
        /// The volume's link leads there.
        fn new(target: &dyn Fn(&Path) -> PathBuf) -> Self {
            let node = Self { kubelet: tempfile::tempdir().unwrap(), devices: tempfile::tempdir().unwrap() };
            let folder = node.kubelet.path().join("pods/uid/volumeDevices/kubernetes.io~csi");
            std::fs::create_dir_all(&folder).unwrap();
            symlink(target(node.kubelet.path()), folder.join("pv")).unwrap();
            node
        }

        async fn open(&self, pod_uid: &str) -> End {
            let volume = MountedVolume {
                namespace: "ns".into(),
                claim: "c".into(),
                claim_uid: "c".into(),
                volume: "pv".into(),
                pod: "db-0".into(),
                pod_uid: pod_uid.into(),
                block: true,
            };
            let opener = Opener { devices: Some(self.devices.path().to_owned()) };
            opener.open(self.kubelet.path(), Order { volume, writes: false }).await.unwrap_err()
        }
    }

    #[tokio::test]
    async fn what_is_not_there_or_no_device_is_told_and_never_opened() {
        let node = Node::new(&|kubelet| kubelet.join("plugins/device"));
        let absent = node.open("uid").await;
        assert!(absent.how == How::Trouble && absent.message.contains("pv"), "{absent:?}");
        assert_eq!(node.open("another").await.how, How::Gone);
        assert_eq!(node.open("..").await.how, How::Gone);
        std::fs::create_dir(node.kubelet.path().join("plugins")).unwrap();
        std::fs::write(node.kubelet.path().join("plugins/device"), "bytes").unwrap();
        let file = node.open("uid").await;
        assert!(file.how == How::Failed && file.message.contains("no block device"), "{file:?}");
        let node = Node::new(&|_| "/dev/sdz".into());
        // Would wait for a reader.
        rustix::fs::mknodat(rustix::fs::CWD, node.devices.path().join("sdz"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(node.open("uid").await.message.contains("no block device"));
    }

    #[tokio::test]
    async fn only_devices_that_kubelet_has_are_opened() {
        for target in ["/etc/passwd", "relative", "/dev/../etc/passwd", "/var/lib/kubelet-other/x"] {
            let refused = Node::new(&|_| target.into()).open("uid").await;
            assert!(refused.how == How::Failed && refused.message.contains(target), "{refused:?}");
        }
        let kubelet = Path::new("/var/lib/kubelet");
        let seen = |target: &str| as_seen_here(Path::new(target), kubelet, Path::new("/host/dev"));
        assert_eq!(seen("/dev/mapper/a"), Some("/host/dev/mapper/a".into()));
        assert_eq!(seen("/var/lib/kubelet/plugins/x"), Some("/var/lib/kubelet/plugins/x".into()));
        assert_eq!(seen("/var/lib/kubelet/../x"), None);
    }

    #[tokio::test]
    async fn an_installation_may_open_none() {
        let volume = serde_json::from_value(serde_json::json!({
            "namespace": "ns", "claim": "c", "claimUid": "c", "volume": "pv", "pod": "p", "podUid": "u", "block": true
        }))
        .unwrap();
        let order = Order { volume, writes: true };
        let refused = Opener { devices: None }.open(Path::new("/"), order).await.unwrap_err();
        assert!(refused.how == How::Failed && refused.message.contains("guardian.blockDevices"), "{refused:?}");
    }
}
