//! Where a pod's volume is mounted on this node.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use lifeboat_crds::volume_task::MountedVolume;
use thiserror::Error;

/// A volume that is not where it should be.
#[derive(Debug, Error)]
pub(crate) enum VolumeError {
    #[error(
        "the pod {pod} has no directory on this node any more: it ended or moved; the next backup reads its successor"
    )]
    PodGone { pod: String },
    #[error("the pod {pod} does not have the volume {volume} mounted")]
    NotMounted { pod: String, volume: String },
    #[error("the volume {volume} is a raw block device, and the task is for a file system")]
    Block { volume: String },
    #[error("cannot look at {path}")]
    Look { path: String, source: io::Error },
}

/// A mounted volume, and what tells it from another that is mounted there later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// Of a block device the link that kubelet makes for it.
    pub(crate) path: PathBuf,
    pub(crate) is_block: bool,
    device: u64,
    inode: u64,
}

impl Mounted {
    /// Whether the same volume is still mounted there.
    pub(crate) fn is_still_there(&self) -> bool {
        // A block device's link leads out of what the agent sees.
        let found = if self.is_block { fs::symlink_metadata(&self.path) } else { fs::metadata(&self.path) };
        found.is_ok_and(|found| found.dev() == self.device && found.ino() == self.inode)
    }
}

/// A name from the API that becomes a part of a path must be one component.
fn is_component(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0'])
}

/// Finds the volume below kubelet's directory: `pods/<uid>/volumes/<plugin>/<volume>`, for CSI the folder `mount` in it; of
/// a block device the link `pods/<uid>/volumeDevices/<plugin>/<volume>`.
pub(crate) fn find(kubelet: &Path, wanted: &MountedVolume) -> Result<Mounted, VolumeError> {
    let gone = || VolumeError::PodGone { pod: wanted.pod.clone() };
    let unmounted = || VolumeError::NotMounted { pod: wanted.pod.clone(), volume: wanted.volume.clone() };
    if !is_component(&wanted.pod_uid) || !is_component(&wanted.volume) {
        return Err(unmounted());
    }
    let pod = kubelet.join("pods").join(&wanted.pod_uid);
    if !wanted.block && fs::symlink_metadata(pod.join("volumeDevices/kubernetes.io~csi").join(&wanted.volume)).is_ok() {
        return Err(VolumeError::Block { volume: wanted.volume.clone() });
    }
    let volumes = pod.join(if wanted.block { "volumeDevices" } else { "volumes" });
    let look = |path: &Path, source: io::Error| VolumeError::Look { path: path.display().to_string(), source };
    let plugins = match fs::read_dir(&volumes) {
        Ok(plugins) => plugins,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(if pod.exists() { unmounted() } else { gone() });
        }
        Err(error) => return Err(look(&volumes, error)),
    };
    for plugin in plugins {
        let plugin = plugin.map_err(|error| look(&volumes, error))?.path();
        let volume = plugin.join(&wanted.volume);
        let is_csi = plugin.file_name().is_some_and(|name| name == "kubernetes.io~csi");
        let path = if is_csi && !wanted.block { volume.join("mount") } else { volume };
        let found = if wanted.block { fs::symlink_metadata(&path) } else { fs::metadata(&path) };
        match found {
            Ok(found) if wanted.block || found.is_dir() => {
                let (device, inode) = (found.dev(), found.ino());
                return Ok(Mounted { path, is_block: wanted.block, device, inode });
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(look(&path, error)),
        }
    }
    Err(unmounted())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(volume: &str) -> MountedVolume {
        MountedVolume {
            namespace: "ns".into(),
            claim: "data".into(),
            claim_uid: "c".into(),
            volume: volume.into(),
            pod: "db-0".into(),
            pod_uid: "uid".into(),
            block: false,
        }
    }

    #[test]
    fn volumes_are_found_below_the_pod() {
        let kubelet = tempfile::tempdir().unwrap();
        let volumes = kubelet.path().join("pods/uid/volumes");
        assert!(matches!(find(kubelet.path(), &wanted("pv1")), Err(VolumeError::PodGone { .. })));
        fs::create_dir_all(volumes.join("kubernetes.io~csi/pv1/mount")).unwrap();
        fs::create_dir_all(volumes.join("kubernetes.io~local-volume/pv2")).unwrap();
        let csi = find(kubelet.path(), &wanted("pv1")).unwrap();
        assert!(csi.path.ends_with("kubernetes.io~csi/pv1/mount"));
        assert!(find(kubelet.path(), &wanted("pv2")).unwrap().path.ends_with("pv2"));
        assert!(matches!(find(kubelet.path(), &wanted("pv3")), Err(VolumeError::NotMounted { .. })));
        assert!(csi.is_still_there());
        // The old folder is kept aside so that its inode cannot be given to the new one.
        fs::rename(&csi.path, kubelet.path().join("aside")).unwrap();
        assert!(!csi.is_still_there());
        fs::create_dir(&csi.path).unwrap();
        assert!(!csi.is_still_there());
    }

    #[test]
    fn block_devices_are_found_by_their_links_and_strange_names_are_refused() {
        let kubelet = tempfile::tempdir().unwrap();
        let devices = kubelet.path().join("pods/uid/volumeDevices/kubernetes.io~csi");
        fs::create_dir_all(&devices).unwrap();
        std::os::unix::fs::symlink("/does/not/exist", devices.join("pv1")).unwrap();
        assert!(matches!(find(kubelet.path(), &wanted("pv1")), Err(VolumeError::Block { .. })));
        let found = find(kubelet.path(), &MountedVolume { block: true, ..wanted("pv1") }).unwrap();
        assert!(found.is_block && found.is_still_there());
        fs::remove_file(devices.join("pv1")).unwrap();
        assert!(!found.is_still_there());
        for name in ["..", "../../etc", "", "a/b"] {
            assert!(matches!(find(kubelet.path(), &wanted(name)), Err(VolumeError::NotMounted { .. })), "{name}");
        }
    }
}
