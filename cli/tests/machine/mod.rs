//! The program, and a repository of its own.

#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    dead_code,
    reason = "only tests use this, and not each all of it; a failure here is theirs"
)]

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// A folder with a repository, and the program as it is called there.
pub struct Machine {
    pub folder: tempfile::TempDir,
    /// Opens the repository with a key file: without the time that a password takes on purpose.
    by_key_file: bool,
}

impl Machine {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), by_key_file: false }
    }

    pub fn by_key_file() -> Self {
        let machine = Self { by_key_file: true, ..Self::new() };
        std::fs::write(machine.path("key-file"), [5; 32]).unwrap();
        machine
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// As [`Machine::path`], to be an argument.
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_string_lossy().into_owned()
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lifeboat"));
        command.env_clear().env("PATH", "/usr/bin:/bin").env("LIFEBOAT_REPOSITORY", self.path("repository"));
        command.env("LIFEBOAT_CACHE_DIR", self.path("cache")).args(arguments);
        if self.by_key_file {
            command.env("LIFEBOAT_KEY_FILE", self.path("key-file"));
        } else {
            command.env("LIFEBOAT_PASSWORD", "correct horse");
        }
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What it prints when it succeeds.
    pub fn prints(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.prints(arguments)).unwrap()
    }

    /// What it says when it fails with this code.
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        says(&self.run(arguments), code)
    }
}

/// What it said when it failed with this code.
pub fn says(output: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}
