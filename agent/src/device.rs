//! Lends the block device of a pod to the agent of its node.
//!
//! Kubernetes lets only the pod that has a block volume open its device. So a pod of Lifeboat's opens it and hands the open
//! device over a socket in a folder of its own, which the agent sees among kubelet's directories. The agent opens nothing
//! itself and gets at no other device; whoever answers in the pod's place can only give what it may open.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use tracing::warn;

/// The name of the pod's folder, and of the socket in it.
const FOLDER: &str = "lend";
const SOCKET: &str = "device.sock";
/// Opening a device takes no longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// How a device is lent.
#[derive(Debug, Args)]
pub(crate) struct LendOptions {
    /// The device.
    #[arg(long)]
    device: PathBuf,
    /// The folder in which the socket is made.
    #[arg(long)]
    folder: PathBuf,
    /// Opens it for reading alone.
    #[arg(long)]
    read_only: bool,
}

/// Lends the device until the process is told to end.
pub(crate) async fn run(options: LendOptions) -> Result<()> {
    let socket = options.folder.join(SOCKET);
    if let Err(error) = std::fs::remove_file(&socket)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error).context("cannot remove an old socket");
    }
    let listener = UnixListener::bind(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
    // Ends with the process.
    std::thread::spawn(move || {
        for asking in listener.incoming() {
            if let Err(error) = asking.and_then(|asking| give(&asking, &options.device, options.read_only)) {
                warn!(%error, "the device was not lent");
            }
        }
    });
    crate::until_told_to_end().await
}

/// Hands the device over, or says why not.
fn give(asking: &UnixStream, device: &Path, read_only: bool) -> io::Result<()> {
    asking.set_write_timeout(Some(PATIENCE))?;
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    match open(device, access | OFlags::CLOEXEC, Mode::empty()) {
        Ok(device) => send(asking, b"+", Some(device.as_fd())),
        Err(error) => send(asking, io::Error::from(error).to_string().as_bytes(), None),
    }
}

fn send(asking: &UnixStream, text: &[u8], device: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let handed: Vec<_> = device.into_iter().collect();
    if !handed.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&handed));
    }
    sendmsg(asking, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Borrows the device of a pod whose directory of kubelet's this is. Blocking.
pub(crate) fn borrow(pod: &Path) -> io::Result<OwnedFd> {
    let directory = open(pod, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = format!("volumes/kubernetes.io~empty-dir/{FOLDER}/{SOCKET}");
    // The pod may be of a tenant's namespace: its folder leads nowhere else.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let socket = openat2(&directory, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    let asking = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd()))?;
    let device = receive(&asking)?;
    if FileType::from_raw_mode(fstat(&device)?.st_mode) != FileType::BlockDevice {
        return Err(io::Error::other("what the pod handed over is not a block device"));
    }
    Ok(device)
}

fn receive(asking: &UnixStream) -> io::Result<OwnedFd> {
    asking.set_read_timeout(Some(PATIENCE))?;
    let mut text = [0; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(asking, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let device = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut devices) => devices.next(),
        _ => None,
    });
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("the pod handed over more than one device"));
    }
    device.ok_or_else(|| {
        let said = String::from_utf8_lossy(&text[..got.bytes]);
        let said: String = said.chars().filter(|c| !c.is_control()).collect();
        io::Error::other(format!("the pod cannot open its device: {said}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn pod() -> (tempfile::TempDir, PathBuf) {
        let pod = tempfile::tempdir().unwrap();
        let folder = pod.path().join("volumes/kubernetes.io~empty-dir").join(FOLDER);
        std::fs::create_dir_all(&folder).unwrap();
        (pod, folder)
    }

    fn lender(folder: &Path, device: &'static str) {
        let listener = UnixListener::bind(folder.join(SOCKET)).unwrap();
        std::thread::spawn(move || give(&listener.accept().unwrap().0, Path::new(device), true));
    }

    #[test]
    fn only_block_devices_are_taken_and_refusals_are_told() {
        for (device, says) in [("/dev/null", "not a block device"), ("/does/not/exist", "No such file")] {
            let (pod, folder) = pod();
            lender(&folder, device);
            let error = borrow(pod.path()).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn what_is_open_in_one_process_is_usable_in_another() {
        let (one, other) = UnixStream::pair().unwrap();
        give(&one, Path::new("/proc/self/cmdline"), true).unwrap();
        let mut bytes = [0; 8];
        assert!(rustix::io::read(receive(&other).unwrap(), &mut bytes).unwrap() > 0);
    }

    #[test]
    fn a_folder_that_leads_elsewhere_is_not_followed() {
        let (pod, folder) = pod();
        let (_other, elsewhere) = self::pod();
        lender(&elsewhere, "/dev/null");
        symlink(elsewhere.join(SOCKET), folder.join(SOCKET)).unwrap();
        assert!(borrow(pod.path()).is_err());
    }
}
