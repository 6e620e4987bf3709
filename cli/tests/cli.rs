//! The program as people and scripts use it.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

struct Machine {
    folder: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lifeboat"));
        command.env_clear().env("PATH", "/usr/bin:/bin").env("LIFEBOAT_REPOSITORY", self.path("repository"));
        command.env("LIFEBOAT_PASSWORD", "correct horse").env("LIFEBOAT_CACHE_DIR", self.path("cache")).args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What it prints when it succeeds.
    fn prints(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.prints(arguments)).unwrap()
    }

    /// What it says when it fails with this code.
    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        says(&self.run(arguments), code)
    }
}

fn says(output: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

fn write(folder: &str, files: &[(&str, &str)]) {
    for (name, content) in files {
        let path = Path::new(folder).join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
}

#[test]
fn a_folder_is_backed_up_listed_restored_and_checked() {
    let machine = Machine::new();
    let source = machine.path("source");
    write(&source, &[("a", "one"), ("dir/b", "two")]);
    machine.prints(&["init"]);
    let first = machine.json(&["--json", "backup", &source, "--tag", "kind=first"]);
    assert!(first.is_object(), "{first}");
    write(&source, &[("dir/c", "three")]);
    machine.prints(&["backup", &source]);

    let snapshots = machine.json(&["snapshots", "--json"]);
    let snapshots = snapshots.as_array().unwrap();
    assert_eq!(snapshots.len(), 2);
    for field in ["id", "time", "lineage", "tags", "counts"] {
        assert!(snapshots.iter().all(|snapshot| snapshot.get(field).is_some()), "{field}");
    }
    assert_eq!(snapshots[0]["tags"]["kind"], "first");
    assert_eq!(snapshots[1]["parent"], snapshots[0]["id"]);
    assert_eq!(snapshots[1]["counts"]["files"], 3);

    let listed = machine.prints(&["ls", "latest", "-R"]);
    assert!(listed.contains("dir/c"), "{listed}");
    let target = machine.path("target/new");
    machine.prints(&["restore", "latest", &target]);
    assert_eq!(std::fs::read_to_string(Path::new(&target).join("dir/c")).unwrap(), "three");
    let id = snapshots[0]["id"].as_str().unwrap();
    let old = machine.path("old");
    machine.prints(&["restore", &id[..8], &old]);
    assert!(!Path::new(&old).join("dir/c").exists());
    let part = machine.path("part");
    machine.prints(&["restore", "latest", &part, "--include", "dir/b"]);
    assert!(Path::new(&part).join("dir/b").exists() && !Path::new(&part).join("a").exists());
    let checked = machine.json(&["check", "--read-data", "--json"]);
    assert_eq!((checked["snapshots"].as_u64(), checked["problems"].as_array().map(Vec::len)), (Some(2), Some(0)));
}

#[test]
fn mistakes_are_told_with_what_to_do() {
    let machine = Machine::new();
    let said = machine.fails(1, &["snapshots"]);
    assert!(said.contains("lifeboat init"), "{said}");
    machine.prints(&["init"]);
    assert!(machine.fails(1, &["init"]).contains("already"));
    let said = says(&machine.command(&["snapshots"]).env("LIFEBOAT_PASSWORD", "wrong").output().unwrap(), 1);
    assert!(said.contains("password") && !said.contains("wrong\""), "{said}");
    let said = says(&machine.command(&["snapshots"]).env_remove("LIFEBOAT_PASSWORD").output().unwrap(), 1);
    assert!(said.contains("LIFEBOAT_PASSWORD"), "{said}");
    let said = says(&machine.command(&["snapshots"]).env_remove("LIFEBOAT_REPOSITORY").output().unwrap(), 1);
    assert!(said.contains("LIFEBOAT_REPOSITORY"), "{said}");
    assert!(machine.fails(1, &["restore", "latest", &machine.path("x")]).contains("snapshot"));
    assert!(machine.fails(1, &["restore", "zz", &machine.path("x")]).contains("4 hexadecimal digits"));
    assert!(machine.fails(1, &["backup", &machine.path("missing")]).contains("missing"));
    machine.fails(2, &["backup"]);
    machine.fails(2, &["frobnicate"]);
}

#[test]
fn a_key_file_opens_what_it_made_and_nothing_else() {
    let machine = Machine::new();
    let key = machine.path("key");
    std::fs::write(&key, [9; 32]).unwrap();
    let with = |file: &str, arguments: &[&str]| {
        machine.command(arguments).env_remove("LIFEBOAT_PASSWORD").env("LIFEBOAT_KEY_FILE", file).output().unwrap()
    };
    assert!(with(&key, &["init"]).status.success());
    assert!(with(&key, &["snapshots"]).status.success());
    let other = machine.path("other");
    std::fs::write(&other, [8; 32]).unwrap();
    assert!(says(&with(&other, &["snapshots"]), 1).contains("key"));
    std::fs::write(&other, [8; 31]).unwrap();
    assert!(says(&with(&other, &["snapshots"]), 1).contains("32"));
    machine.fails(1, &["snapshots"]);
}

#[test]
fn damage_is_found_and_makes_the_exit_code_three() {
    let machine = Machine::new();
    let source = machine.path("source");
    write(&source, &[("a", &"content ".repeat(10_000))]);
    machine.prints(&["init"]);
    machine.prints(&["backup", &source]);
    let packs: Vec<_> = walk(Path::new(&machine.path("repository/p")));
    assert!(!packs.is_empty());
    for pack in packs {
        let mut bytes = std::fs::read(&pack).unwrap();
        bytes[70] ^= 1;
        std::fs::write(&pack, bytes).unwrap();
    }
    let output = machine.run(&["check", "--read-data"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stdout).contains("pack"), "{output:?}");
}

#[test]
fn rules_forget_snapshots_and_expiry_gives_their_space_back() {
    let machine = Machine::new();
    let source = machine.path("source");
    machine.prints(&["init"]);
    for number in 0..4 {
        // Nothing that compresses, and nothing that is the same twice.
        let lines = (0..30_000u64).map(|at| ((at + 1) * (number + 7) * 0x9e37_79b9).to_string());
        let content = lines.collect::<Vec<_>>().concat();
        write(&source, &[("changes", &content), ("stays", "the same")]);
        machine.prints(&["backup", &source]);
    }
    let bytes = |machine: &Machine| -> u64 {
        walk(Path::new(&machine.path("repository/p"))).iter().map(|pack| pack.metadata().unwrap().len()).sum()
    };
    let before = bytes(&machine);
    assert!(machine.fails(2, &["forget"]).contains("SNAPSHOT"), "without rules and names nothing is forgotten");
    let planned = machine.json(&["forget", "--keep-last", "2", "--dry-run", "--json"]);
    let kept = |planned: &Value| -> Vec<bool> {
        planned["snapshots"].as_array().unwrap().iter().map(|s| s["keep"].as_bool().unwrap()).collect()
    };
    assert_eq!(kept(&planned), [false, false, true, true]);
    assert_eq!(planned["snapshots"][3]["reasons"][0], "newest 1 of 2");
    assert_eq!(machine.json(&["snapshots", "--json"]).as_array().unwrap().len(), 4);
    assert_eq!(kept(&machine.json(&["forget", "--keep-last", "2", "--lineage", "other", "--json"])), [false; 0]);

    let said = machine.prints(&["forget", "--keep-last", "2", "--time-zone", "Europe/Berlin"]);
    assert!(said.contains("lifeboat expire"), "{said}");
    let left = machine.json(&["snapshots", "--json"]);
    assert_eq!(left.as_array().unwrap().len(), 2);
    assert!(machine.fails(1, &["ls", planned["snapshots"][0]["id"].as_str().unwrap()]).contains("no snapshot"));
    assert_eq!(bytes(&machine), before, "only expiry gives space back");

    let planned = machine.json(&["expire", "--dry-run", "--json"]);
    assert!(planned["bytesDeleted"].as_u64().unwrap() > 0);
    assert_eq!(bytes(&machine), before);
    let done = machine.json(&["expire", "--json"]);
    assert_eq!(
        (done["done"].as_bool(), done["snapshotsRemoved"].as_u64(), done["snapshots"].as_u64()),
        (Some(true), Some(2), Some(2))
    );
    assert!(bytes(&machine) < before * 2 / 3, "{before} {}", bytes(&machine));
    assert_eq!(machine.json(&["check", "--read-data", "--json"])["problems"].as_array().map(Vec::len), Some(0));
    let target = machine.path("target");
    machine.prints(&["restore", "latest", &target]);
    assert_eq!(std::fs::read_to_string(Path::new(&target).join("stays")).unwrap(), "the same");
    machine.prints(&["backup", &source]);

    // By name.
    let id = left[0]["id"].as_str().unwrap();
    machine.prints(&["forget", &id[..8]]);
    assert!(machine.fails(1, &["forget", &id[..8]]).contains("no snapshot"));
    assert!(machine.fails(2, &["forget", &id[..8], "--keep-last", "1"]).contains("cannot be used"));
    let said = machine.prints(&["expire", "--repack-budget", "0"]);
    assert!(said.contains("2 snapshots live"), "{said}");
    assert!(machine.fails(1, &["forget", "--keep-last", "1", "--time-zone", "Nowhere/Else"]).contains("time zone"));
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(walk(&path));
        } else {
            files.push(path);
        }
    }
    files
}

/// The shell block of the README that shows the program without a cluster, as it stands.
#[test]
fn the_shell_block_of_the_readme_works() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    let section = readme.split("## Without a cluster").nth(1).unwrap();
    let block = section.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    let machine = Machine::new();
    let bin = machine.path("target/release");
    std::fs::create_dir_all(&bin).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_lifeboat"), Path::new(&bin).join("lifeboat")).unwrap();
    // The places that a reader has are this test's: the repository, the folder and the target. The build has happened.
    let source = machine.path("etc");
    write(&source, &[("hosts", "127.0.0.1 localhost")]);
    let block = block.replace("make build\n", "").replace("/srv/backup", &machine.path("srv"));
    let block = block
        .replace("/tmp/etc-restored", &machine.path("restored"))
        .replace("backup /etc", &format!("backup {source}"));
    let output = Command::new("sh")
        .args(["-euc", &block])
        .current_dir(machine.folder.path())
        .env("HOME", machine.folder.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{block}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(Path::new(&machine.path("restored")).join("hosts").exists());
}
