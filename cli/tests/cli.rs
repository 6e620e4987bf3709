//! The program as people and scripts use it.
#![allow(clippy::unwrap_used, clippy::panic)]

mod machine;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use machine::{Machine, says};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;

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
    let source = machine.text("source");
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
    let target = machine.text("target/new");
    machine.prints(&["restore", "latest", &target]);
    assert_eq!(std::fs::read_to_string(Path::new(&target).join("dir/c")).unwrap(), "three");
    let id = snapshots[0]["id"].as_str().unwrap();
    let old = machine.text("old");
    machine.prints(&["restore", &id[..8], &old]);
    assert!(!Path::new(&old).join("dir/c").exists());
    let part = machine.text("part");
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
    assert!(machine.fails(1, &["restore", "latest", &machine.text("x")]).contains("snapshot"));
    assert!(machine.fails(1, &["restore", "zz", &machine.text("x")]).contains("4 hexadecimal digits"));
    assert!(machine.fails(1, &["backup", &machine.text("missing")]).contains("missing"));
    machine.fails(2, &["backup"]);
    machine.fails(2, &["frobnicate"]);
}

#[test]
fn compression_is_chosen_for_new_data() {
    let stored = |level: &str| {
        let machine = Machine::new();
        let source = machine.text("source");
        let lines: Vec<_> =
            (0..40_000).map(|n| format!("{:x} of many lines that look alike, {}", n * n, n % 97)).collect();
        write(&source, &[("a", &lines.join("\n"))]);
        machine.prints(&["init"]);
        let made = machine.json(&["--json", "backup", &source, "--compression", level]);
        let target = machine.text("target");
        machine.prints(&["restore", "latest", &target]);
        assert_eq!(std::fs::read_to_string(Path::new(&target).join("a")).unwrap(), lines.join("\n"));
        made["stats"]["stored_bytes"].as_u64().unwrap()
    };
    let [none, fast, small] = ["0", "1", "19"].map(stored);
    assert!(none > 2 * fast && fast > small, "{none} {fast} {small}");
    let machine = Machine::new();
    let said = machine.fails(2, &["backup", "/", "--compression", "20"]);
    assert!(said.contains("a level from 0 (none) to 19"), "{said}");
}

#[test]
fn a_key_file_opens_what_it_made_and_nothing_else() {
    let machine = Machine::new();
    let key = machine.text("key");
    std::fs::write(&key, [9; 32]).unwrap();
    let with = |file: &str, arguments: &[&str]| {
        machine.command(arguments).env_remove("LIFEBOAT_PASSWORD").env("LIFEBOAT_KEY_FILE", file).output().unwrap()
    };
    assert!(with(&key, &["init"]).status.success());
    assert!(with(&key, &["snapshots"]).status.success());
    let other = machine.text("other");
    std::fs::write(&other, [8; 32]).unwrap();
    assert!(says(&with(&other, &["snapshots"]), 1).contains("key"));
    std::fs::write(&other, [8; 31]).unwrap();
    assert!(says(&with(&other, &["snapshots"]), 1).contains("32"));
    machine.fails(1, &["snapshots"]);
}

