//! Borrows block devices from the guardian of the node.
//!
//! The kernel checks the right to a device when it is opened, not when it is read: the guardian opens it, for what a task
//! says, and hands the open device over. This process opens none, and gets at no other.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use lifeboat_crds::VolumeTask;
use lifeboat_crds::conditions::Reason;
use rustix::fs::{FileType, fstat};
use tokio::time::timeout;

use crate::outcome::Failure;
use crate::wire::{self, End, How};

/// The guardian answers within this time.
const PATIENCE: Duration = Duration::from_mins(1);

/// The device of the task's volume, open for reading if the task is a backup, else for writing too.
pub(crate) async fn borrow(socket: &Path, task: &VolumeTask) -> Result<OwnedFd, Failure> {
    let asked = async { wire::take_over(&mut wire::ask(socket, task).await?).await };
    let device = match timeout(PATIENCE, asked).await {
        Ok(Ok(Ok(device))) => device,
        Ok(Ok(Err(end))) => return Err(refused(end)),
        Ok(Err(error)) => return Err(unanswered(&error)),
        Err(_) => return Err(unanswered(&io::ErrorKind::TimedOut.into())),
    };
    let is_device = fstat(&device).is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice);
    if is_device {
        Ok(device)
    } else {
        Err(Failure::new(Reason::InternalError, "what the guardian of the node handed over is no block device"))
    }
}

fn unanswered(error: &io::Error) -> Failure {
    let message = format!("the guardian of the node, which opens block devices, does not answer: {error}");
    Failure { may_pass: true, ..Failure::new(Reason::ReadFailed, message) }
}

fn refused(end: End) -> Failure {
    let reason = match end.how {
        How::Failed => Reason::VolumeUnsupported,
        How::Gone => Reason::PodVanished,
        How::Done | How::TimedOut | How::Trouble => Reason::ReadFailed,
    };
    Failure { may_pass: end.how == How::Trouble, ..Failure::new(reason, end.message) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Frame;
    use serde_json::json;
    use std::os::fd::AsFd;
    use tokio::net::UnixListener;

    fn task() -> VolumeTask {
        serde_json::from_value(json!({
            "apiVersion": "lifeboat.dev/v1alpha1", "kind": "VolumeTask", "metadata": {"name": "b-1", "uid": "u"},
            "spec": {
                "nodeName": "n", "deadline": "2026-01-01T04:00:00Z",
                "repository": {"name": "r", "id": "ab", "backend": {"filesystem": {"path": "/x"}}, "encryptionSecret": {"name": "s"}},
                "operation": {"restore": {"snapshot": "ab"}}
            }
        }))
        .unwrap()
    }

    /// Asks a guardian that says this, or hands something over that is no device.
    async fn answered_by(says: Option<Frame>) -> Failure {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("guardian.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let answering = async {
            let (mut agent, _) = listener.accept().await.unwrap();
            wire::hear(&mut agent).await.unwrap();
            if let Some(frame) = says {
                wire::say(&mut agent, &frame).await.unwrap();
            } else {
                let file = std::fs::File::open("/dev/null").unwrap();
                wire::hand_over(&agent, file.as_fd()).await.unwrap();
            }
        };
        let task = task();
        tokio::join!(borrow(&socket, &task), answering).0.unwrap_err()
    }

    #[tokio::test]
    async fn only_block_devices_are_taken_and_refusals_are_told() {
        assert!(answered_by(None).await.message.contains("no block device"));
        for (how, reason, may_pass) in [
            (How::Failed, Reason::VolumeUnsupported, false),
            (How::Gone, Reason::PodVanished, false),
            (How::Trouble, Reason::ReadFailed, true),
        ] {
            let failure = answered_by(Some(Frame::End(End::new(how, "why")))).await;
            assert_eq!((failure.reason, failure.may_pass, failure.message.as_str()), (reason, may_pass, "why"));
        }
        assert!(answered_by(Some(Frame::Started)).await.may_pass);
    }
}
