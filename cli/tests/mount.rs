//! Snapshots as a file system: real mounts. They need root and `/dev/fuse`.
#![allow(clippy::unwrap_used, clippy::panic)]

// Trees with everything that a file system can hold, and their full description: the same that restores are compared with.
#[path = "../../repository/tests/trees/mod.rs"]
mod trees;

mod machine;

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use machine::Machine;
use rustix::fs::{SeekFrom, seek};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use trees::noise;

/// How long anything that happens by itself may take.
const PATIENCE: Duration = Duration::from_mins(1);
/// What the program may need.
const MAX_MEMORY_KIB: u64 = 128 << 10;

impl Machine {
    /// With a repository and a folder to mount it at.
    fn that_mounts() -> Self {
        assert!(
            Path::new("/dev/fuse").exists() && rustix::process::getuid().is_root(),
            "these tests mount file systems: they need root and /dev/fuse (module `fuse`)"
        );
        let machine = Self::by_key_file();
        fs::create_dir(machine.path("mnt")).unwrap();
        machine.prints(&["init"]);
        machine
    }

    /// The id of a new snapshot.
    fn back_up(&self, folder: &str, more: &[&str]) -> String {
        let folder = self.text(folder);
        let arguments = [&["--json", "backup", &folder][..], more].concat();
        let said: Value = serde_json::from_str(&self.prints(&arguments)).unwrap();
        said["id"].as_str().unwrap().to_owned()
    }

    fn mount(&self, more: &[&str]) -> Mount {
        let mountpoint = self.path("mnt");
        let arguments = [&["mount", mountpoint.to_str().unwrap()][..], more].concat();
        let mut command = self.command(&arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
        let mount = Mount { child: Some(child), path: mountpoint };
        assert!(is_mounted(&mount.path), "{said} {}", mount.end(Signal::TERM, 0));
        mount
    }
}

/// A running `lifeboat mount`.
struct Mount {
    child: Option<Child>,
    path: PathBuf,
}

impl Mount {
    /// Ends it by a signal; what it said on the standard error.
    fn end(mut self, signal: Signal, code: i32) -> String {
        let child = self.child.take().unwrap();
        kill_process(Pid::from_child(&child), signal).unwrap();
        ended(child, &self.path, code)
    }

    /// Unmounts it as another would.
    fn unmount(mut self, code: i32) -> String {
        assert!(Command::new("umount").arg(&self.path).status().unwrap().success());
        ended(self.child.take().unwrap(), &self.path, code)
    }

    fn join(&self, path: &str) -> PathBuf {
        self.path.join(path)
    }