#[test]
fn damage_is_found_and_makes_the_exit_code_three() {
    let machine = Machine::new();
    let source = machine.text("source");
    write(&source, &[("a", &"content ".repeat(10_000))]);
    machine.prints(&["init"]);
    machine.prints(&["backup", &source]);
    let packs: Vec<_> = walk(Path::new(&machine.text("repository/p")));
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
    let source = machine.text("source");
    machine.prints(&["init"]);
    for number in 0..4 {
        // Nothing that compresses, and nothing that is the same twice.
        let lines = (0..30_000u64).map(|at| ((at + 1) * (number + 7) * 0x9e37_79b9).to_string());
        let content = lines.collect::<Vec<_>>().concat();
        write(&source, &[("changes", &content), ("stays", "the same")]);
        machine.prints(&["backup", &source]);
    }
    let bytes = |machine: &Machine| -> u64 {
        walk(Path::new(&machine.text("repository/p"))).iter().map(|pack| pack.metadata().unwrap().len()).sum()
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
    let target = machine.text("target");
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

#[test]
fn single_files_are_printed_and_snapshots_compared() {
    let machine = Machine::by_key_file();
    let source = machine.text("source");
    write(&source, &[("a", "one"), ("dir/b", "two")]);
    machine.prints(&["init"]);
    let first = machine.json(&["--json", "backup", &source]);
    write(&source, &[("a", "another"), ("new", "new")]);
    std::fs::remove_file(Path::new(&source).join("dir/b")).unwrap();
    machine.prints(&["backup", &source]);
    assert_eq!(machine.prints(&["cat", "latest", "a"]), "another");
    let id = first["id"].as_str().unwrap();
    assert_eq!(machine.prints(&["cat", id, "dir/b"]), "two");
    assert!(machine.fails(1, &["cat", "latest", "dir/b"]).contains("dir/b"));
    let told = machine.prints(&["diff", id, "latest"]);
    for line in ["M a  (content, time)", "- dir/b", "+ new", "1 added, 1 removed"] {
        assert!(told.contains(line), "{told}");
    }
    let told = machine.prints(&["diff", id, "latest", "--json"]);
    let lines: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["change"] == "removed" && line["before"]["path"] == "dir/b"), "{told}");
    let listed = machine.prints(&["restore", "latest", &machine.text("x"), "--include", "n*", "--dry-run"]);
    assert!(
        listed.contains(" new\n") && listed.contains("1 entries") && !Path::new(&machine.text("x")).exists(),
        "{listed}"
    );
    let stats = machine.json(&["stats", "--json"]);
    assert_eq!((stats["snapshots"].as_u64(), stats["lineages"][0]["snapshots"].as_u64()), (Some(2), Some(2)));
    assert!(stats["storedBytes"].as_u64() > stats["packs"]["bytes"].as_u64());
    assert!(machine.prints(&["stats"]).contains("2 snapshots"));
}

#[test]
fn keys_are_added_changed_and_removed() {
    let machine = Machine::new();
    machine.prints(&["init"]);
    let key = machine.text("key");
    std::fs::write(&key, [9; 32]).unwrap();
    let with_key = |arguments: &[&str]| {
        machine.command(arguments).env_remove("LIFEBOAT_PASSWORD").env("LIFEBOAT_KEY_FILE", &key).output().unwrap()
    };
    assert!(machine.fails(1, &["keys", "add"]).contains("LIFEBOAT_NEW_PASSWORD"));
    machine.prints(&["keys", "add", "--new-key-file", &key, "--writer"]);
    assert!(with_key(&["snapshots"]).status.success());
    let slots = machine.json(&["keys", "list", "--json"]);
    let slot = |role: &str| slots.as_array().unwrap().iter().find(|slot| slot["role"] == role).unwrap().clone();
    assert_eq!((&slot("writer")["kind"], &slot("full")["opened"]), (&"key-file".into(), &true.into()));
    let full = slot("full")["name"].as_str().unwrap().to_owned();
    assert!(machine.fails(1, &["keys", "remove", &full]).contains("keys add"));
    let changed = machine.command(&["keys", "change"]).env("LIFEBOAT_NEW_PASSWORD", "battery").output().unwrap();
    assert!(changed.status.success());
    assert!(machine.fails(1, &["snapshots"]).contains("password"));
    let told = says(&with_key(&["keys", "remove", "0000"]), 1);
    assert!(told.contains("keys list"), "{told}");
}

