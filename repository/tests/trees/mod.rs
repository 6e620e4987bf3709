//! Trees with everything that a file system can hold, and a full description of a tree to compare.

#![allow(clippy::unwrap_used, unreachable_pub, reason = "only tests use this; a failure here is theirs")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::Path;
use std::sync::Arc;

use lifeboat_repository::keys::Secret;
use lifeboat_repository::repository::{InitOptions, OpenOptions, Repository};
use lifeboat_repository::store::memory::Memory;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags, lgetxattr, llistxattr, lsetxattr, makedev,
    mkdirat, mknodat, openat, utimensat,
};

pub fn secret() -> Secret {
    Secret::key_file([7; 32])
}

#[allow(dead_code, reason = "a test of the program makes its own")]
pub async fn made() -> (Memory, Repository) {
    made_with(InitOptions::default()).await
}

#[allow(dead_code, reason = "a test of the program makes its own")]
pub async fn made_with(options: InitOptions) -> (Memory, Repository) {
    let store = Memory::new();
    let repository = Repository::init(Arc::new(store.clone()), &secret(), options).await.unwrap();
    (store, repository)
}

#[allow(dead_code, reason = "not every test opens a repository twice")]
pub async fn open(store: &Memory) -> Repository {
    Repository::open(Arc::new(store.clone()), &secret(), OpenOptions::default()).await.unwrap()
}

pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Writes a file and the directories above it.
pub fn write(root: &Path, path: &str, bytes: &[u8]) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Makes a chain of directories of this name, deeper than a path can be; returns its path.
#[allow(dead_code, reason = "not every test needs deep trees")]
pub fn path_to(root: &Path, name: &str, depth: usize) -> Vec<u8> {
    let mut at = openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    for _ in 0..depth {
        mkdirat(&at, name, Mode::RWXU).unwrap();
        at = openat(&at, name, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    }
    vec![name; depth].join("/").into_bytes()
}

fn set(path: &Path, name: &str, value: &[u8]) {
    lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permissions.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

/// A tree with an entry of every kind. Needs the super-user.
#[allow(dead_code, reason = "not every test needs all kinds")]
pub fn full_tree(root: &Path) {
    write(root, "large", &noise(1, 5 << 20));
    write(root, "docs/changed", b"first content");
    write(root, "docs/empty", b"");
    write(root, "docs/deep/er/file", &noise(2, 70_000));
    for number in 0..40u64 {
        write(root, &format!("small/{number}"), &noise(number, 100 * usize::try_from(number).unwrap()));
    }
    let mut sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.write_all(&noise(3, 100_000)).unwrap();
    sparse.seek(SeekFrom::Start(10 << 20)).unwrap();
    sparse.write_all(&noise(4, 300_000)).unwrap();
    sparse.seek(SeekFrom::Start((10 << 20) + 308_192)).unwrap();
    sparse.write_all(b"after a short hole").unwrap();
    sparse.set_len(64 << 20).unwrap();
    fs::File::create(root.join("only-hole")).unwrap().set_len(1 << 20).unwrap();
    write(root, "hard/first", &noise(5, 1000));
    fs::hard_link(root.join("hard/first"), root.join("hard/second")).unwrap();
    fs::hard_link(root.join("hard/first"), root.join("hard/third")).unwrap();
    symlink("docs/empty", root.join("symlink")).unwrap();
    symlink("/nowhere/at all", root.join("dangling")).unwrap();
    lchown(root.join("dangling"), Some(77), Some(78)).unwrap();
    let node = |name: &str, kind, major, minor| {
        mknodat(CWD, root.join(name), kind, Mode::from_raw_mode(0o640), makedev(major, minor)).unwrap();
    };
    node("fifo", FileType::Fifo, 0, 0);
    node("socket", FileType::Socket, 0, 0);
    node("null", FileType::CharacterDevice, 1, 3);
    node("disk", FileType::BlockDevice, 259, 70_000);
    fs::write(root.join(OsStr::from_bytes(b"not \xff utf-8 \n")), b"strange").unwrap();
    fs::create_dir(root.join(OsStr::from_bytes(b"\x80dir"))).unwrap();
    fs::write(root.join("n".repeat(255)), b"long name").unwrap();
    write(root, &vec!["deep"; 120].join("/"), b"far down");
    write(root, "owned", b"of someone");
    lchown(root.join("owned"), Some(4_000_000_000), Some(1001)).unwrap();
    fs::set_permissions(root.join("owned"), fs::Permissions::from_mode(0o6751)).unwrap();
    set(&root.join("owned"), "user.comment", b"kept \0 bytes");
    set(&root.join("owned"), "user.empty", b"");
    set(&root.join("small"), "trusted.note", &noise(6, 2000));
    set(&root.join("dangling"), "trusted.of-link", b"link");
    set(
        &root.join("docs/empty"),
        "system.posix_acl_access",
        &acl(&[(1, 6, !0), (2, 4, 1234), (4, 4, !0), (16, 4, !0), (32, 0, !0)]),
    );
    set(
        &root.join("docs"),
        "system.posix_acl_default",
        &acl(&[(1, 7, !0), (2, 7, 1234), (4, 5, !0), (16, 7, !0), (32, 5, !0)]),
    );
    // cap_net_bind_service+ep, version 2.
    write(root, "able", b"#!");
    set(&root.join("able"), "security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    fs::set_permissions(root.join("docs/deep/er"), fs::Permissions::from_mode(0o1500)).unwrap();
    fs::set_permissions(root, fs::Permissions::from_mode(0o751)).unwrap();
    for (path, seconds, nanoseconds) in [
        ("large", 1, 999_999_999),
        ("docs", -5, 1),
        ("fifo", 5_000_000_000, 123_456_789),
        ("dangling", 77, 7),
        ("", 1_600_000_000, 42),
    ] {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 1, tv_nsec: 0 },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds },
        };
        utimensat(CWD, root.join(path), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// All that is to be the same after a restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, i64),
    pub device: u64,
    pub len: u64,
    pub content: Option<blake3::Hash>,
    pub link: Option<Vec<u8>>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// The first path of the same file.
    pub same_as: Option<Vec<u8>>,
}

/// Everything about a tree, by path.
#[allow(dead_code, reason = "not every test compares trees")]
pub fn describe(root: &Path) -> BTreeMap<Vec<u8>, Described> {
    let mut described = BTreeMap::new();
    let mut first = HashMap::new();
    describe_in(root, b"", &mut described, &mut first);
    described
}

fn describe_in(
    root: &Path,
    path: &[u8],
    described: &mut BTreeMap<Vec<u8>, Described>,
    first: &mut HashMap<u64, Vec<u8>>,
) {
    let full = root.join(OsStr::from_bytes(path));
    let found = fs::symlink_metadata(&full).unwrap();
    let kind = found.file_type();
    let same_as = if kind.is_file() && found.nlink() > 1 {
        let known = first.get(&found.ino()).cloned();
        first.entry(found.ino()).or_insert_with(|| path.to_vec());
        known
    } else {
        None
    };
    let entry = Described {
        mode: found.mode(),
        owner: (found.uid(), found.gid()),
        mtime: (found.mtime(), found.mtime_nsec()),
        device: found.rdev(),
        len: if kind.is_dir() { 0 } else { found.len() },
        content: kind.is_file().then(|| blake3::hash(&fs::read(&full).unwrap())),
        link: kind.is_symlink().then(|| fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec()),
        xattrs: xattrs(&full),
        same_as,
    };
    described.insert(path.to_vec(), entry);
    if kind.is_dir() {
        let mut names: Vec<_> = fs::read_dir(&full).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        for name in names {
            let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
            describe_in(root, &[path, separator, name.as_bytes()].concat(), described, first);
        }
    }
}

fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut list = vec![0; 65536];
    let len = llistxattr(path, &mut list[..]).unwrap();
    let mut names: Vec<_> = list[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    names
        .into_iter()
        .map(|name| {
            let mut value = vec![0; 65536];
            let len = lgetxattr(path, name, &mut value[..]).unwrap();
            (name.to_vec(), value[..len].to_vec())
        })
        .collect()
}
