//! What deduplication saves by each chunker: `cargo run --release -p lifeboat-repository --example dedup -- FOLDER...`
//!
//! Each folder is a data set, all versions of it together. Prints a row of a table for each: the bytes of all its regular
//! files, and of its distinct chunks by each chunker, the mean of some keys, at the average chunk that repositories have.
#![allow(clippy::print_stdout, reason = "it prints a table")]

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use lifeboat_repository::chunk::{Chunker, chunker};
use lifeboat_repository::config::ChunkerConfig;

const KEYS: [[u8; 32]; 3] = [[1; 32], [2; 32], [3; 32]];
const MIB: f64 = 1_048_576.0;

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            files_below(&entry.path(), found)?;
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    Ok(())
}

/// Bytes of the distinct chunks.
fn distinct(chunker: &dyn Chunker, files: &[PathBuf]) -> std::io::Result<u64> {
    let mut lengths = HashMap::new();
    for file in files {
        let bytes = fs::read(file)?;
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (chunk, after) = rest.split_at(chunker.cut(rest));
            lengths.insert(blake3::hash(chunk), chunk.len() as u64);
            rest = after;
        }
    }
    Ok(lengths.values().sum())
}

#[allow(clippy::cast_precision_loss, reason = "figures to read")]
fn main() -> Result<(), Box<dyn Error>> {
    println!("| data | MiB | distinct MiB, `fastcdc-v2020-keyed` | `window-keyed` | ratio of all to distinct | |");
    println!("|---|---|---|---|---|---|");
    for folder in std::env::args_os().skip(1).map(PathBuf::from) {
        let mut files = Vec::new();
        files_below(&folder, &mut files)?;
        let mut bytes = 0;
        for file in &files {
            bytes += fs::metadata(file)?.len();
        }
        let mut means = Vec::new();
        for config in [ChunkerConfig::fastcdc(), ChunkerConfig::default()] {
            let mut sum = 0;
            for key in KEYS {
                sum += distinct(&*chunker(&config, &key)?, &files)?;
            }
            means.push(sum as f64 / KEYS.len() as f64);
        }
        let name = folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy();
        println!(
            "| {name} | {:.1} | {:.1} | {:.1} | {:.3} | {:.3} |",
            bytes as f64 / MIB,
            means[0] / MIB,
            means[1] / MIB,
            bytes as f64 / means[0],
            bytes as f64 / means[1],
        );
    }
    Ok(())
}
