//! Backs up and restores raw block devices, and chooses what need not be read of them.
//!
//! The ladder: what changed since the very snapshot that the parent shows; what is allocated; everything. Each step down says
//! why. Whatever the list, some of what it leaves out is read as well, and every few backups all of it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use lifeboat_crds::backup::{BlockRead, ReadBy};
use lifeboat_crds::conditions::Reason;
use lifeboat_crds::volume_task::{BackupOperation, ImageSource};
use lifeboat_repository::backup::TreeBackup;
use lifeboat_repository::backup::image::{self, Audit, ImageReport, Known};
use lifeboat_repository::progress::Progress;
use lifeboat_repository::repository::Repository;
use lifeboat_repository::session::Session;
use lifeboat_repository::snapshot::Snapshot;
use tracing::info;

use crate::lists::Lister;
use crate::outcome::Failure;

/// Between audits about one in so many parts of 256 KiB is read although the list leaves it out.
const SAMPLE_ONE_IN: u64 = 2048;

/// Why nothing is known of a device before it is read, of which no snapshot was made.
const LIVE: &str = "it is read while its pod has it, and storages list blocks of snapshots only";

/// Tags of the snapshots of block devices: which state of which volume they show.
mod tags {
    pub(super) const DRIVER: &str = "csi-driver";
    pub(super) const VOLUME: &str = "csi-volume";
    pub(super) const SNAPSHOT: &str = "csi-snapshot";
    /// How many backups in a row were made by lists, without an audit.
    pub(super) const UNAUDITED: &str = "backups-since-audit";
}

/// What is known before a device is read.
struct Chosen {
    known: Known,
    audit: Audit,
    /// For the status.
    read: BlockRead,
    unaudited: u32,
}

impl Chosen {
    fn nothing(read: BlockRead) -> Self {
        Self { known: Known::Nothing, audit: Audit::Off, read, unaudited: 0 }
    }
}

/// The handle of the snapshot that the parent shows, if the parent is an earlier state of this very volume.
fn base<'a>(parent: Option<&'a Snapshot>, source: &ImageSource, size: u64) -> Result<&'a str, String> {
    let parent = parent.ok_or("it is the first backup of the volume")?;
    let tag = |name: &str| parent.tags.get(name).map(String::as_str);
    let Some(handle) = tag(tags::SNAPSHOT) else {
        return Err("it is not known which snapshot the backup before shows".to_owned());
    };
    if tag(tags::DRIVER) != Some(&source.driver) || tag(tags::VOLUME) != Some(&source.volume_handle) {
        return Err("the backup before is of another volume".to_owned());
    }
    if parent.counts.bytes != size {
        return Err(format!("the volume had {} bytes at the backup before and has {size} now", parent.counts.bytes));
    }
    Ok(handle)
}

/// How many backups there were since everything was read, and whether it is this one's turn.
fn audit(parent: Option<&Snapshot>, every: u32, seed: u64) -> (Audit, u32) {
    let before = parent.and_then(|parent| parent.tags.get(tags::UNAUDITED)?.parse::<u32>().ok()).unwrap_or(0);
    let now = before.saturating_add(1);
    if now >= every { (Audit::All, 0) } else { (Audit::Sample { one_in: SAMPLE_ONE_IN, seed }, now) }
}

async fn choose(lister: &Lister, source: &ImageSource, parent: Option<&Snapshot>, size: u64, seed: u64) -> Chosen {
    let mut reasons: Vec<String> = source.no_lists.iter().cloned().collect();
    let mut found = None;
    if let Some(lists) = &source.lists {
        match base(parent, source, size) {
            Ok(base) => match lister.delta(lists, base, size).await {
                Ok(list) => found = Some((ReadBy::Delta, list)),
                Err(error) => reasons.push(format!("no list of what changed: {error}")),
            },
            Err(reason) => reasons.push(reason),
        }
        if found.is_none() {
            match lister.allocated(lists, size).await {
                Ok(list) => found = Some((ReadBy::Allocated, list)),
                Err(error) => reasons.push(format!("no list of what is allocated: {error}")),
            }
        }
    }
    let reason = |reasons: Vec<String>| (!reasons.is_empty()).then(|| reasons.join("; "));
    let Some((by, list)) = found else {
        let read = BlockRead { reason: reason(reasons), ..BlockRead::default() };
        return Chosen::nothing(read);
    };
    let (audit, unaudited) = audit(parent, source.audit_every, seed);
    let listed_bytes = Some(list.bytes());
    let known = if by == ReadBy::Delta { Known::Changed(list) } else { Known::Allocated(list) };
    let by = if audit == Audit::All {
        let every = source.audit_every;
        reasons.push(format!("an audit, as at least one in {every} backups: all is read and compared with the list"));
        ReadBy::Full
    } else {
        by
    };
    let read = BlockRead { by, reason: reason(reasons), listed_bytes, ..BlockRead::default() };
    Chosen { known, audit, read, unaudited }
}

/// What became of it, for the status.
fn told(mut read: BlockRead, report: &ImageReport) -> BlockRead {
    read.audited_bytes = report.audited;
    if report.by == image::ReadBy::Everything {
        read.by = ReadBy::Full;
    }
    let mut add = |more: &str| {
        let before = read.reason.take().map(|before| format!("{before}; ")).unwrap_or_default();
        read.reason = Some(format!("{before}{more}"));
    };
    if report.parent_is_unusable {
        add("what the backup before has of the volume cannot be taken over");
    }
    if let Some(lie) = report.lie {
        add("the storage's list of blocks is wrong");
        read.wrong_list = Some(format!("it leaves out what is at byte {}", lie.offset));
    }
    read
}

