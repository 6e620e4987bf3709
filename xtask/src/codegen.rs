//! What is generated from the code: the CRDs of the chart.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Path of a generated file and its content.
pub(crate) type Generated = (String, String);

/// Everything that is generated.
pub(crate) fn generate(root: &Path) -> Result<Vec<Generated>> {
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--package", "lifeboat-crds", "--bin", "crdgen"])
        .current_dir(root)
        .output()
        .context("cannot run crdgen")?;
    ensure!(output.status.success(), "crdgen failed: {}", String::from_utf8_lossy(&output.stderr));
    let crds = String::from_utf8(output.stdout)?;
    let header = "# Generated from crds/ by `cargo xtask codegen`; do not edit.\n";
    Ok(vec![("charts/lifeboat/crds/lifeboat.dev.yaml".to_owned(), format!("{header}{crds}"))])
}

/// Writes what is generated.
pub(crate) fn write(root: &Path) -> Result<()> {
    for (path, content) in generate(root)? {
        fs::write(root.join(&path), content).with_context(|| format!("cannot write {path}"))?;
        println!("wrote {path}");
    }
    Ok(())
}
