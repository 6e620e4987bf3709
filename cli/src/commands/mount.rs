//! `lifeboat mount`

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail};
use lifeboat_repository::snapshot::Content;
use rustix::mount::UnmountFlags;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::restore::find;
use crate::mount::{Filter, Mounted, Served, mount};
use crate::options::{DONE, Global, INCOMPLETE, Mount};
use crate::output::{complain, say};
use crate::repository;

/// Where the kernel is spoken with.
const DEVICE: &str = "/dev/fuse";
/// How long programs that still use the mount are waited for when it is to end.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// Shows snapshots until it is told to end or somebody unmounts them. What could not be read makes the exit code 3.
pub(crate) async fn run(global: &Global, options: &Mount) -> Result<u8> {
    check_device(Path::new(DEVICE))?;
    check_mountpoint(&options.mountpoint)?;
    let served = Arc::new(serve(global, options).await?);
    let (shown, mountpoint) = (Arc::clone(&served), options.mountpoint.clone());
    let allow_other = options.allow_other;
    let mounted = tokio::task::spawn_blocking(move || mount(shown, &mountpoint, allow_other)).await?;
    let outcome = match mounted {
        Ok(mounted) => until_the_end(global, options, &served, mounted).await,
        Err(error) => Err(explain(error, &options.mountpoint)),
    };
    served.release().await;
    outcome?;
    let failures = served.failures();
    if global.json {
        say!("{}", json!({"unmounted": options.mountpoint, "failures": failures}));
    } else if failures > 0 && !global.quiet {
        complain!("lifeboat: {failures} failures are listed above; see `lifeboat check --help`");
    }
    Ok(if failures == 0 { DONE } else { INCOMPLETE })
}

async fn serve(global: &Global, options: &Mount) -> Result<Served> {
    let repository = repository::open(global).await?;
    let Some(wanted) = &options.snapshot else {
        let filter = Filter { lineage: options.lineage.clone(), tags: options.tag.clone() };
        return Served::all(repository, filter).await;
    };
    let snapshot = find(&repository, wanted, options.lineage.as_deref()).await?;
    if let Content::RecoveryPoint { members, .. } = &snapshot.content {
        let members: Vec<_> = members.iter().map(|id| id.to_string()[..12].to_owned()).collect();
        bail!(
            "{wanted} is a recovery point of several snapshots; mount without --snapshot, or one of them: {}",
            members.join(", ")
        );
    }
    Served::single(repository, snapshot).await
}

async fn until_the_end(global: &Global, options: &Mount, served: &Arc<Served>, mut mounted: Mounted) -> Result<()> {
    let mut signals =
        [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?];
    let [interrupt, terminate, hangup] = &mut signals;
    let shown = options.mountpoint.display();
    if global.json {
        say!("{}", json!({"mounted": options.mountpoint, "snapshots": served.count()}));
    } else if !global.quiet {
        say!("{} snapshots at {shown}, until Ctrl-C or `umount {shown}`", served.count());
    }
    let care = tokio::spawn({
        let served = Arc::clone(served);
        async move { served.care_for_pins().await }
    });
    let ended = tokio::select! {
        ended = &mut mounted.ended => Some(ended),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
        _ = hangup.recv() => None,
    };
    care.abort();
    if let Some(ended) = ended {
        return ended.context("the mount ended unexpectedly")?.context("the mount failed");
    }
    unmount(&mut mounted, &options.mountpoint).await
}

/// Takes the mount away, also under programs that use it: what they have open fails from then on.
async fn unmount(mounted: &mut Mounted, mountpoint: &Path) -> Result<()> {
    if let Err(error) = mounted.unmount() {
        if error.kind() != ErrorKind::ResourceBusy {
            return Err(error).with_context(|| format!("cannot unmount {}", mountpoint.display()));
        }
        complain!("lifeboat: {} is in use; what is open there fails from now on", mountpoint.display());
        rustix::mount::unmount(mountpoint, UnmountFlags::DETACH)
            .with_context(|| format!("cannot unmount {}", mountpoint.display()))?;
    }
    // Ends at once, unless it is in use: then with this program.
    let _ = tokio::time::timeout(LAST_ANSWERS, &mut mounted.ended).await;
    Ok(())
}

fn check_device(device: &Path) -> Result<()> {
    match std::fs::OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Ok(()),
        Err(error) => {
            let device = device.display();
            let hint = match error.kind() {
                ErrorKind::NotFound => {
                    format!(
                        "this machine has no {device}: load the kernel's module `fuse`; a container must be given the device"
                    )
                }
                ErrorKind::PermissionDenied => {
                    format!("no permission for {device}: run as root, or allow this user to read and write it")
                }
                _ => format!("cannot use {device}"),
            };
            Err(Error::from(error).context(hint))
        }
    }
}

fn check_mountpoint(mountpoint: &Path) -> Result<()> {
    let shown = mountpoint.display();
    let mut listed = std::fs::read_dir(mountpoint).map_err(|error| {
        let hint = match error.kind() {
            ErrorKind::NotFound => format!("the folder {shown} does not exist; make it first"),
            ErrorKind::NotADirectory => format!("{shown} is not a folder"),
            ErrorKind::NotConnected => {
                format!("a mount that died is still at {shown}; take it away with `umount {shown}`")
            }
            _ => format!("cannot read the folder {shown}"),
        };
        Error::from(error).context(hint)
    })?;
    match listed.next() {
        None => Ok(()),
        Some(_) => bail!("the folder {shown} is not empty: what is in it would be hidden"),
    }
}

/// What a failed mount means to people.
fn explain(error: io::Error, mountpoint: &Path) -> Error {
    let shown = mountpoint.display();
    let hint = match error.kind() {
        // Without the right to mount, the program of that name is asked to do it.
        ErrorKind::NotFound => {
            format!("cannot mount at {shown}: that needs root, or the program `fusermount3` (package fuse3)")
        }
        ErrorKind::PermissionDenied => format!("no permission to mount at {shown}"),
        _ => format!("cannot mount at {shown}"),
    };
    Error::from(error).context(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hinders_a_mount_is_said() {
        let said = |result: Result<()>| format!("{:#}", result.unwrap_err());
        let folder = tempfile::tempdir().unwrap();
        assert!(said(check_device(&folder.path().join("fuse"))).contains("module `fuse`"));
        assert!(said(check_mountpoint(&folder.path().join("x"))).contains("does not exist"));
        std::fs::write(folder.path().join("file"), "").unwrap();
        assert!(said(check_mountpoint(&folder.path().join("file"))).contains("not a folder"));
        assert!(said(check_mountpoint(folder.path())).contains("not empty"));
        let missing = explain(io::Error::from(ErrorKind::NotFound), folder.path());
        assert!(format!("{missing:#}").contains("fusermount3"));
    }
}
