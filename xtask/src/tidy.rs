//! Checks that no compiler makes: generated files, edges between crates, invariants with tests, links in documents.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::codegen;

/// Which crate may use which, as docs/ARCHITECTURE.md says.
const EDGES: &[(&str, &[&str])] = &[
    ("lifeboat-crds", &[]),
    ("lifeboat-repository", &[]),
    ("lifeboat", &["lifeboat-repository"]),
    ("lifeboat-process", &["lifeboat-crds", "lifeboat-repository"]),
    ("lifeboat-agent", &["lifeboat-crds", "lifeboat-process", "lifeboat-repository"]),
    ("lifeboat-controller", &["lifeboat-crds", "lifeboat-process", "lifeboat-repository"]),
    ("lifeboat-e2e", &["lifeboat-crds"]),
    ("xtask", &[]),
];

/// A source file with more lines needs a reason, written in its head after `Long because`.
const LONG_FILE: usize = 600;

/// Runs all checks and names everything that is wrong.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut wrong = Vec::new();
    for (path, content) in codegen::generate(root)? {
        if fs::read_to_string(root.join(&path)).unwrap_or_default() != content {
            wrong.push(format!("{path} is not current: run `cargo xtask codegen`"));
        }
    }
    wrong.extend(crate_edges(root)?);
    let files = tracked_files(root)?;
    wrong.extend(invariants(root, &files)?);
    for path in &files {
        let Ok(text) = fs::read_to_string(root.join(path)) else { continue };
        if has_extension(path, "rs") {
            wrong.extend(source_file(path, &text));
        }
        if has_extension(path, "md") {
            wrong.extend(links(root, path, &text));
        }
    }
    if wrong.is_empty() {
        println!("tidy: {} files", files.len());
        return Ok(());
    }
    bail!("not tidy:\n  {}", wrong.join("\n  "))
}

fn has_extension(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}

fn tracked_files(root: &Path) -> Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()?;
    ensure!(output.status.success(), "git ls-files failed");
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

/// Edges between the workspace's crates that are not allowed.
fn crate_edges(root: &Path) -> Result<Vec<String>> {
    let output =
        Command::new(env!("CARGO")).args(["metadata", "--format-version=1", "--no-deps"]).current_dir(root).output()?;
    ensure!(output.status.success(), "cargo metadata failed");
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let allowed: BTreeMap<_, _> = EDGES.iter().copied().collect();
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().context("packages")? {
        let name = package["name"].as_str().context("name")?;
        let Some(may_use) = allowed.get(name) else {
            wrong.push(format!("the crate {name} has no entry in the table of edges"));
            continue;
        };
        for dependency in package["dependencies"].as_array().context("dependencies")? {
            let used = dependency["name"].as_str().context("name")?;
            if allowed.contains_key(used) && !may_use.contains(&used) {
                wrong.push(format!("the crate {name} must not use {used}"));
            }
        }
    }
    Ok(wrong)
}

/// Every line `Invariant: …` of the architecture names a test, and the test exists.
fn invariants(root: &Path, files: &[String]) -> Result<Vec<String>> {
    let architecture = fs::read_to_string(root.join("docs/ARCHITECTURE.md"))?;
    let sources: Vec<_> = files
        .iter()
        .filter(|path| has_extension(path, "rs"))
        .filter_map(|path| fs::read_to_string(root.join(path)).ok())
        .collect();
    let mut wrong = Vec::new();
    // A statement may go on in the next lines, which are indented.
    let joined = architecture.replace("\n  ", " ");
    for line in joined.lines().filter(|line| line.starts_with("- Invariant: ")) {
        let tests: Vec<_> = line.split('`').skip(1).step_by(2).collect();
        if tests.is_empty() {
            wrong.push(format!("docs/ARCHITECTURE.md: no test is named: {line}"));
        }
        for test in tests {
            if !sources.iter().any(|source| source.contains(&format!("fn {test}("))) {
                wrong.push(format!("docs/ARCHITECTURE.md: there is no test `{test}`"));
            }
        }
    }
    Ok(wrong)
}

fn source_file(path: &str, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if !text.starts_with("//!") {
        wrong.push(format!("{path}: does not begin with what it is for"));
    }
    let head: String = text.lines().take_while(|line| line.starts_with("//!")).collect();
    let lines = text.lines().count();
    if lines > LONG_FILE && !head.contains("Long because") {
        wrong.push(format!("{path}: {lines} lines, more than {LONG_FILE}"));
    }
    wrong
}

/// Relative links in documents that lead nowhere.
fn links(root: &Path, path: &str, text: &str) -> Vec<String> {
    let folder = Path::new(path).parent().unwrap_or(Path::new(""));
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(target, _)| target));
    targets
        .map(|target| target.split('#').next().unwrap_or(target))
        .filter(|target| !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:"))
        .filter(|target| !root.join(folder).join(target).exists())
        .map(|target| format!("{path}: the link to {target} leads nowhere"))
        .collect()
}
