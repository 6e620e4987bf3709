//! What is to be thawed or ended, on the node's disk, written before anything is frozen or started.
//!
//! Whoever keeps a workload at rest holds a lock on its file. The kernel lets go of the lock when the process dies, so
//! another that gets it knows that nobody is left to thaw.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tracing::warn;

const ENDING: &str = "intent";

/// How to thaw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Thaw {
    /// A command in the container holds, and lets go when it is told.
    Held { container: String, token: String },
    /// A command in the container thaws.
    Command { container: String, command: Option<Vec<String>> },
    /// File systems are frozen.
    Volumes { paths: Vec<PathBuf> },
    /// A stream's command runs in the container: it is ended.
    Stream { container: String, process: String },
}

/// One workload that may be frozen, or one command that may run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Intent {
    /// The name of the lease, or of the command.
    pub(crate) lease: String,
    /// The end of the freeze or of the command, in hundredths of a second since boot.
    pub(crate) end: u64,
    pub(crate) thaw: Thaw,
}

/// The folder of intents on the node's disk.
#[derive(Debug, Clone)]
pub(crate) struct Intents(PathBuf);

/// An intent whose lock this process has.
#[derive(Debug)]
pub(crate) struct Locked {
    path: PathBuf,
    _lock: File,
}

/// An intent that was found.
#[derive(Debug)]
pub(crate) enum Found {
    /// Nobody keeps it: its guardian died.
    Orphan(Intent, Locked),
    /// Another process, or this one, keeps it.
    Kept(Intent),
}

impl Intents {
    pub(crate) fn in_folder(path: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    fn path(&self, lease: &str) -> PathBuf {
        self.0.join(format!("{lease}.{ENDING}"))
    }

    /// Writes an intent, on disk when this returns, and locked.
    pub(crate) fn write(&self, intent: &Intent) -> io::Result<Locked> {
        let path = self.path(&intent.lease);
        let unfinished = self.0.join(format!("{}.new", intent.lease));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&unfinished)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        file.write_all(&serde_json::to_vec(intent)?)?;
        file.sync_all()?;
        fs::rename(&unfinished, &path)?;
        File::open(&self.0)?.sync_all()?;
        Ok(Locked { path, _lock: file })
    }

    /// Whether there is an intent of this lease.
    pub(crate) fn has(&self, lease: &str) -> bool {
        self.path(lease).exists()
    }

    /// All intents. What cannot be read is set aside, so that it is told once.
    pub(crate) fn find(&self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let path = entry?.path();
            if path.extension().is_none_or(|ending| ending != ENDING) {
                continue;
            }
            match look(&path) {
                Ok(one) => found.push(one),
                // Its keeper removed it meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    warn!(path = %path.display(), %error, "an intent cannot be understood and is set aside");
                    fs::rename(&path, path.with_extension("damaged"))?;
                }
                Err(error) => warn!(path = %path.display(), %error, "an intent cannot be read"),
            }
        }
        Ok(found)
    }
}

fn look(path: &Path) -> io::Result<Found> {
    let mut file = File::open(path)?;
    let locked = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => true,
        Err(rustix::io::Errno::WOULDBLOCK) => false,
        Err(error) => return Err(error.into()),
    };
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    let intent: Intent =
        serde_json::from_slice(&text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    if !locked {
        return Ok(Found::Kept(intent));
    }
    // Its keeper may have removed it between the opening and the lock.
    fs::metadata(path)?;
    Ok(Found::Orphan(intent, Locked { path: path.to_owned(), _lock: file }))
}

impl Locked {
    /// Everything is thawed.
    pub(crate) fn remove(self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(path = %self.path.display(), %error, "an intent was not removed; its thaw will be repeated");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intent(lease: &str) -> Intent {
        Intent { lease: lease.into(), end: 100, thaw: Thaw::Volumes { paths: vec!["/x".into()] } }
    }

    #[test]
    fn an_intent_is_kept_while_its_keeper_lives_and_an_orphan_after() {
        let folder = tempfile::tempdir().unwrap();
        let intents = Intents::in_folder(folder.path().join("intents")).unwrap();
        let locked = intents.write(&intent("q-1")).unwrap();
        assert!(matches!(&intents.find().unwrap()[..], [Found::Kept(found)] if *found == intent("q-1")));
        drop(locked);
        // A process that another test starts just now holds the lock too, until it becomes its own program.
        let mut found = intents.find().unwrap();
        for _ in 0..100 {
            if matches!(&found[..], [Found::Orphan(..)]) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
            found = intents.find().unwrap();
        }
        assert!(matches!(&found[..], [Found::Orphan(found, _)] if *found == intent("q-1")));
        assert!(matches!(&intents.find().unwrap()[..], [Found::Kept(_)]), "one alone thaws an orphan");
        for one in found {
            let Found::Orphan(_, locked) = one else { continue };
            locked.remove();
        }
        assert!(intents.find().unwrap().is_empty() && !intents.has("q-1"));
    }

    #[test]
    fn bad_bytes_are_set_aside_and_half_written_files_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let intents = Intents::in_folder(folder.path().to_owned()).unwrap();
        fs::write(folder.path().join("a.intent"), b"\xff{").unwrap();
        fs::write(folder.path().join("b.new"), b"{}").unwrap();
        assert!(intents.find().unwrap().is_empty());
        assert!(folder.path().join("a.damaged").exists() && folder.path().join("b.new").exists());
    }
}