#[test]
fn damage_is_scrubbed_without_a_password_and_healed_from_a_copy() {
    let machine = Machine::by_key_file();
    let source = machine.text("source");
    write(&source, &[("a", &"content ".repeat(10_000))]);
    machine.prints(&["init"]);
    machine.prints(&["backup", &source]);
    let copied = Command::new("cp").args(["-a", &machine.text("repository"), &machine.text("copy")]).status().unwrap();
    assert!(copied.success());
    let scrub = |arguments: &[&str]| machine.command(arguments).env_remove("LIFEBOAT_KEY_FILE").output().unwrap();
    assert!(scrub(&["scrub"]).status.success());
    let told =
        says(&machine.command(&["scrub", "--share", "1/7"]).env_remove("LIFEBOAT_CACHE_DIR").output().unwrap(), 1);
    assert!(told.contains("--cache-dir"), "{told}");
    assert!(scrub(&["scrub", "--share", "1/7"]).status.success());
    for pack in walk(Path::new(&machine.text("repository/p"))) {
        let mut bytes = std::fs::read(&pack).unwrap();
        bytes[70] ^= 1;
        std::fs::write(&pack, bytes).unwrap();
    }
    assert_eq!(scrub(&["scrub"]).status.code(), Some(3));
    let look = machine.run(&["heal", "--from", &machine.text("copy"), "--dry-run", "--json"]);
    assert_eq!(look.status.code(), Some(3), "{look:?}");
    let look: Value = serde_json::from_slice(&look.stdout).unwrap();
    assert_eq!(look["replaced"].as_array().map(Vec::len), Some(2));
    let healed = machine.json(&["heal", "--from", &machine.text("copy"), "--json"]);
    assert_eq!(
        (healed["replaced"].as_array().map(Vec::len), healed["left"].as_array().map(Vec::len)),
        (Some(2), Some(0))
    );
    machine.prints(&["check", "--read-data"]);
    machine.prints(&["check", "--read-data=1/3"]);
    assert!(machine.prints(&["rebuild-index"]).contains("0 were not indexed"));
}

#[test]
fn snapshots_are_replicated_to_another_place() {
    let machine = Machine::by_key_file();
    let (source, other) = (machine.text("source"), machine.text("other"));
    write(&source, &[("a", "one")]);
    machine.prints(&["init"]);
    machine.prints(&["backup", &source]);
    assert!(machine.fails(1, &["replicate", "--to", &other]).contains("--init"));
    let report = machine.json(&["replicate", "--to", &other, "--init", "--max-age", "1 day", "--json"]);
    assert_eq!(report["copied"].as_array().map(Vec::len), Some(1));
    assert!(machine.prints(&["replicate", "--to", &other]).contains("0 replicated, 1 were there"));
    let at_other = machine.command(&["cat", "latest", "a"]).env("LIFEBOAT_REPOSITORY", &other).output().unwrap();
    assert_eq!(at_other.stdout, b"one");
}

#[test]
fn who_stops_reading_is_no_failure_and_a_full_disk_is_one() {
    let machine = Machine::by_key_file();
    let source = machine.text("source");
    let files: Vec<_> = (0..3000).map(|number| format!("a-long-name-of-a-file-{number}")).collect();
    let files: Vec<_> = files.iter().map(|name| (name.as_str(), "x")).collect();
    write(&source, &files);
    machine.prints(&["init"]);
    for arguments in
        [&["backup", &source][..], &["ls", "latest"], &["ls", "latest", "--json"], &["snapshots"], &["check"]]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = machine.command(arguments).stdout(writer).output().unwrap();
        assert_eq!(says(&output, 0), "", "{arguments:?}");
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = machine.command(arguments).stdout(full).output().unwrap();
        assert!(says(&output, 1).contains("cannot write to the standard output"), "{arguments:?}");
        // Nobody can be told of a failure there.
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = machine.command(&["ls", "nothing"]).stderr(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
    }
    assert_eq!(machine.json(&["--json", "snapshots"]).as_array().unwrap().len(), 2);
}