    /// The most memory that it had so far.
    fn peak_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.as_ref().unwrap().id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Mount {
    /// After a failed test: nothing stays behind.
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = Command::new("umount").arg("-l").arg(&self.path).status();
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn ended(child: Child, mountpoint: &Path, code: i32) -> String {
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(!is_mounted(mountpoint), "it unmounts itself");
    assert_eq!(fs::read_dir(mountpoint).unwrap().count(), 0);
    assert!(!said.contains("panicked"), "{said}");
    said
}

fn is_mounted(path: &Path) -> bool {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == path.to_str())
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        sleep(Duration::from_millis(200));
    }
}

/// Reads parts of both files at the same places, across all kinds of boundaries.
fn assert_same_parts(one: &Path, other: &Path, seed: u64) {
    let (one, other) = (fs::File::open(one).unwrap(), fs::File::open(other).unwrap());
    let size = one.metadata().unwrap().len();
    let numbers = noise(seed, 16 * 60);
    for bytes in numbers.chunks_exact(16) {
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let (offset, len) = (number(0) % (size + 10), usize::try_from(number(8) % 300_000).unwrap());
        let read = |file: &fs::File| {
            let mut part = vec![1; len];
            let mut filled = 0;
            loop {
                match file.read_at(&mut part[filled..], offset + filled as u64).unwrap() {
                    0 => break,
                    count => filled += count,
                }
            }
            part.truncate(filled);
            part
        };
        assert!(read(&one) == read(&other), "{len} bytes at {offset} of {size}");
    }
}

#[test]
fn a_mounted_snapshot_is_what_was_backed_up_to_the_last_attribute() {
    let machine = Machine::that_mounts();
    trees::full_tree(&machine.path("source"));
    for number in 0..700 {
        trees::write(&machine.path("source"), &format!("many/{number}/in"), b"x");
    }
    machine.back_up("source", &[]);
    let mount = machine.mount(&["--snapshot", "latest"]);
    let (expected, found) = (trees::describe(&machine.path("source")), trees::describe(&mount.path));
    for (path, entry) in &expected {
        assert_eq!(Some(entry), found.get(path), "{}", String::from_utf8_lossy(path));
    }
    assert_eq!(expected.len(), found.len(), "nothing more than there was");

    for name in ["large", "sparse", "only-hole", "docs/deep/er/file"] {
        assert_same_parts(&machine.path("source").join(name), &mount.join(name), 7);
    }
    let inode = |name: &str| fs::metadata(mount.join(name)).unwrap().ino();
    assert_eq!(inode("hard/first"), inode("hard/third"));
    assert_ne!(inode("hard/first"), inode("large"));
    // Holes are holes.
    let sparse = fs::metadata(mount.join("sparse")).unwrap();
    assert!(sparse.blocks() * 512 < sparse.len() / 10, "{}", sparse.blocks());
    let (original, shown) =
        (fs::File::open(machine.path("source/sparse")).unwrap(), fs::File::open(mount.join("sparse")).unwrap());
    let data = seek(&shown, SeekFrom::Data(200_000)).unwrap();
    assert_eq!(data, seek(&original, SeekFrom::Data(200_000)).unwrap());
    assert!(seek(&shown, SeekFrom::Hole(0)).unwrap() <= 200_000);
    assert!(seek(&shown, SeekFrom::Data(20 << 20)).is_err(), "no data from there on");
    assert!(fs::symlink_metadata(mount.join("socket")).unwrap().file_type().is_socket());
    assert!(fs::File::open(mount.join("null")).is_err(), "devices are shown, not opened");
    drop((original, shown));

    // Nothing can be changed.
    for error in [
        fs::write(mount.join("large"), "x").unwrap_err(),
        fs::create_dir(mount.join("new")).unwrap_err(),
        fs::remove_file(mount.join("owned")).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
    }
    assert_eq!(fs::metadata(mount.join("nothing")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(mount.end(Signal::INT, 0), "");
}

#[test]
fn snapshots_are_found_by_time_id_lineage_and_label_and_new_ones_appear() {
    let machine = Machine::that_mounts();
    let source = machine.path("source");
    trees::write(&source, "a", b"one");
    let first = machine.back_up("source", &["--lineage", "home/me", "--tag", "kind=first"]);
    let mount = machine.mount(&[]);
    assert_eq!(names(&mount.path), ["ids", "lineages", "snapshots", "tags"]);
    assert_eq!(fs::read(mount.join(&format!("ids/{first}/a"))).unwrap(), b"one");
    assert_eq!(fs::read(mount.join("snapshots/latest/a")).unwrap(), b"one");
    assert_eq!(names(&mount.join("lineages")), ["home%2Fme"]);
    assert_eq!(names(&mount.join("tags")), ["kind=first"]);

    trees::write(&source, "a", b"two");
    sleep(Duration::from_secs(1));
    let second = machine.back_up("source", &["--lineage", "home/me", "--tag", "kind=second"]);
    until("the new snapshot appears", || names(&mount.join("ids")).contains(&second));
    assert_eq!(names(&mount.join("snapshots")).len(), 3, "two and the link to the latest");
    assert_eq!(fs::read(mount.join("lineages/home%2Fme/latest/a")).unwrap(), b"two");
    assert_eq!(fs::read(mount.join("tags/kind=first/latest/a")).unwrap(), b"one");
    assert_eq!(fs::read(mount.join("tags/kind=second/latest/a")).unwrap(), b"two");
    machine.prints(&["forget", &second]);
    until("a forgotten snapshot goes", || !names(&mount.join("ids")).contains(&second));
    assert_eq!(fs::read(mount.join("snapshots/latest/a")).unwrap(), b"one");
    assert_eq!(mount.unmount(0), "");

    machine.back_up("source", &["--lineage", "other"]);
    let mount = machine.mount(&["--tag", "kind=first", "--quiet", "--json"]);
    assert_eq!(names(&mount.join("ids")), [first]);
    mount.end(Signal::TERM, 0);
    let mount = machine.mount(&["--lineage", "other"]);
    assert_eq!(names(&mount.join("lineages")), ["other"]);
    mount.end(Signal::HUP, 0);
}

#[test]
fn damage_costs_the_files_that_need_it_and_is_named() {
    let machine = Machine::that_mounts();
    let source = machine.path("source");
    trees::write(&source, "lost", &noise(1, 3 << 20));
    machine.back_up("source", &[]);
    let packs: Vec<_> = files_in(&machine.path("repository/p"));
    trees::write(&source, "whole", &noise(2, 3 << 20));
    machine.back_up("source", &[]);
    let largest = packs.iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let mut bytes = fs::read(largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(largest, bytes).unwrap();

    let mount = machine.mount(&["--snapshot", "latest"]);
    let mut part = Vec::new();
    let error = fs::File::open(mount.join("lost")).unwrap().read_to_end(&mut part).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    assert!(part[..] == noise(1, 3 << 20)[..part.len()], "what comes before the damage is right");
    assert!(fs::read(mount.join("whole")).unwrap() == noise(2, 3 << 20));
    assert_eq!(fs::metadata(mount.join("lost")).unwrap().len(), 3 << 20);
    let said = mount.end(Signal::TERM, 3);
    assert!(said.contains(":/lost") && said.contains("damaged in pack"), "{said}");
    assert!(!said.contains("whole") && said.contains("1 failures"), "each is told once: {said}");
}

#[test]
fn what_is_mounted_does_not_expire_meanwhile() {
    let machine = Machine::that_mounts();
    let source = machine.path("source");
    trees::write(&source, "first", &noise(1, 2 << 20));
    trees::write(&source, "second", &noise(2, 2 << 20));
    let old = machine.back_up("source", &[]);
    fs::remove_file(source.join("first")).unwrap();
    fs::remove_file(source.join("second")).unwrap();
    trees::write(&source, "third", b"3");
    machine.back_up("source", &[]);
    let mount = machine.mount(&[]);
    let folder = mount.join("ids").join(&old);
    let references = || files_in(&machine.path("repository/r")).len();
    assert!(fs::metadata(&folder).unwrap().is_dir());
    assert_eq!(references(), 2, "a look from outside pins nothing");
    assert!(fs::read(folder.join("first")).unwrap() == noise(1, 2 << 20));
    assert_eq!(references(), 3, "what is entered is pinned");
    let opened = fs::File::open(folder.join("second")).unwrap();
    machine.prints(&["forget", &old]);
    let expire = || -> Value { serde_json::from_str(&machine.prints(&["expire", "--json"])).unwrap() };
    assert_eq!(expire()["packsDeleted"], 0);
    let mut second = Vec::new();
    (&opened).read_to_end(&mut second).unwrap();
    assert!(second == noise(2, 2 << 20));
    drop(opened);
    assert_eq!(mount.end(Signal::TERM, 0), "");
    assert!(expire()["packsDeleted"].as_u64().unwrap() > 0, "the mount lets go when it ends");
}

#[test]
fn images_and_files_of_changed_pages_are_shown_whole() {
    let machine = Machine::that_mounts();
    let disk = machine.path("disk");
    let mut bytes = vec![0; 24 << 20];
    bytes[3 << 20..][..5_000_000].copy_from_slice(&noise(1, 5_000_000));
    fs::write(&disk, &bytes).unwrap();
    machine.back_up("disk", &["--image"]);
    for round in 0..3usize {
        bytes[(3 << 20) + round * 1_000_003..][..100].fill(9);
        fs::write(&disk, &bytes).unwrap();
        machine.back_up("disk", &["--image"]);
    }
    let mount = machine.mount(&["--snapshot", "latest"]);
    let image = mount.join("volume.img");
    assert!(fs::read(&image).unwrap() == bytes);
    assert_same_parts(&disk, &image, 3);
    let shown = fs::metadata(&image).unwrap();
    assert!(shown.is_file() && shown.blocks() * 512 < 8 << 20, "{}", shown.blocks());
    mount.end(Signal::TERM, 0);

    let source = machine.path("source");
    let mut table = noise(5, 12 << 20);
    trees::write(&source, "table", &table);
    machine.back_up("source", &[]);
    for round in 0..4usize {
        for page in 0..20 {
            let at = (page * 61 + round * 7) * 8192;
            table[at..at + 8192].copy_from_slice(&noise((page * 10 + round) as u64, 8192));
        }
        trees::write(&source, "table", &table);
        machine.back_up("source", &[]);
    }
    let mount = machine.mount(&["--snapshot", "latest"]);
    assert!(fs::read(mount.join("table")).unwrap() == table);
    assert_same_parts(&source.join("table"), &mount.join("table"), 4);
    mount.end(Signal::TERM, 0);
}

#[test]
fn memory_stays_bounded_while_much_is_read_at_once() {
    let machine = Machine::that_mounts();
    let source = machine.path("source");
    for number in 0..4 {
        trees::write(&source, &format!("large/{number}"), &noise(number, 32 << 20));
    }
    for number in 0..3_000 {
        trees::write(&source, &format!("small/{}/{number}", number % 50), &noise(number, 500));
    }
    machine.back_up("source", &[]);
    let mount = machine.mount(&["--snapshot", "latest"]);
    let (source, shown) = (&source, &mount.path);
    std::thread::scope(|scope| {
        for number in 0..4 {
            scope.spawn(move || {
                let name = format!("large/{number}");
                assert_same_parts(&source.join(&name), &shown.join(&name), number);
                assert!(fs::read(shown.join(&name)).unwrap() == noise(number, 32 << 20));
            });
        }
        scope.spawn(move || {
            for number in 0..3_000u64 {
                assert!(fs::read(shown.join(format!("small/{}/{number}", number % 50))).unwrap() == noise(number, 500));
            }
        });
    });
    let peak = mount.peak_kib();
    assert!(peak < MAX_MEMORY_KIB, "{peak} KiB");
    println!("the peak of memory was {} MiB", peak >> 10);
    mount.end(Signal::TERM, 0);
}

#[test]
fn what_hinders_a_mount_is_said_and_one_in_use_ends_nevertheless() {
    let machine = Machine::that_mounts();
    trees::write(&machine.path("source"), "a", b"one");
    machine.back_up("source", &[]);
    let fails = |arguments: &[&str], code: i32| {
        let output = machine.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        said
    };
    assert!(fails(&["mount", &machine.text("missing")], 1).contains("does not exist"));
    assert!(fails(&["mount", &machine.text("source")], 1).contains("not empty"));
    assert!(fails(&["mount", &machine.text("key-file")], 1).contains("not a folder"));
    assert!(fails(&["mount", &machine.text("mnt"), "--snapshot", "ffffffff"], 1).contains("no snapshot"));
    assert!(fails(&["mount", &machine.text("mnt"), "--snapshot", "latest", "--tag", "a=b"], 2).contains("--tag"));
    let writer = machine.path("writer");
    fs::write(&writer, [6; 32]).unwrap();
    machine.prints(&["keys", "add", "--new-key-file", writer.to_str().unwrap(), "--writer"]);
    let refused = machine.command(&["mount", &machine.text("mnt")]).env("LIFEBOAT_KEY_FILE", &writer).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("can write but not read"), "{refused:?}");
    assert!(!is_mounted(&machine.path("mnt")));

    let mount = machine.mount(&["--snapshot", "latest", "--allow-other"]);
    let opened = fs::File::open(mount.join("a")).unwrap();
    assert!(mount.end(Signal::TERM, 0).contains("in use"));
    drop(opened);
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_in(&path) } else { vec![path] }).collect()
}