/// Backs up the device in this session, which is decided in any case.
pub(crate) async fn back_up(
    lister: &Lister,
    repository: &Repository,
    session: Arc<Session>,
    device: OwnedFd,
    operation: &BackupOperation,
    mut plan: TreeBackup,
    progress: Arc<Progress>,
) -> Result<(ImageReport, BlockRead), Failure> {
    let size = image::size_of(&device)
        .map_err(|error| Failure::new(Reason::ReadFailed, format!("the size of the device is not known: {error}")));
    let size = match size {
        Ok(size) => size,
        Err(failure) => {
            session.abort(&failure.message).await.map_err(|error| Failure::of(&error, Reason::ReadFailed))?;
            return Err(failure);
        }
    };
    let chosen = match &operation.image {
        Some(source) => {
            let seed = u64::from_le_bytes(*session.id().0.first_chunk().unwrap_or(&[0; 8]));
            // A list may take long; who is told to stop does not wait for it.
            let chosen = tokio::select! {
                chosen = choose(lister, source, plan.parent.as_ref(), size, seed) => chosen,
                () = progress.cancelled() => Chosen::nothing(BlockRead::default()),
            };
            for (tag, value) in [
                (tags::DRIVER, source.driver.clone()),
                (tags::VOLUME, source.volume_handle.clone()),
                (tags::SNAPSHOT, source.snapshot_handle.clone()),
                (tags::UNAUDITED, chosen.unaudited.to_string()),
            ] {
                plan.tags.insert(tag.to_owned(), value);
            }
            chosen
        }
        None => Chosen::nothing(BlockRead { reason: Some(LIVE.to_owned()), ..BlockRead::default() }),
    };
    info!(by = ?chosen.read.by, reason = chosen.read.reason, listed = chosen.read.listed_bytes, size, "reading a block device");
    let Chosen { known, audit, read, .. } = chosen;
    let report = image::image_in(session, repository, device, (known, audit), plan, progress).await;
    let report = report.map_err(|error| Failure::of(&error, Reason::ReadFailed))?;
    let read = told(read, &report);
    Ok((report, read))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_repository::id::{SessionId, SnapshotId};
    use lifeboat_repository::snapshot::{Content, Counts, WriteStats};

    fn source() -> ImageSource {
        ImageSource {
            driver: "d".into(),
            volume_handle: "v".into(),
            snapshot_handle: "new".into(),
            audit_every: 3,
            lists: None,
            no_lists: Some("no service".into()),
        }
    }

    fn parent(tags: &[(&str, &str)]) -> Snapshot {
        Snapshot {
            id: SnapshotId::random(),
            session: SessionId::random(),
            time: jiff::Timestamp::UNIX_EPOCH,
            lineage: "l".into(),
            tags: tags.iter().map(|(tag, value)| ((*tag).to_owned(), (*value).to_owned())).collect(),
            host: String::new(),
            parent: None,
            content: Content::Tree { root: vec![], skipped: vec![] },
            counts: Counts { bytes: 100, ..Counts::default() },
            stats: WriteStats::default(),
        }
    }

    #[test]
    fn a_delta_is_bound_to_the_very_snapshot_that_the_parent_shows() {
        let all = [(tags::DRIVER, "d"), (tags::VOLUME, "v"), (tags::SNAPSHOT, "old")];
        assert_eq!(base(Some(&parent(&all)), &source(), 100), Ok("old"));
        assert!(base(None, &source(), 100).unwrap_err().contains("first backup"));
        assert!(base(Some(&parent(&all[..2])), &source(), 100).unwrap_err().contains("not known"));
        assert!(base(Some(&parent(&all)), &source(), 200).unwrap_err().contains("100 bytes"));
        for (number, other) in [(0, "e"), (1, "w")] {
            let mut tags = all;
            tags[number].1 = other;
            assert!(base(Some(&parent(&tags)), &source(), 100).unwrap_err().contains("another volume"));
        }
    }

    #[test]
    fn every_few_backups_everything_is_audited() {
        let after = |count: &str| audit(Some(&parent(&[(tags::UNAUDITED, count)])), 3, 7);
        assert!(matches!(after("0"), (Audit::Sample { .. }, 1)));
        assert!(matches!(after("1"), (Audit::Sample { .. }, 2)));
        assert_eq!(after("2"), (Audit::All, 0));
        assert_eq!(after("4294967295"), (Audit::All, 0));
        assert_eq!(audit(None, 1, 7), (Audit::All, 0));
        assert!(matches!(after("nonsense"), (Audit::Sample { .. }, 1)));
    }

    #[test]
    fn what_was_found_is_told() {
        let report = |by, lie, parent_is_unusable| ImageReport {
            snapshot: parent(&[]),
            by,
            parent_is_unusable,
            audited: 5,
            lie,
        };
        let delta = BlockRead { by: ReadBy::Delta, ..BlockRead::default() };
        let fine = told(delta.clone(), &report(image::ReadBy::Changed, None, false));
        assert_eq!((fine.by, fine.reason, fine.audited_bytes), (ReadBy::Delta, None, 5));
        let lie = Some(image::Lie { offset: 4096 });
        let wrong = told(delta.clone(), &report(image::ReadBy::Everything, lie, false));
        assert_eq!(wrong.by, ReadBy::Full);
        assert_eq!(wrong.wrong_list.as_deref(), Some("it leaves out what is at byte 4096"));
        let lost = told(delta, &report(image::ReadBy::Everything, None, true));
        assert!(lost.reason.unwrap().contains("cannot be taken over"));
    }
}