#[test]
fn shells_and_manuals_know_every_command() {
    let machine = Machine::by_key_file();
    for shell in ["bash", "zsh", "fish"] {
        assert!(machine.prints(&["completions", shell]).contains("rebuild-index"), "{shell}");
    }
    machine.prints(&["man", &machine.text("man")]);
    for page in ["lifeboat.1", "lifeboat-backup.1", "lifeboat-mount.1", "lifeboat-keys-add.1"] {
        assert!(Path::new(&machine.text("man")).join(page).exists(), "{page}");
    }
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
    let bin = machine.text("target/release");
    std::fs::create_dir_all(&bin).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_lifeboat"), Path::new(&bin).join("lifeboat")).unwrap();
    // The places that a reader has are this test's: the repository, the folder and the target. The build has happened.
    let source = machine.text("etc");
    write(&source, &[("hosts", "127.0.0.1 localhost")]);
    let block = block.replace("make build\n", "").replace("/srv/backup", &machine.text("srv"));
    let block = block
        .replace("/tmp/etc-restored", &machine.text("restored"))
        .replace("backup /etc", &format!("backup {source}"));
    let output = Command::new("sh")
        .args(["-euc", &block])
        .current_dir(machine.folder.path())
        .env("HOME", machine.folder.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{block}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(Path::new(&machine.text("restored")).join("hosts").exists());
}

#[test]
fn a_disk_image_goes_there_and_back_and_its_holes_cost_nothing() {
    let machine = Machine::by_key_file();
    machine.prints(&["init"]);
    let disk = machine.text("disk.img");
    let mut bytes = vec![0; 6 << 20];
    bytes[3 << 20..][..300_000].fill(7);
    std::fs::write(&disk, &bytes[..]).unwrap();
    let first = machine.json(&["--json", "backup", "--image", &disk]);
    assert_eq!(first["counts"]["bytes"], 6 << 20);
    let again = machine.json(&["--json", "backup", "--image", &disk]);
    assert_eq!(again["stats"]["new_bytes"].as_u64().unwrap() / 4096, 0, "{again}");
    // An older, longer file: what is not of the image goes.
    let target = machine.text("target.img");
    std::fs::write(&target, vec![9; 8 << 20]).unwrap();
    let said = machine.fails(2, &["restore", "latest", &target, "--image"]);
    assert!(said.contains("--overwrite"), "{said}");
    machine.prints(&["restore", "latest", &target, "--image", "--overwrite"]);
    assert!(std::fs::read(&target).unwrap() == bytes);
    let folder = machine.text("folder");
    machine.prints(&["restore", "latest", &folder]);
    assert!(std::fs::read(format!("{folder}/volume.img")).unwrap() == bytes);
}

#[test]
fn upkeep_lets_others_go_first() {
    let machine = Machine::new();
    let pipe = machine.text("key");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let niceness = |arguments: &[&str]| {
        let mut command = machine.command(arguments);
        command.env_remove("LIFEBOAT_PASSWORD").env("LIFEBOAT_KEY_FILE", &pipe).stdout(Stdio::piped());
        let mut started = command.spawn().unwrap();
        // Opens when the program does: it is at work then.
        let mut key = std::fs::File::options().write(true).open(&pipe).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{}/stat", started.id())).unwrap();
        key.write_all(&[9; 32]).unwrap();
        drop(key);
        assert!(started.wait().unwrap().success(), "{arguments:?}");
        // The 19th field; the second one ends with the last bracket.
        status.rsplit_once(')').unwrap().1.split_whitespace().nth(16).unwrap().parse::<i32>().unwrap()
    };
    let ours = niceness(&["init"]);
    for command in [&["forget", "--keep-last", "1"][..], &["expire"], &["check"]] {
        assert_eq!(niceness(command), (ours + 10).min(19), "{command:?}");
    }
    assert_eq!(niceness(&["snapshots"]), ours);
}
