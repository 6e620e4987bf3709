//! Walks a tree in manifest order, by open directories: nobody can lead it elsewhere by exchanging a directory for a link.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};

use crate::glob::Glob;

/// An entry that a walk found.
#[derive(Debug)]
pub(crate) struct Found {
    /// Path from the root; empty for the root.
    pub(crate) path: Vec<u8>,
    /// The open directory that holds it; for the root the root itself.
    pub(crate) directory: Arc<OwnedFd>,
    /// Its name in the directory; `.` for the root.
    pub(crate) name: CString,
    pub(crate) stat: Stat,
}

/// What a walk yields.
#[derive(Debug)]
pub(crate) enum Step {
    Found(Box<Found>),
    /// An entry that cannot be looked at.
    Failed {
        path: Vec<u8>,
        error: io::Error,
    },
}

/// What a walk leaves out.
#[derive(Debug, Clone, Default)]
pub(crate) struct WalkOptions {
    pub(crate) excludes: Vec<Glob>,
    pub(crate) one_file_system: bool,
}

/// A directory in the middle of being walked.
struct Open {
    directory: Arc<OwnedFd>,
    path: Vec<u8>,
    /// Names that are still to come, last first.
    names: Vec<CString>,
}

/// The walk; blocking.
pub(crate) struct Walk {
    options: WalkOptions,
    stack: Vec<Open>,
    root: Option<Box<Found>>,
    device: u64,
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Walk {
    /// Opens the root, which must be a directory; the last part of its path may be a link.
    pub(crate) fn new(root: &Path, options: WalkOptions) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = Arc::new(rustix::fs::open(root, flags, Mode::empty())?);
        let stat = rustix::fs::fstat(&directory)?;
        let found = Found { path: Vec::new(), directory: Arc::clone(&directory), name: c".".to_owned(), stat };
        let names = read_names(&directory)?;
        Ok(Self {
            options,
            stack: vec![Open { directory, path: Vec::new(), names }],
            root: Some(Box::new(found)),
            device: stat.st_dev,
        })
    }

    fn look(&mut self, directory: Arc<OwnedFd>, path: Vec<u8>, name: CString) -> Step {
        let stat = match rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(error) => return Step::Failed { path, error: error.into() },
        };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && self.enters(&stat) {
            match open_directory(&directory, &name) {
                Ok((opened, names)) => self.stack.push(Open { directory: Arc::new(opened), path: path.clone(), names }),
                // The directory itself is known; what is in it is not.
                Err(error) => return Step::Failed { path, error },
            }
        }
        Step::Found(Box::new(Found { path, directory, name, stat }))
    }

    fn enters(&self, stat: &Stat) -> bool {
        !self.options.one_file_system || stat.st_dev == self.device
    }
}

fn open_directory(parent: &OwnedFd, name: &CString) -> io::Result<(OwnedFd, Vec<CString>)> {
    let opened = rustix::fs::openat(parent, name, DIRECTORY, Mode::empty())?;
    let names = read_names(&opened)?;
    Ok((opened, names))
}

/// The names in a directory, last first.
fn read_names(directory: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory.as_fd())? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable_by(|left, right| right.cmp(left));
    Ok(names)
}

impl Iterator for Walk {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        if let Some(root) = self.root.take() {
            return Some(Step::Found(root));
        }
        loop {
            let open = self.stack.last_mut()?;
            let Some(name) = open.names.pop() else {
                self.stack.pop();
                continue;
            };
            let mut path = open.path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.as_bytes());
            if self.options.excludes.iter().any(|glob| glob.matches(&path)) {
                continue;
            }
            let directory = Arc::clone(&open.directory);
            return Some(self.look(directory, path, name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::compare_paths;

    fn paths(root: &Path, options: WalkOptions) -> Vec<String> {
        let walk = Walk::new(root, options).unwrap();
        walk.map(|step| match step {
            Step::Found(found) => String::from_utf8(found.path).unwrap(),
            Step::Failed { path, error } => panic!("{path:?}: {error}"),
        })
        .collect()
    }

    #[test]
    fn a_tree_is_walked_in_manifest_order_without_what_is_excluded() {
        let root = tempfile::tempdir().unwrap();
        for name in ["a/b/c", "a-b", "a/b-c", "b.tmp", "cache/x"] {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, name).unwrap();
        }
        std::os::unix::fs::symlink("/etc", root.path().join("link")).unwrap();
        let found = paths(root.path(), WalkOptions::default());
        assert_eq!(found, ["", "a", "a/b", "a/b/c", "a/b-c", "a-b", "b.tmp", "cache", "cache/x", "link"]);
        assert!(found.is_sorted_by(|l, r| compare_paths(l.as_bytes(), r.as_bytes()).is_lt()));
        let excludes = vec![Glob::exclude("*.tmp"), Glob::exclude("/cache")];
        assert_eq!(paths(root.path(), WalkOptions { excludes, ..WalkOptions::default() }).len(), 7);
    }
}
